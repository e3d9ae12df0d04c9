"""The policy under its loss: what accelerate wraps for alignment, and what can be asked of it without training.

The loss runs inside the module's forward, so that gradient synchronisation sees it. Also here: scoring with a frozen
model, metrics, the loss that a run must begin with, and evaluation on held-out groups.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo import adapter, attention, intervals, processes, sharding
from exo.artifacts import RunError
from exo.encoding import TokenGroup
from exo.head import CausalHead, evaluating
from exo.packing import Batch, Packing, of_completions
from exo.steps import Share
from exo_kernels import (
    LossStats,
    fused_linear_dpo_loss,
    fused_linear_exo_loss,
    linear_token_logps,
    preference_loss,
)

LOSSES = {"exo": fused_linear_exo_loss, "dpo": fused_linear_dpo_loss}

# rms error of one token's log-prob by compute dtype: what the first loss may be off by without a mistake
TOKEN_NOISE = {"no": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2}


MEAN_SQUARE = "log_ratios/mean_square"  # of S_k, the sequence log-ratios
METRICS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/stuck"]
METRICS += ["logps/chosen", "logps/rejected", "target/entropy", "target/ess", MEAN_SQUARE]
STUCK = -3.0  # of the margin beta_pi (S_best - S_worst)


class PolicyLoss(nn.Module):
    """A causal LM whose forward is the alignment loss of a batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Literal["exo", "dpo"],
        beta_pi: float,
        beta_r: float,
        label_smoothing: float,
        temperature: float,
        reference: nn.Module | None = None,
    ) -> None:
        """`reference` scores every batch anew: a model of its own, or the one below the policy's adapter. Without it
        the batches hold its log-probs."""
        super().__init__()
        self.model = model
        self.head = CausalHead(model)
        below = reference is not None and reference.get_output_embeddings() is self.head.head  # type: ignore[operator]
        self.reference = None if reference is None or below else reference.requires_grad_(False)
        self.reference_head = self.head if below else None if reference is None else CausalHead(reference)
        self.loss: Literal["exo", "dpo"] = loss
        self.betas: dict[str, float] = {"beta_pi": beta_pi, "beta_r": beta_r}
        self.label_smoothing = label_smoothing
        self.temperature = temperature

    def train(self, mode: bool = True) -> "PolicyLoss":
        """The reference never drops anything out."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    @property
    def objective(self) -> dict[str, Any]:
        return self.betas | {"label_smoothing": self.label_smoothing}

    def losses(self, batch: Batch, **reduction: Any) -> tuple[Tensor, LossStats]:
        return LOSSES[self.loss](
            attention.rows(self.head, batch),
            self.head.weight,
            **self._reference(batch),
            **attention.scored(batch),
            **self.head.options,
            group_size=batch.group_size,
            rewards=batch.rewards,
            temperature=self.temperature,
            return_stats=True,
            **self.objective,
            **reduction,
        )

    def _reference(self, batch: Batch) -> dict[str, Any]:
        if self.reference_head is None:
            return {"ref_logps": batch.known_ref_logps()}
        head = self.reference_head
        below = head is self.head  # then it is the policy's own modules, in the policy's mode
        with torch.no_grad(), adapter.switched_off(self.model) if below else nullcontext():
            with evaluating(self.model) if below else nullcontext():
                rows = attention.rows(head, batch)
        if head is self.head:
            return {"ref_hidden": rows}
        return {"ref_hidden": rows, "ref_weight": head.weight, "ref_bias": head.options["bias"]}

    def forward(self, batch: Batch, num_groups: int | None) -> Any:
        """A share of the mean over so many groups; of none, the losses' sum and their stats, for evaluation."""
        if num_groups is None:
            return self.losses(batch, reduction="sum")
        loss, stats = self.losses(batch, num_groups=num_groups)
        return Share(loss, _sums(group_metrics(stats, batch, self.betas["beta_pi"])))

    def expected_first_loss(self, groups: Sequence[TokenGroup], mixed_precision: str) -> tuple[float, float]:
        """(mean loss where policy equals reference, what rounding alone may add to it: six sigma, to second order)."""
        noise = TOKEN_NOISE[mixed_precision] / self.temperature
        losses, variance, bend = [], 0.0, 0.0
        for group in groups:
            k = len(group.completions)
            start = torch.zeros(k, dtype=torch.float64, requires_grad=True)
            rewards = None if group.rewards is None else torch.tensor(group.rewards, dtype=torch.float64)
            loss = preference_loss(
                start, torch.zeros(k, dtype=torch.float64), objective=self.loss, group_size=k, rewards=rewards,
                **self.objective,
            )  # fmt: skip
            (slope,) = torch.autograd.grad(loss, start)
            tokens = torch.tensor([len(completion) for completion in group.completions], dtype=torch.float64)
            losses.append(float(loss.detach()))
            variance += float((slope**2 * tokens).sum()) * noise**2
            bend += (6 * self.betas["beta_pi"] * noise) ** 2 * float(tokens.max()) / 2
        n = len(losses)
        return sum(losses) / n, 1e-6 + 6 * math.sqrt(variance) / n + bend / n

    def most_mean_square(self, groups: Sequence[TokenGroup], mixed_precision: str) -> float:
        """The most that rounding alone can make of the mean squared log-ratio where policy equals reference."""
        noise = TOKEN_NOISE[mixed_precision] / self.temperature
        return (6 * noise) ** 2 * max(len(completion) for group in groups for completion in group.completions)


def _sums(metrics: dict[str, list[float]]) -> dict[str, tuple[float, int]]:
    return {name: (sum(values), len(values)) for name, values in metrics.items()}


