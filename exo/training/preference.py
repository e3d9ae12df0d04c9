"""The preference loss as a module, the first loss that theory predicts, and evaluation on held-out examples.

The loss runs inside the module's forward, so that gradient synchronization sees it.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo.cli.errors import RunError
from exo.data.collate import Batch, Collator
from exo.data.text.tokenize import TokenizedExample
from exo.evaluation import metrics as evaluation_metrics
from exo.models import lora
from exo.models.lm_head import LMHead, eval_mode
from exo.models.logps import TOKEN_NOISE, completion_hidden
from exo.training.metrics import preference_metrics, sums
from exo.training.step import LossOutput, evaluate_batches
from exo_kernels import LinearEXOLoss, LossStats, preference_loss


class PreferenceLoss(nn.Module):
    """A causal LM whose forward is the alignment loss of a batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str,  # an objective of exo_kernels
        beta_pi: float,
        beta_r: float,
        label_smoothing: float,
        temperature: float,
        reference: nn.Module | None = None,
    ) -> None:
        """`reference` scores every batch: another model, or the one below the policy's adapter.

        Without it the batches hold its log-probs.
        """
        super().__init__()
        self.model = model
        self.head = LMHead(model)
        below = reference is not None and reference.get_output_embeddings() is self.head.head  # type: ignore[operator]
        self.reference = None if reference is None or below else reference.requires_grad_(False)
        self.reference_head = self.head if below else None if reference is None else LMHead(reference)
        self.options: dict[str, Any] = {"beta_pi": beta_pi, "beta_r": beta_r, "label_smoothing": label_smoothing}
        self.loss = LinearEXOLoss(objective=loss, temperature=temperature, return_stats=True, **self.options)
        self.beta_pi, self.temperature = beta_pi, temperature

    def train(self, mode: bool = True) -> "PreferenceLoss":
        """Set the mode of the policy; the reference stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def losses(self, batch: Batch, **reduction: Any) -> tuple[Tensor, LossStats]:
        inputs = self._reference(batch) | batch.loss_inputs() | self.head.options
        inputs |= {"group_size": batch.group_size, "rewards": batch.rewards}
        loss, stats = self.loss(completion_hidden(self.head, batch), self.head.weight, **inputs, **reduction)
        return loss, stats

    def _reference(self, batch: Batch) -> dict[str, Any]:
        if self.reference_head is None:
            return {"ref_logps": batch.required_ref_logps()}
        head = self.reference_head
        below = head is self.head  # the reference shares the policy's modules and their mode
        with torch.no_grad(), lora.disabled(self.model) if below else nullcontext():
            with eval_mode(self.model) if below else nullcontext():
                rows = completion_hidden(head, batch)
        if head is self.head:
            return {"ref_hidden": rows}
        return {"ref_hidden": rows, "ref_weight": head.weight, "ref_bias": head.options["bias"]}

    def forward(self, batch: Batch, num_groups: int | None) -> Any:
        """Return the share of a batch in the mean over `num_groups`; the sum and its stats if it is None."""
        if num_groups is None:
            return self.losses(batch, reduction="sum")
        loss, stats = self.losses(batch, num_groups=num_groups)
        return LossOutput(loss, sums(preference_metrics(stats, batch, self.beta_pi)))

    def expected_first_loss(self, examples: Sequence[TokenizedExample], mixed_precision: str) -> tuple[float, float]:
        """Return the mean loss where policy equals reference, and six sigma of rounding, to second order."""
        noise = TOKEN_NOISE[mixed_precision] / self.temperature
        losses, variance, bend = [], 0.0, 0.0
        for example in examples:
            k = len(example.completions)
            start = torch.zeros(k, dtype=torch.float64, requires_grad=True)
            rewards = None if example.rewards is None else torch.tensor(example.rewards, dtype=torch.float64)
            options = self.options | {"group_size": k, "rewards": rewards}
            loss = preference_loss(start, torch.zeros_like(start), objective=self.loss.objective, **options)
            (slope,) = torch.autograd.grad(loss, start)
            tokens = torch.tensor([len(completion) for completion in example.completions], dtype=torch.float64)
            losses.append(float(loss.detach()))
            variance += float((slope**2 * tokens).sum()) * noise**2
            bend += (6 * self.beta_pi * noise) ** 2 * float(tokens.max()) / 2
        n = len(losses)
        return sum(losses) / n, 1e-6 + 6 * math.sqrt(variance) / n + bend / n

    def max_rounding_error(self, examples: Sequence[TokenizedExample], mixed_precision: str) -> float:
        """Return the largest mean squared log-ratio that rounding explains where policy equals reference."""
        noise = TOKEN_NOISE[mixed_precision] / self.temperature
        return (6 * noise) ** 2 * max(len(completion) for example in examples for completion in example.completions)


def evaluate(
    module: PreferenceLoss, examples: Sequence[TokenizedExample], accelerator: Accelerator, collator: Collator
) -> dict[str, float]:
    """Return the mean loss and metrics on held-out examples, and the 95% interval of the accuracy.

    RunError if a loss is not finite.
    """

    def reduce(output: Any, part: Sequence[TokenizedExample]) -> tuple[float, dict[str, list[float]]]:
        total, stats = output
        if not math.isfinite(float(total)):
            lines = ", ".join(str(example.line) for example in part[:10])
            raise RunError(f"evaluation: the loss is {float(total)}; held-out rows at lines {lines}")
        batch = collator.collate(part)
        return float(total), preference_metrics(stats, batch, module.beta_pi)

    with eval_mode(module):
        results = evaluate_batches(module, examples, accelerator, collator, reduce)
    values: dict[str, list[float]] = {}
    for _, metrics in results:
        for name, some in metrics.items():
            values.setdefault(name, []).extend(some)
    result = {"eval_loss": sum(total for total, _ in results) / len(examples)}
    result |= {f"eval_{name}": sum(some) / len(some) for name, some in values.items() if some}
    if accuracies := values.get("rewards/accuracies"):
        low, high = evaluation_metrics.accuracy_interval(accuracies)
        result |= {"eval_accuracy_low": low, "eval_accuracy_high": high}
    return result
