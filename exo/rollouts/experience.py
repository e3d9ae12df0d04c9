"""Experience for PPO: completions of the policy as it is now, with what every one of their tokens earned.

A token's reward is -kl_coef (log pi - log pi_ref), and the last one's has the completion's score on top; so the sum
over a completion is the objective of eq. 4. Advantages are Schulman's GAE. Processes share the work, and all have all
rollouts. Left out: the update.
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
from exo.models import logps as model_logps
from exo.rollouts import samples, shards
from exo.rollouts.scorers import Scorer

SCORED_AT_ONCE = 64  # rollouts; a process's share of them is a number of these


@dataclass(frozen=True)
class Rollout(TokenizedExample):
    """One prompt, one completion of n tokens; one number a token."""

    logps: tuple[float, ...] = ()  # of the policy that drew it
    values: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    returns: tuple[float, ...] = ()
    score: float = 0.0
    kl: float = 0.0  # sum of log pi - log pi_ref
    cut: bool = False  # for its length
    frozen: bool = False  # the actor is not to learn from it


class RolloutBatch(NamedTuple):
    """Numbers of the tokens stand in the order of the batch's."""

    batch: Batch
    logps: Tensor  # (n,) float32, and so the next three
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor  # (N,)
    kls: Tensor  # (N,)
    cuts: Tensor  # (N,) 1 where the completion was cut for its length
    frozen: bool

    @property
    def rows(self) -> Tensor:  # (n,)
        return self.batch.rows

    def to(self, device: torch.device) -> "RolloutBatch":
        moved: list[Any] = [value if isinstance(value, bool) else value.to(device) for value in self]
        return RolloutBatch(*moved)


def collate(rollouts: Sequence[Rollout], collator: Collator) -> RolloutBatch:
    def of_tokens(name: str) -> Tensor:  # (n,)
        return torch.tensor([value for rollout in rollouts for value in getattr(rollout, name)])

    logps, values, advantages, returns = map(of_tokens, ("logps", "values", "advantages", "returns"))
    scores, kls, cuts = (
        torch.tensor([float(getattr(rollout, name)) for rollout in rollouts]) for name in ("score", "kl", "cut")
    )
    batch = collator.collate(rollouts)
    return RolloutBatch(batch, logps, values, advantages, returns, scores, kls, cuts, rollouts[0].frozen)


