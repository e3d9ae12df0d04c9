"""The second half of every loss: from log-probs to a reduced loss, with the options that decide it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo_kernels import groups, objectives, validation, value_checks
from exo_kernels.objectives import LossStats
from exo_kernels.ops import logits as logits_ops


class LossOptions(NamedTuple):
    """The options that turn log-ratios into a loss."""

    objective: str
    group_size: int | Tensor
    rewards: Tensor | None
    beta_pi: float
    beta_r: float
    label_smoothing: float
    reduction: str
    num_groups: int | float | Tensor | None
    compat: str | None

    def check(self, n_sequences: int, device: torch.device) -> None:
        validation.group_size(self.group_size, n_sequences, device)
        validation.reduction(self.reduction, self.num_groups, device)
        validation.positive("beta_pi", self.beta_pi)
        validation.positive("beta_r", self.beta_r)
        validation.choice("compat", self.compat, (None, "official"))
        validation.fraction("label_smoothing", self.label_smoothing)
        if self.rewards is not None:
            validation.tensor("rewards", self.rewards, validation.FLOATS, ((n_sequences,),), device)
        else:
            needs_smoothing = objectives.OBJECTIVES[self.objective].needs_smoothing
            validation.preferences(self.objective, self.group_size, self.label_smoothing, self.compat, needs_smoothing)

    @property
    def betas(self) -> objectives.Betas:
        log_targets = objectives.preference_log_targets(self.objective, self.label_smoothing, self.compat)
        return objectives.Betas(float(self.beta_pi), float(self.beta_r), *log_targets)

    @property
    def constant_rewards(self) -> Tensor | None:
        return None if self.rewards is None else self.rewards.detach()

    def denominator(self, n_groups: int) -> int | float | Tensor:
        """Return the number that divides the sum of the losses."""
        if self.reduction == "sum":
            return 1
        return max(n_groups, 1) if self.num_groups is None else self.num_groups

    def stats(self, losses: Tensor, policy: Tensor, ratios: Tensor, p: Tensor, q: Tensor, tokens: Tensor) -> LossStats:
        values = (policy, self.beta_pi * ratios, p, q, losses, tokens.long())
        return LossStats(*(value.detach() for value in values))


def publish(loss: Callable[..., Any], name: str, objective: str) -> Any:
    """Give a loss from a factory its public name and documentation."""
    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = f"{objectives.OBJECTIVES[objective].summary}\n\n{inspect.cleandoc(loss.__doc__ or '')}"
    return loss


def check_reference(ref_logps: Tensor, labels: Tensor, targets: Tensor, n_sequences: int) -> Tensor:
    """Check reference log-probs; return them as sums (N,), or per token in the shape of `targets`, (N, T)."""
    shapes = ((n_sequences,), tuple(labels.shape))
    validation.tensor("ref_logps", ref_logps, validation.SUMS, shapes, labels.device)
    ref_logps = ref_logps.detach()
    return ref_logps if tuple(ref_logps.shape) == (n_sequences,) else ref_logps.reshape(targets.shape)


def group_loss(
    options: LossOptions,
    logps: Tensor,  # one log-prob per row, any shape
    targets: Tensor,  # like logps
    ref_logps: Tensor,  # (N,) sums, or (N, T) per token; detached
    seq_offsets: Tensor,  # (N+1,)
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, LossStats]:
    """Compute the second half of every loss: K scalars per prompt, reduced."""
    offsets = groups.group_offsets(options.group_size, seq_offsets.numel() - 1, logps.device)
    rows = (logps.flatten(), targets.flatten(), ref_logps, options.constant_rewards, seq_offsets, offsets)
    losses, _, *results = logits_ops.group_loss(*rows, options.objective, options.betas, ignore_index, impl)
    stats = options.stats(losses, *results)
    if options.reduction == "none":
        return losses, stats
    if options.reduction == "sum":
        return losses.sum(), stats
    return (losses.sum() / options.denominator(losses.numel())).to(losses.dtype), stats


def run_reference(
    options: LossOptions,
    losses: Mapping[str, Callable[..., Any]],  # of reference.py
    tensors: tuple[Tensor | None, ...],
    ref_logps: Tensor | None,  # (N,) sums, or (N, T) per token; None if the call scores the reference
    targets: Tensor,
    seq_offsets: Tensor,
    **keywords: Any,
) -> tuple[Tensor, LossStats]:
    """Call the reference implementation, which checks nothing itself."""
    if validation.check_values(seq_offsets.device):
        offsets = groups.group_offsets(options.group_size, seq_offsets.numel() - 1, seq_offsets.device)
        ignore_index = keywords["ignore_index"]
        value_checks.group_values(seq_offsets, offsets, options.rewards, ref_logps, targets, ignore_index)
    keywords |= {field: value for field, value in options._asdict().items() if field != "objective"}
    loss, stats = losses[options.objective](*tensors, return_stats=True, **keywords)
    return loss, stats
