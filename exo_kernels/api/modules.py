"""The losses as modules, for code that keeps its loss as one: options at construction, tensors at the call.

Nothing is computed here. A module has no parameters: the head's weight is passed in, so that it may be tied, sharded or
frozen as the model has it.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from exo_kernels import validation
from exo_kernels.api.hidden import fused_linear_dpo_loss, fused_linear_exo_loss
from exo_kernels.api.logits import fused_dpo_loss, fused_exo_loss


class _Loss(nn.Module):
    """One loss function with some of its options settled."""

    functions: dict[str, Callable[..., Any]]

    def __init__(self, *, objective: str = "exo", **options: Any) -> None:
        super().__init__()
        validation.choice("objective", objective, tuple(self.functions))
        self.function = self.functions[objective]
        parameters = inspect.signature(self.function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        for name in options:
            if name not in names:
                validation.fail(name, "an option: " + ", ".join(names), "an unknown one")
        self.objective, self.options = objective, options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in ({"objective": self.objective} | self.options).items())


class EXOLoss(_Loss):
    """`fused_exo_loss` (or with objective="dpo" `fused_dpo_loss`) as a module; the options are the function's.

    EXOLoss(group_size=4, beta_pi=0.1)(logits, labels, ref_logps, rewards=rewards): options given at the call come
    before those given here. ValueError for an option that the function does not have.
    """

    functions = {"exo": fused_exo_loss, "dpo": fused_dpo_loss}

    def forward(self, logits: Tensor, labels: Tensor, ref_logps: Tensor, **options: Any) -> Any:
        return self.function(logits, labels, ref_logps, **(self.options | options))


class LinearEXOLoss(_Loss):
    """`fused_linear_exo_loss` (or with objective="dpo" `fused_linear_dpo_loss`) as a module; the options are its own.

    LinearEXOLoss(group_size=4)(hidden, lm_head.weight, labels, ref_logps, rewards=rewards). Options as in EXOLoss.
    """

    functions = {"exo": fused_linear_exo_loss, "dpo": fused_linear_dpo_loss}

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
    ) -> Any:
        return self.function(hidden, weight, labels, ref_logps, **(self.options | options))