def group_metrics(stats: LossStats, batch: Batch, beta_pi: float) -> dict[str, list[float]]:
    """Metrics by their usual names, one value a group; a group that prefers nothing has none of most."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    sizes = batch.group_size.tolist()
    implicit = stats.implicit_rewards.double().cpu().split(sizes)
    logps = stats.policy_logps.double().cpu().split(sizes)
    wanted = stats.q.double().cpu().split(sizes)
    # preferences are rewards of which the first completion has the higher
    targets = batch.rewards.cpu().split(sizes) if batch.rewards is not None else None
    for i, size in enumerate(sizes):
        found[MEAN_SQUARE].append(float((implicit[i] / beta_pi).square().mean()))
        found["target/entropy"].append(float(-torch.special.xlogy(wanted[i], wanted[i]).sum()))
        found["target/ess"].append(float(1 / wanted[i].square().sum()))
        target = targets[i] if targets is not None else -torch.arange(size).clamp(max=1).double()
        if size < 2 or bool((target == target[0]).all()):
            continue  # nothing is preferred here
        best, worst = int(target.argmax()), int(target.argmin())
        found["rewards/chosen"].append(float(implicit[i][best]))
        found["rewards/rejected"].append(float(implicit[i][worst]))
        found["rewards/margins"].append(float(implicit[i][best] - implicit[i][worst]))
        found["rewards/accuracies"].append(agreement(implicit[i], target))
        # so badly ranked that EXO's gradient has all but vanished (0.3 of what it was at the start, and falling)
        found["rewards/stuck"].append(float(implicit[i][best] - implicit[i][worst] < STUCK))
        found["logps/chosen"].append(float(logps[i][best]))
        found["logps/rejected"].append(float(logps[i][worst]))
    return found


def agreement(scores: Tensor, target: Tensor) -> float:
    """Share of the pairs that `target` ranks which `scores` rank alike; ties in the scores count one half."""
    ranked = target[:, None] > target[None, :]
    difference = scores[:, None] - scores[None, :]
    right = (difference > 0).double() + 0.5 * (difference == 0)
    return float(right[ranked].mean())


@contextmanager
def scoring(
    model: nn.Module, accelerator: Accelerator, packing: Packing, temperature: float
) -> Iterator[Callable[[Sequence[TokenGroup]], list[list[Tensor]]]]:
    """A function of a micro-batch: for each group the log-probs of each completion's tokens, fp64, (its tokens,).

    The model is left as it was; no random state moves.
    """
    head = CausalHead(model)

    @torch.no_grad()
    def of(part: Sequence[TokenGroup]) -> list[list[Tensor]]:
        batch = packing.collate(part).to(accelerator.device)
        with accelerator.autocast():
            scores = sharding.entered(model, partial(_logps, head, batch, temperature))
        found = list(of_completions(part, scores.double().cpu()))
        for group, rows in zip(part, found, strict=True):
            if not all(bool(row.isfinite().all()) for row in rows):
                name = getattr(model, "name_or_path", "") or type(model).__name__
                raise RunError(f"model {name}: expected finite log-probs; got others in row {group.line}")
        return found

    with evaluating(model):
        yield of


def _logps(head: CausalHead, batch: Batch, temperature: float) -> Tensor:  # (n,)
    rows = attention.rows(head, batch)
    return linear_token_logps(rows, head.weight, temperature=temperature, **attention.scored(batch), **head.options)


def token_logps(
    model: nn.Module, groups: Sequence[TokenGroup], accelerator: Accelerator, packing: Packing, temperature: float
) -> list[list[Tensor]]:
    """What `scoring` gives, for each group in their order; all of it by this process."""
    with scoring(model, accelerator, packing, temperature) as of:
        return packing.each(groups, of)


def shared_token_logps(
    model: nn.Module, groups: Sequence[TokenGroup], accelerator: Accelerator, packing: Packing, temperature: float
) -> list[list[Tensor]]:
    """The same, each micro-batch by one of the processes."""
    with scoring(model, accelerator, packing, temperature) as of:

        def listed(part: Sequence[TokenGroup]) -> list[list[list[float]]]:
            return [[row.tolist() for row in rows] for rows in of(part)]

        found = processes.each(groups, listed, packing, accelerator, together=sharding.is_sharded(model))
    return [[torch.tensor(row, dtype=torch.float64) for row in rows] for rows in found]


@torch.no_grad()
def evaluate(
    module: PolicyLoss, groups: Sequence[TokenGroup], accelerator: Accelerator, packing: Packing
) -> dict[str, float]:
    """Mean loss and metrics on held-out groups, and the 95% interval of the accuracy."""

    def of(part: Sequence[TokenGroup]) -> tuple[float, dict[str, list[float]]]:
        batch = packing.collate(part).to(accelerator.device)
        with accelerator.autocast():
            share, stats = sharding.entered(module, partial(module, batch, None))
        if not math.isfinite(float(share)):
            lines = ", ".join(str(group.line) for group in part[:10])
            raise RunError(f"evaluation: the loss is {float(share)}; held-out rows at lines {lines}")
        return float(share), group_metrics(stats, batch, module.betas["beta_pi"])

    with evaluating(module):
        parts = packing.micro_batches(groups)
        found = processes.shared(parts, of, accelerator, together=sharding.is_sharded(module))
    loss = 0.0
    values: dict[str, list[float]] = {}
    for share, metrics in found:
        loss += share
        for name, some in metrics.items():
            values.setdefault(name, []).extend(some)
    result = {"eval_loss": loss / len(groups)}
    result |= {f"eval_{name}": sum(some) / len(some) for name, some in values.items() if some}
    if accuracies := values.get("rewards/accuracies"):
        low, high = intervals.accuracy_interval(accuracies)
        result |= {"eval_accuracy_low": low, "eval_accuracy_high": high}
    return result
