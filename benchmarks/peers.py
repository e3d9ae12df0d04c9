"""Other libraries that compute log-probs or losses from hidden states: what each can do, and how it is called.

Most have cross-entropy, whose values for single rows are negative log-probs; the loss on top of them is torch.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.logits import BETA_PI, IGNORE

TRL, TRL_METRICS = "TRL chunked_logprob", "TRL chunked_logprob, metrics"
LIGER, LIGER_TRITON = "Liger DPO", "Liger Triton CE"
LIGER_CUTE, LIGER_CUTE_ROWS = "Liger CuTe CE", "Liger CuTe CE by row"
CCE, QUACK = "cut-cross-entropy", "QuACK CE"
TORCH, TORCH_TUNED = "torch linear CE", "torch linear CE, tuned"
TORCH_CHUNK = 1024  # rows; by default torch splits a batch into V / D chunks or more, and each has a cost
TRL_CHUNK = 32768  # columns, as its trainers set it
TRL_OUTPUTS = ("entropy", "mean_logits", "is_top1")  # what its DPO trainer asks for

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]  # (n, D), (V, D), (n,) -> (n,)


@dataclass(frozen=True)
class Peer:
    """How a library takes part. `token_logps` serves every objective, `loss` a problem of linear.py."""

    module: str
    package: str  # to install
    token_logps: TokenLogps | None = None
    loss: Callable[[Any], Tensor] | None = None
    pairs: bool = False  # a DPO loss of pairs, K = 2
    sum_only: bool = False  # gives the sum over the rows alone: no log-probs of sequences
    gpu_only: bool = False

    def cannot(self, objective: str, device: str) -> str:
        """Return the reason why it cannot take part, or an empty string."""
        if self.pairs and objective != "DPO":
            return "cannot: DPO on pairs only (K = 2)"
        if self.sum_only and objective != "log-probs":
            return "cannot: gives the sum over all rows, no log-probs of sequences"
        if self.gpu_only and device == "cpu":
            return "cannot: needs a GPU"
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            return f"not installed ({error}): pip install '{self.package}'"
        except Exception as error:  # a version that does not fit, in a module imported on first use
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.module == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"cannot: torch {torch.__version__} has no LinearCrossEntropyOptions"
        return ""


def _trl(hidden: Tensor, weight: Tensor, labels: Tensor, outputs: tuple[str, ...] = ()) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, outputs)[0]


def _torch_padded(p: Any) -> Tensor:
    """Return the loss with default chunks. Rows without loss are ignored by their label, but still multiplied."""
    from benchmarks.linear import objective

    def logps(hidden: Tensor) -> Tensor:
        values = torch_token_logps(hidden.flatten(0, 1), p.weight, p.labels.flatten(), chunk=None)
        return values.float().view(p.labels.shape)

    with torch.no_grad():
        ref_logps = p.ref_logps if p.ref_hidden is None else logps(p.ref_hidden)
    return objective(p, logps(p.hidden), ref_logps)


def torch_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = TORCH_CHUNK) -> Tensor:
    """Return the log-probs (n,) in the dtype of hidden, 0 for ignored rows."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if chunk is None else min(chunk, len(hidden)))
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, labels, reduction="none", ignore_index=IGNORE, options=options
    )


def liger_dpo(p: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return Liger's loss and statistics, on a problem in halves. The reference model has the same head."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA_PI, compute_nll_loss=False, use_ref_model=True)
    return module(p.weight, p.hidden, p.labels, ref_input=p.ref_hidden, ref_weight=p.weight.detach())


def _liger_triton(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none", accum_dtype=torch.float32)


def _liger_cute_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
        LigerFusedScaledCrossEntropySM90Function as function,
    )

    return -function.apply(hidden, weight, labels)


def _liger_cute(p: Any) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        liger_fused_linear_cross_entropy_sm90 as function,
    )

    mask = p.labels != IGNORE
    return -function(p.hidden[mask], p.weight, p.labels[mask], IGNORE, "sum") / p.case.rows_with_loss


def _quack(p: Any) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as function

    mask = p.labels != IGNORE
    return -function(p.hidden[mask], p.weight, p.labels[mask], chunk_size=4096, reduction="sum") / p.case.rows_with_loss


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


_LIGER_OPS = "liger_kernel.ops.cutedsl.ops"
PEERS = {
    TORCH: Peer("torch", "torch>=2.13", loss=_torch_padded),
    TORCH_TUNED: Peer("torch", "torch>=2.13", torch_token_logps),
    TRL: Peer("trl.kernels", "trl>=1.16", _trl),
    TRL_METRICS: Peer("trl.kernels", "trl>=1.16", partial(_trl, outputs=TRL_OUTPUTS)),
    LIGER: Peer("liger_kernel.chunked_loss", "liger-kernel", loss=lambda p: liger_dpo(p)[0], pairs=True),
    LIGER_TRITON: Peer("liger_kernel.transformers.functional", "liger-kernel", _liger_triton, gpu_only=True),
    LIGER_CUTE: Peer(
        f"{_LIGER_OPS}.fused_linear_cross_entropy_sm90", "liger-kernel", loss=_liger_cute, sum_only=True, gpu_only=True
    ),
    LIGER_CUTE_ROWS: Peer(
        f"{_LIGER_OPS}.fused_scaled_cross_entropy_sm90", "liger-kernel", _liger_cute_rows, gpu_only=True
    ),
    CCE: Peer("cut_cross_entropy", "cut-cross-entropy", _cut_cross_entropy, gpu_only=True),
    QUACK: Peer("quack.linear_cross_entropy", "quack-kernels", loss=_quack, sum_only=True, gpu_only=True),
}