class ExperienceCollector(NamedTuple):
    """What rollouts are made of. `values(part)` gives the critic's value of the state before each token of each row."""

    model: Any
    reference: Any
    tokenizer: Any
    scorer: Scorer
    values: Callable[[Sequence[TokenizedExample]], list[list[float]]]
    accelerator: Any
    settings: samples.Settings
    max_prompt_length: int
    seed: int
    collator: Collator
    kl_coef: float
    gamma: float
    lam: float
    remarks: Counter[str]  # of the scorer

    def make(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[Rollout]:
        """One completion of each prompt."""
        with self.accelerator.autocast(), fsdp.unsharded(self.model):
            drawn = samples.draw(
                self.model, self.tokenizer, prompts, self.settings, numbers=numbers, k=1,
                run=partial(shards.sample_shared, accelerator=self.accelerator),
                max_prompt_length=self.max_prompt_length, seed=self.seed,
            )  # fmt: skip
        samples.warn_of_cut(samples.describe(drawn)["unfinished"])
        rewards, counts = shards.score_shared(self.scorer, drawn, self.accelerator, chunk_size=SCORED_AT_ONCE)
        self.remarks.update(counts)
        scores = [score for (score,) in rewards]
        examples = self._encode(drawn)
        now, before = self._logps(self.model, examples), self._logps(self.reference, examples)
        together = fsdp.is_sharded(self.model)
        listed = model_logps.map_micro_batches(
            examples, self.values, self.collator, self.accelerator, together=together
        )
        values = [torch.tensor(row, dtype=torch.float64) for row in listed]
        earned = [-self.kl_coef * (a - b) for a, b in zip(now, before, strict=True)]
        for row, one in zip(earned, scores, strict=True):
            row[-1] += one
        advantages = [gae(r, v, self.gamma, self.lam) for r, v in zip(earned, values, strict=True)]
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        everything = torch.cat(advantages)
        mean, spread = everything.mean(), everything.std(correction=0).clamp(min=1e-8)
        return [
            Rollout(
                example.prompt, example.completions, None, example.line, None, None, tuple(now[i].tolist()),
                tuple(values[i].tolist()), tuple(((advantages[i] - mean) / spread).tolist()),
                tuple(returns[i].tolist()), scores[i], float((now[i] - before[i]).sum()), _is_cut(drawn[i]),
            )
            for i, example in enumerate(examples)
        ]  # fmt: skip

    def _encode(self, drawn: Sequence[Example]) -> list[TokenizedExample]:
        most = self.max_prompt_length
        limits = Limits(most + self.settings.max_new_tokens, None, "prompt-left", most)
        examples, _ = tokenize.encode(drawn, self.tokenizer, limits, "rollouts")
        return examples

    def _logps(self, model: Any, examples: Sequence[TokenizedExample]) -> list[Tensor]:
        found = model_logps.shared_token_logps(
            model, examples, self.accelerator, self.collator, temperature=self.settings.temperature
        )
        return [row for (row,) in found]


def _is_cut(example: Example) -> bool:
    return example.tokens is not None and example.tokens.finish == ("length",)


def gae(
    rewards: Tensor,  # (n,)
    values: Tensor,  # (n,) of the state before each token; after the last there is nothing more to earn
    gamma: float,
    lam: float,
) -> Tensor:  # (n,)
    """Generalised advantage estimates: A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t."""
    after = torch.cat([values[1:], values.new_zeros(1)])
    delta = (rewards + gamma * after - values).tolist()
    found, advantage = [], 0.0
    for change in reversed(delta):
        advantage = change + gamma * lam * advantage
        found.append(advantage)
    return rewards.new_tensor(found[::-1])


class RolloutSampler:
    """Batches without end: a phase of `rollout_size` new rollouts, gone through `epochs` times, and again.

    The actor is frozen in those of the first `warmup_steps` batches. A prompt that comes round again gets new
    completions. The order is private: no global random state moves.
    """

    def __init__(
        self,
        maker: ExperienceCollector,
        prompts: Sequence[str],
        *,
        rollout_size: int,
        batch_size: int,
        epochs: int,
        warmup_steps: int,
        seed: int,
    ) -> None:
        self.maker, self.prompts = maker, prompts
        self.rollout_size, self.batch_size, self.epochs, self.warmup_steps = (
            rollout_size,
            batch_size,
            epochs,
            warmup_steps,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []  # of the prompts that are next
        self.rollouts: list[Rollout] = []  # of this phase
        self.places: list[int] = []  # of those among them that this pass has not come to
        self.phase = self.passes = self.done = 0  # begun phases, begun passes of this one, batches

    def __next__(self) -> list[Rollout]:
        if not self.places:
            if self.passes == self.epochs or not self.rollouts:
                self._sample()
            self.places = torch.randperm(self.rollout_size, generator=self.generator).tolist()
            self.passes += 1
        now, self.places = self.places[: self.batch_size], self.places[self.batch_size :]
        batch = [self.rollouts[i] for i in now]
        self.done += 1
        return [replace(rollout, frozen=True) for rollout in batch] if self.done <= self.warmup_steps else batch

    def _sample(self) -> None:
        order = self.order
        while len(order) < self.rollout_size:
            order = order + torch.randperm(len(self.prompts), generator=self.generator).tolist()
        chosen, self.order = order[: self.rollout_size], order[self.rollout_size :]
        numbers = range(self.phase * self.rollout_size, (self.phase + 1) * self.rollout_size)
        self.rollouts = self.maker.make([self.prompts[i] for i in chosen], numbers)
        self.phase, self.passes = self.phase + 1, 0

    def state(self) -> dict[str, Any]:
        """As it is now: what it names is replaced, never changed."""
        known = {name: getattr(self, name) for name in ("order", "rollouts", "places", "phase", "passes", "done")}
        return known | {"generator": self.generator.get_state().numpy().tobytes().hex()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in ("order", "places", "phase", "passes", "done"):
            setattr(self, name, state[name])
        self.rollouts = [Rollout(**{name: _tuples(value) for name, value in row.items()}) for row in state["rollouts"]]
        self.generator.set_state(torch.tensor(list(bytes.fromhex(state["generator"])), dtype=torch.uint8))


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
