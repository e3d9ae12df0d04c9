"""PPO: the critic, the clipped losses of actor and critic, and the actor's frozen beginning."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo.cli.errors import RunError
from exo.data.collate import Batch, Collator, split_completions
from exo.data.text.tokenize import TokenizedExample
from exo.models.lm_head import LMHead, eval_mode
from exo.models.logps import TOKEN_NOISE, completion_hidden
from exo.training.metrics import MEAN_SQUARE
from exo.training.step import LossOutput, forward
from exo_kernels import linear_token_logps

ACTOR_GROUPS = 2  # the actor's parameter groups are the optimizer's first: matrices and vectors


class Critic(nn.Module):
    """The value of the state before each token: a body like the policy's, and a linear head initialized to 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = copy.deepcopy(model.base_model)
        self.value = nn.Linear(model.get_input_embeddings().weight.shape[1], 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, batch: Batch) -> Tensor:  # (N,) float32, N completion tokens
        output = self.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        with torch.autocast(output.last_hidden_state.device.type, enabled=False):  # values need fp32
            return self.value(output.last_hidden_state.float().flatten(0, 1)[batch.rows])[..., 0]


class ActorCritic(nn.Module):
    """Policy and critic; the forward is PPO's loss of a batch of rollouts."""

    def __init__(
        self,
        model: nn.Module,
        critic: Critic,
        *,
        temperature: float,
        clip_range: float,
        clip_range_value: float,
        value_coef: float,
    ) -> None:
        super().__init__()
        self.model, self.critic, self.head = model, critic, LMHead(model)
        self.temperature, self.value_coef = temperature, value_coef
        self.clip_range, self.clip_range_value = clip_range, clip_range_value

    def forward(self, rollout: Any, num_tokens: int) -> LossOutput:
        """Return the share of a batch, an exo.rollouts.experience.RolloutBatch, in the mean over so many tokens."""
        batch = rollout.batch
        logps = linear_token_logps(
            completion_hidden(self.head, batch), self.head.weight, temperature=self.temperature,
            **batch.loss_inputs(), **self.head.options,
        )  # fmt: skip
        change = logps.float() - rollout.logps  # (N,)
        actor, clipped = policy_loss(change, rollout.advantages, self.clip_range)
        # the actor's ratios need a slow critic; while the actor is frozen the critic may move freely
        clip_range = math.inf if rollout.frozen else self.clip_range_value
        critic = value_loss(self.critic(batch), rollout.values, rollout.returns, clip_range)

        def total(values: Tensor) -> Tensor:
            return values.double().sum()

        # a frozen actor takes part with weight 0, because other ranks wait for its gradient
        loss = (total(actor) * (not rollout.frozen) + self.value_coef * total(critic)) / num_tokens
        n, tokens = len(rollout.scores), len(logps)
        sums: dict[str, tuple[Any, Any]] = {
            "score": (rollout.scores.sum(), n),
            "kl": (rollout.kls.sum(), n),
            "cut": (rollout.cuts.sum(), n),
            "value_loss": (total(critic).detach(), tokens),
            "clip_fraction": (total(clipped), tokens),
            MEAN_SQUARE: (total(change.detach().square()), tokens),
        }
        return LossOutput(loss, sums)


def policy_loss(
    change: Tensor,  # (N,) log pi - log pi_old
    advantages: Tensor,  # (N,)
    clip_range: float,
) -> tuple[Tensor, Tensor]:  # (N,) each
    """Return Schulman et al. 2017, eq. 7, as a loss, and 1 where it is clipped."""
    ratio = change.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def value_loss(
    values: Tensor,  # (N,)
    previous: Tensor,  # (N,) of the critic that the rollout was made with
    returns: Tensor,  # (N,)
    clip_range: float,
) -> Tensor:  # (N,)
    """Return half the squared error of the value, or of the value clipped to its previous one, whichever is larger."""
    clipped = previous + (values - previous).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def values_function(
    critic: Critic, collator: Collator, accelerator: Accelerator
) -> Callable[[Sequence[TokenizedExample]], list[list[float]]]:
    """Return a function that gives the critic's values of each example's tokens, without dropout."""

    def values(part: Sequence[TokenizedExample]) -> list[list[float]]:
        with eval_mode(critic):
            rows = forward(critic, part, accelerator, collator)
        return [row.tolist() for (row,) in split_completions(part, rows.double().cpu())]

    return values


def reset_actor_steps(warmup_steps: int, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Reset the actor's step counters in Adam until the warm-up ends, or its first updates would be too small.

    Its gradients are 0 until then, and so are their averages, but Adam counts the steps that correct their bias.
    """
    if step <= warmup_steps + 1:
        for group in optimizer.param_groups[:ACTOR_GROUPS]:
            for parameter in group["params"]:
                if "step" in (state := optimizer.state.get(parameter, {})):
                    state["step"].zero_()


def count_tokens(rollouts: Sequence[TokenizedExample]) -> int:
    """Return the number of completion tokens."""
    return sum(len(rollout.completions[0]) for rollout in rollouts)


def first_ratio_check(temperature: float, mixed_precision: str) -> Callable[[float, Mapping[str, float]], None]:
    """Return a function that raises RunError unless the policy of the first update is the one that sampled."""
    most = 6 * TOKEN_NOISE[mixed_precision] / temperature

    def check(loss: float, values: Mapping[str, float]) -> None:
        square = values[MEAN_SQUARE]
        if not square <= most**2:
            raise RunError(
                f"the first update is off policy: log-probs of its tokens differ by {square**0.5:.2g} nats rms, and "
                f"{most:.2g} is the most that rounding does: a wrong mask, temperature or dropout"
            )

    return check
