"""Collect experience for PPO: completions of the current policy, with the reward and advantage of each token.

A token's reward is -kl_coef (log pi - log pi_ref), and the last token also gets the score of the completion; the sum
over a completion is the objective of eq. 4. Advantages are Schulman's GAE. Ranks share the work, and all ranks get all
rollouts.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo.data import Example
from exo.data.collate import Batch, Collator
from exo.data.text import tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import fsdp
from exo.distributed.accelerator import Accelerator
from exo.models import logps as model_logps
from exo.rollouts import samples, shards
from exo.rollouts.scorers import Scorer

CHUNK_SIZE = 64  # rollouts that one rank scores together
STATE = ("order", "rollouts", "remaining", "phase", "passes", "num_batches")  # of a RolloutSampler, in checkpoints


@dataclass(frozen=True)
class Rollout(TokenizedExample):
    """One prompt and one completion of n tokens, with a number per token in each of the tuples."""

    logps: tuple[float, ...] = ()  # of the policy that drew the completion
    values: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    returns: tuple[float, ...] = ()
    score: float = 0.0
    kl: float = 0.0  # sum of log pi - log pi_ref
    cut: bool = False  # for length
    frozen: bool = False  # if True, the actor does not learn from it


class RolloutBatch(NamedTuple):
    """A batch of N rollouts whose completions have n tokens in total. Values per token are in the order of `batch`."""

    batch: Batch
    logps: Tensor  # (n,) float32
    values: Tensor  # (n,) float32
    advantages: Tensor  # (n,) float32
    returns: Tensor  # (n,) float32
    scores: Tensor  # (N,) float32
    kls: Tensor  # (N,) float32
    cuts: Tensor  # (N,) float32, 1 if the completion was cut for length
    frozen: bool

    @property
    def rows(self) -> Tensor:  # (n,)
        return self.batch.rows

    def to(self, device: torch.device) -> "RolloutBatch":
        """Return the batch on a device."""
        moved: list[Any] = [value if isinstance(value, bool) else value.to(device) for value in self]
        return RolloutBatch(*moved)


def collate(rollouts: Sequence[Rollout], collator: Collator) -> RolloutBatch:
    """Return a batch of rollouts."""
    logps, values, advantages, returns = (
        torch.tensor([value for rollout in rollouts for value in getattr(rollout, name)])
        for name in ("logps", "values", "advantages", "returns")
    )
    scores, kls, cuts = (
        torch.tensor([float(getattr(rollout, name)) for rollout in rollouts]) for name in ("score", "kl", "cut")
    )
    batch = collator.collate(rollouts)
    return RolloutBatch(batch, logps, values, advantages, returns, scores, kls, cuts, rollouts[0].frozen)


class ExperienceCollector(NamedTuple):
    """Samples completions of a policy and computes all fields of their rollouts."""

    model: Any
    reference: Any
    tokenizer: Any
    scorer: Scorer
    # Returns the critic's values of the state before each token, a list per example of the micro-batch.
    values: Callable[[Sequence[TokenizedExample]], list[list[float]]]
    accelerator: Accelerator
    settings: samples.Settings
    max_prompt_length: int
    seed: int
    collator: Collator
    kl_coef: float
    gamma: float
    lam: float
    counts: Counter[str]  # the scorer's, over all calls

    def collect(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[Rollout]:
        """Return a rollout for each prompt; `numbers` are those of `generate.sample`."""
        drawn, scores = self._sample_and_score(prompts, numbers)
        examples = self._encode(drawn)
        logps, ref_logps = self._logps(self.model, examples), self._logps(self.reference, examples)
        rows = model_logps.map_micro_batches(
            examples, self.values, self.collator, self.accelerator, together=fsdp.is_sharded(self.model)
        )
        values = [torch.tensor(row, dtype=torch.float64) for row in rows]
        rewards = [-self.kl_coef * (a - b) for a, b in zip(logps, ref_logps, strict=True)]
        for row, score in zip(rewards, scores, strict=True):
            row[-1] += score
        advantages = [gae(r, v, self.gamma, self.lam) for r, v in zip(rewards, values, strict=True)]
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        all_advantages = torch.cat(advantages)
        mean, std = all_advantages.mean(), all_advantages.std(correction=0).clamp(min=1e-8)
        cut = [row.tokens is not None and row.tokens.finish == ("length",) for row in drawn]
        return [
            Rollout(
                example.prompt,
                example.completions,
                None,
                example.line,
                logps=tuple(logps[i].tolist()),
                values=tuple(values[i].tolist()),
                advantages=tuple(((advantages[i] - mean) / std).tolist()),
                returns=tuple(returns[i].tolist()),
                score=scores[i],
                kl=float((logps[i] - ref_logps[i]).sum()),
                cut=cut[i],
            )
            for i, example in enumerate(examples)
        ]

    def _sample_and_score(self, prompts: Sequence[str], numbers: Sequence[int]) -> tuple[list[Example], list[float]]:
        options: dict[str, Any] = {"max_prompt_length": self.max_prompt_length, "seed": self.seed, "numbers": numbers}
        options["run"] = partial(shards.sample_shared, accelerator=self.accelerator)
        with self.accelerator.autocast(), fsdp.unsharded(self.model):
            drawn = samples.draw(self.model, self.tokenizer, prompts, self.settings, k=1, **options)
        samples.warn_of_cut(samples.describe(drawn)["unfinished"])
        rewards, counts = shards.score_shared(self.scorer, drawn, self.accelerator, chunk_size=CHUNK_SIZE)
        self.counts.update(counts)
        return drawn, [reward for (reward,) in rewards]

    def _encode(self, drawn: Sequence[Example]) -> list[TokenizedExample]:
        max_length = self.max_prompt_length + self.settings.max_new_tokens
        limits = Limits(max_length, None, "prompt-left", self.max_prompt_length)
        return tokenize.encode(drawn, self.tokenizer, limits, "rollouts")[0]

    def _logps(self, model: Any, examples: Sequence[TokenizedExample]) -> list[Tensor]:  # (tokens,) each
        rows = model_logps.token_logps(
            model, examples, self.accelerator, self.collator, temperature=self.settings.temperature, shared=True
        )
        return [logps for (logps,) in rows]


def gae(
    rewards: Tensor,  # (n,)
    values: Tensor,  # (n,) of the state before each token; the value after the last token is 0
    gamma: float,
    lam: float,
) -> Tensor:  # (n,)
    """Return generalised advantage estimates.

    A_t = sum_l (gamma lam)^l delta_{t+l}, where delta_t = r_t + gamma V_{t+1} - V_t.
    """
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    delta = (rewards + gamma * next_values - values).tolist()
    advantages, advantage = [], 0.0
    for change in reversed(delta):
        advantage = change + gamma * lam * advantage
        advantages.append(advantage)
    return rewards.new_tensor(advantages[::-1])


@dataclass
class RolloutSampler:
    """An endless iterator of batches. Each phase collects `rollout_size` rollouts and passes over them `epochs` times.

    Rollouts of the first `warmup_steps` batches are frozen. A prompt that is drawn again gets new completions. The
    order comes from a generator of this object; global random state does not change.
    """

    collector: ExperienceCollector
    prompts: Sequence[str]
    rollout_size: int
    batch_size: int
    epochs: int
    warmup_steps: int
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.order: list[int] = []  # indices of the next prompts
        self.rollouts: list[Rollout] = []  # of this phase
        self.remaining: list[int] = []  # indices of the rollouts that are left in this pass
        self.phase = self.passes = self.num_batches = 0  # phases begun, passes of this one begun, batches returned

    def __next__(self) -> list[Rollout]:
        if not self.remaining:
            if self.passes == self.epochs or not self.rollouts:
                self._collect()
            self.remaining = torch.randperm(self.rollout_size, generator=self.generator).tolist()
            self.passes += 1
        indices, self.remaining = self.remaining[: self.batch_size], self.remaining[self.batch_size :]
        batch = [self.rollouts[i] for i in indices]
        self.num_batches += 1
        return [replace(rollout, frozen=True) for rollout in batch] if self.num_batches <= self.warmup_steps else batch

    def _collect(self) -> None:
        order = self.order
        while len(order) < self.rollout_size:
            order = order + torch.randperm(len(self.prompts), generator=self.generator).tolist()
        chosen, self.order = order[: self.rollout_size], order[self.rollout_size :]
        numbers = range(self.phase * self.rollout_size, (self.phase + 1) * self.rollout_size)
        self.rollouts = self.collector.collect([self.prompts[i] for i in chosen], numbers)
        self.phase, self.passes = self.phase + 1, 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Later steps replace its lists, but do not change them."""
        state = {name: getattr(self, name) for name in STATE}
        return state | {"generator": self.generator.get_state().numpy().tobytes().hex()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that was stored as JSON."""
        for name in STATE:
            setattr(self, name, state[name])
        self.rollouts = [
            Rollout(**{name: _to_tuples(value) for name, value in row.items()}) for row in state["rollouts"]
        ]
        self.generator.set_state(torch.tensor(list(bytes.fromhex(state["generator"])), dtype=torch.uint8))


def _to_tuples(value: Any) -> Any:
    """Return JSON lists as tuples."""
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value
