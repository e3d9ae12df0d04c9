"""The losses as modules, for code that keeps its loss as one: options at construction, tensors at the call.

A module has no parameters: the head's weight is an argument, so that it may be tied, sharded or frozen.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from exo_kernels import validation
from exo_kernels.api import hidden as hidden_api
from exo_kernels.api import logits as logits_api
from exo_kernels.objectives import LossResult, ObjectiveName


class _Loss(nn.Module):
    """One loss function with some of its options set."""

    _functions: ClassVar[Mapping[str, Callable[..., LossResult]]]
    function: Callable[..., LossResult]
    objective: ObjectiveName
    options: dict[str, Any]

    def __init__(self, *, objective: str = "exo", **options: Any) -> None:
        super().__init__()
        validation.choice("objective", objective, tuple(self._functions))
        self.function = self._functions[objective]
        parameters = inspect.signature(self.function).parameters.values()
        names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        for name in options:
            if name not in names:
                validation.fail(name, "an option: " + ", ".join(names), "an unknown one")
        self.objective, self.options = cast(ObjectiveName, objective), options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in ({"objective": self.objective} | self.options).items())


class EXOLoss(_Loss):
    """`fused_exo_loss` as a module, or the fused loss of another `objective`; it takes the function's options.

    EXOLoss(group_size=4, beta_pi=0.1)(logits, labels, ref_logps, rewards=rewards): options of the call override those
    of the construction. ValueError for an option that the function does not have.
    """

    _functions: ClassVar[Mapping[str, Callable[..., LossResult]]] = logits_api.LOSSES

    def forward(self, logits: Tensor, labels: Tensor, ref_logps: Tensor, **options: Any) -> LossResult:
        return self.function(logits, labels, ref_logps, **(self.options | options))


class LinearEXOLoss(_Loss):
    """`fused_linear_exo_loss` as a module, or the fused loss of another `objective`; it takes the function's options.

    LinearEXOLoss(group_size=4)(hidden, lm_head.weight, labels, ref_logps, rewards=rewards). Options as in EXOLoss.
    """

    _functions: ClassVar[Mapping[str, Callable[..., LossResult]]] = hidden_api.LOSSES

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor | None = None, **options: Any
    ) -> LossResult:
        return self.function(hidden, weight, labels, ref_logps, **(self.options | options))
