"""Contenders from hidden states of other libraries, if installed, and torch's fused cross-entropy.

Only Liger has a preference loss (DPO, K = 2). The others have cross-entropy, whose values with reduction="none" are the
negative log-probs of the rows; the K-way loss is computed from these in torch.
Left out: peers that need a certain GPU or a model around them (QuACK, verl, TRL's and unsloth's trainers).
"""

import importlib

import torch
from torch import Tensor

from benchmarks import linear_workload as w
from benchmarks.linear_contenders import Contender, from_token_logps
from benchmarks.linear_workload import Problem
from benchmarks.logits_contenders import BETA_PI, exo
from benchmarks.logits_workload import IGNORE

LIGER, LIGER_TRITON, CCE = "Liger DPO", "Liger Triton", "cut-cross-entropy"
TORCH, TORCH_BEST = "torch linear CE", "torch linear CE, tuned"
TORCH_CHUNK = 1024  # rows; by default torch splits a batch into V / D chunks or more, and each has a cost
PORTABLE = (LIGER_TRITON, CCE)  # the peers that run on any GPU, besides torch.compile


def contenders(work: w.Workload, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Return the peers that can run here, and the reason for each of the others. Their tolerance is wider than ours."""
    tolerance = 1e-3 if work.dtype == torch.float32 else 0.25
    if work.objective != w.EXO:
        reason = missing("liger_kernel.chunked_loss")
        return ([], {LIGER: reason}) if reason else ([Contender(LIGER, _liger, tolerance, halves=True)], {})
    peers, absent = [], {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers.append(Contender(TORCH, _torch_padded, tolerance))
        peers.append(Contender(TORCH_BEST, from_token_logps(torch_token_logps), tolerance))
    else:
        absent[TORCH] = f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    if device == "cuda":  # both have only a Triton implementation
        for name, module, function in (
            (LIGER_TRITON, "liger_kernel.transformers.functional", _liger_triton),
            (CCE, "cut_cross_entropy", _cut_cross_entropy),
        ):
            reason = missing(module)
            if reason:
                absent[name] = reason
            else:
                peers.append(Contender(name, from_token_logps(function), tolerance))
    return peers, absent


def missing(module: str) -> str:
    """Return the reason why a module cannot be imported, or an empty string."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error})"
    return ""


def liger_dpo(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return Liger's loss and statistics, on a problem in halves. The reference model has the same head."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(
        ignore_index=IGNORE, beta=BETA_PI, compute_nll_loss=False, use_ref_model=problem.ref_hidden is not None
    )
    ref_weight = None if problem.ref_hidden is None else problem.weight.detach()
    return module(
        problem.weight, problem.hidden, problem.labels, ref_input=problem.ref_hidden, ref_weight=ref_weight
    )  # fmt: skip


def _liger(problem: Problem) -> Tensor:
    return liger_dpo(problem)[0]


def _torch_padded(problem: Problem) -> Tensor:
    """Return the EXO loss with default chunks. Rows without loss are ignored by their label, but still multiplied."""
    logps = torch_token_logps(problem.hidden.flatten(0, 1), problem.weight, problem.labels.flatten(), chunk=None)
    sums = logps.float().view(problem.labels.shape).sum(-1)
    return exo(sums - problem.ref_logps, problem.rewards, problem.group_size)


def torch_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = TORCH_CHUNK) -> Tensor:
    """Return the log-probs (n,) in the dtype of hidden, 0 for ignored rows."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if chunk is None else min(chunk, len(hidden)))
    return -torch.nn.functional.linear_cross_entropy(
        hidden, weight, labels, reduction="none", ignore_index=IGNORE, options=options
    )


def _liger_triton(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none", accum_dtype=torch.float32)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")
