"""Options and final steps that all fused losses share once the log-probs are known.

Left out: where the log-probs come from (api.py, linear/api.py), and the arithmetic (ops.group_loss).
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from exo_kernels import groups, objectives, reference, validation
from exo_kernels.objectives import LossStats
from exo_kernels.ops import logits as logits_ops

Reduction = Literal["mean", "sum", "none"]


class LossOptions(NamedTuple):
    """The arguments that turn log-ratios into a loss."""

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
        validation.objective(
            self.objective, self.group_size, self.rewards, self.beta_pi, self.beta_r, self.label_smoothing,
            self.compat, n_sequences, device,
        )  # fmt: skip

    @property
    def log_targets(self) -> tuple[float, float]:
        return objectives.preference_log_targets(self.objective, self.label_smoothing, self.compat)

    @property
    def constant_rewards(self) -> Tensor | None:
        return None if self.rewards is None else self.rewards.detach()

    def denominator(self, n_groups: int) -> int | float | Tensor:
        """Return the divisor of the losses' sum."""
        if self.reduction == "sum":
            return 1
        return max(n_groups, 1) if self.num_groups is None else self.num_groups

    def stats(self, losses: Tensor, policy: Tensor, ratios: Tensor, p: Tensor, q: Tensor, tokens: Tensor) -> LossStats:
        seen = (policy, self.beta_pi * ratios, p, q, losses, tokens.long())
        return LossStats(*(value.detach() for value in seen))


def group_loss(
    knobs: LossOptions,
    logps: Tensor,  # one log-prob a row, any shape
    targets: Tensor,  # like logps
    ref_logps: Tensor,  # (N,) sums, or one a row
    seq_offsets: Tensor,  # (N+1,)
    ignore_index: int,
    impl: str,
    per_token_ref: bool,
) -> tuple[Tensor, LossStats]:
    """The second half of every loss: K scalars a prompt, reduced."""
    n = seq_offsets.numel() - 1
    offsets = groups.group_offsets(knobs.group_size, n, logps.device)
    losses, _, *seen = logits_ops.group_loss(
        logps.flatten(), targets.flatten(), ref_logps.detach().flatten(), knobs.constant_rewards, seq_offsets, offsets,
        per_token_ref, knobs.objective, float(knobs.beta_pi), float(knobs.beta_r), *knobs.log_targets, ignore_index,
        impl,
    )  # fmt: skip
    stats = knobs.stats(losses, *seen)
    if knobs.reduction == "none":
        return losses, stats
    if knobs.reduction == "sum":
        return losses.sum(), stats
    return (losses.sum() / knobs.denominator(losses.numel())).to(losses.dtype), stats


def run_reference(
    knobs: LossOptions,
    name: str,
    tensors: tuple[Tensor | None, ...],
    targets: Tensor,
    seq_offsets: Tensor,
    **options: Any,
) -> tuple[Tensor, LossStats]:
    """Call the oracle's function of that name, which checks nothing itself."""
    if validation.check_values(seq_offsets.device):
        n, ref = seq_offsets.numel() - 1, tensors[-1]
        offsets = groups.group_offsets(knobs.group_size, n, seq_offsets.device)
        per_token_ref = ref is None or tuple(ref.shape) != (n,)
        logits_ops.check_groups(
            seq_offsets, offsets, knobs.rewards, ref, targets, per_token_ref, options["ignore_index"]
        )  # fmt: skip
    own = knobs._asdict()
    del own["objective"]
    return getattr(reference, name)(*tensors, return_stats=True, **own, **options)
