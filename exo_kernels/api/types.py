"""Types of the public functions: their keywords, for overloads (the functions hold the defaults), and the losses."""

from typing import Literal, Protocol, TypedDict, Unpack, overload

import torch.distributed as dist
from torch import Tensor

from exo_kernels.dispatch import Impl
from exo_kernels.objectives import LossResult, LossStats

Reduction = Literal["mean", "sum", "none"]
Schedule = Literal["auto", "deferred", "group", "store", "recompute"]


class RowKeywords(TypedDict, total=False):
    """Keywords of every function on logits or hidden states."""

    temperature: float
    cu_seqlens: Tensor | None
    shift: bool | None
    ignore_index: int
    impl: Impl


class HeadKeywords(RowKeywords, total=False):
    """Keywords of every function on hidden states."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    process_group: dist.ProcessGroup | None
    memory_budget: int | str
    schedule: Schedule


class LossKeywords(RowKeywords, total=False):
    """Keywords of every fused loss."""

    group_size: int | Tensor
    rewards: Tensor | None
    beta_pi: float
    beta_r: float
    label_smoothing: float
    reduction: Reduction
    num_groups: int | float | Tensor | None
    compat: Literal["official"] | None


class LogitsLossKeywords(LossKeywords, total=False):
    """Keywords of the losses on logits."""

    inplace_backward: bool


class HiddenLossKeywords(LossKeywords, HeadKeywords, total=False):
    """Keywords of the losses on hidden states."""

    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None


class LogitsLoss(Protocol):
    """A loss on logits: the loss, or with return_stats=True the loss and its statistics."""

    __name__: str

    @overload
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        return_stats: Literal[False] = False,
        **options: Unpack[LogitsLossKeywords],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        return_stats: Literal[True],
        **options: Unpack[LogitsLossKeywords],
    ) -> tuple[Tensor, LossStats]: ...
    @overload
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        return_stats: bool,
        **options: Unpack[LogitsLossKeywords],
    ) -> LossResult: ...


class HiddenLoss(Protocol):
    """A loss on hidden states: the loss, or with return_stats=True the loss and its statistics."""

    __name__: str

    @overload
    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        return_stats: Literal[False] = False,
        **options: Unpack[HiddenLossKeywords],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        return_stats: Literal[True],
        **options: Unpack[HiddenLossKeywords],
    ) -> tuple[Tensor, LossStats]: ...
    @overload
    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        return_stats: bool,
        **options: Unpack[HiddenLossKeywords],
    ) -> LossResult: ...
