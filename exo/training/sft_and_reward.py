"""Losses of supervised fine-tuning and of reward models."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo.cli import console
from exo.data.collate import Batch, Collator
from exo.data.text.tokenize import TokenizedExample
from exo.evaluation.metrics import accuracy_interval
from exo.models.lm_head import LMHead
from exo.models.logps import completion_hidden
from exo.models.reward_head import RewardHead
from exo.training.step import LossOutput, evaluate_batches
from exo_kernels import linear_token_logps


class PairLoss(nn.Module):
    """A reward model whose forward is the Bradley-Terry loss of pairs: rows 2i chosen, 2i + 1 rejected."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.rewards = RewardHead(model)

    def margins(self, batch: Batch) -> Tensor:  # (G,) positive if the right one wins
        chosen, rejected = self.rewards(batch).view(-1, 2).unbind(1)
        return chosen - rejected

    def forward(self, batch: Batch, count: int | None) -> Any:
        """Return the share of a batch in the mean over `count` pairs; the margins if it is None, for evaluation."""
        margins = self.margins(batch)
        if count is None:
            return margins
        right = (0.5 + 0.5 * margins.detach().sign().double()).sum()  # a tie counts one half
        loss = -nn.functional.logsigmoid(margins).sum() / count
        return LossOutput(loss, {"accuracy": (right, len(margins)), "margin": (margins.detach().sum(), len(margins))})


class LabelLoss(PairLoss):
    """The same for a classifier: the cross-entropy of two classes is that of the log-odds, signed by the label."""

    def margins(self, batch: Batch) -> Tensor:  # (G,)
        assert batch.label is not None
        return self.rewards(batch) * (2 * batch.label.float() - 1)


def evaluate(
    module: PairLoss, examples: Sequence[TokenizedExample], accelerator: Accelerator, collator: Collator
) -> dict[str, float]:
    """Return loss and accuracy on held-out examples, and the accuracy's 95% interval; {} without examples."""
    if not examples:
        return {}
    module.eval()
    results = evaluate_batches(module, examples, accelerator, collator, lambda margins, part: margins.tolist())
    margins = [margin for batch in results for margin in batch]
    right = [float(margin > 0) + 0.5 * (margin == 0) for margin in margins]
    low, high = accuracy_interval(right)
    accuracy = sum(right) / len(right)
    loss = float(-nn.functional.logsigmoid(torch.tensor(margins, dtype=torch.float64)).mean())
    console.log(
        f"held-out accuracy {100 * accuracy:.1f}% (95% interval {100 * low:.1f} to {100 * high:.1f}) on {len(right):,}"
    )
    return {"eval_loss": loss, "eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high}


class NextToken(nn.Module):
    """A causal LM whose forward is the cross-entropy of the completions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = LMHead(model)

    def forward(self, batch: Batch, num_tokens: int) -> LossOutput:
        rows = completion_hidden(self.head, batch)
        logps = linear_token_logps(rows, self.head.weight, **batch.loss_inputs(), **self.head.options)
        total = -logps.double().sum()
        return LossOutput(total / num_tokens, {"nats_per_token": (total.detach(), len(logps))})
