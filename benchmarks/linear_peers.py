"""Other libraries from hidden states, each where it is installed; and torch's own fused cross-entropy.

Only Liger has a preference loss (DPO, K = 2). The others give cross-entropy: with reduction="none" it is the negative
log-prob of every row, on which the K-way loss is built here in torch. They could do no less for EXO.
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
TORCH_CHUNK = 1024  # rows; by itself torch cuts any batch into V / D chunks and more, and pays for every one
PORTABLE = (LIGER_TRITON, CCE)  # of the peers that run on any GPU, besides torch.compile


def contenders(work: w.Workload, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run here, and why the others cannot. Their tolerance is wider, and their error is shown."""
    tolerance = 1e-3 if work.dtype == torch.float32 else 0.25
    if work.objective != w.EXO:
        reason = missing("liger_kernel.chunked_loss")
        return ([], {LIGER: reason}) if reason else ([Contender(LIGER, _liger, tolerance, halves=True)], {})
    found, absent = [], {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found.append(Contender(TORCH, _torch_padded, tolerance))
        found.append(Contender(TORCH_BEST, from_token_logps(torch_token_logps), tolerance))
    else:
        absent[TORCH] = f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    if device == "cuda":  # both are Triton, and have no other path
        for name, module, function in (
            (LIGER_TRITON, "liger_kernel.transformers.functional", _liger_triton),
            (CCE, "cut_cross_entropy", _cut_cross_entropy),
        ):
            reason = missing(module)
            if reason:
                absent[name] = reason
            else:
                found.append(Contender(name, from_token_logps(function), tolerance))
    return found, absent


def missing(module: str) -> str:
    """Why it cannot be imported; empty where it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error})"
    return ""


def liger_dpo(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Liger's loss and its by-products, on a problem in halves. The head is the reference model's too."""
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
    """As it comes: its own chunks, and rows without loss are ignored by their label, but multiplied all the same."""
    logps = torch_token_logps(problem.hidden.flatten(0, 1), problem.weight, problem.labels.flatten(), chunk=None)
    sums = logps.float().view(problem.labels.shape).sum(-1)
    return exo(sums - problem.ref_logps, problem.rewards, problem.group_size)


def torch_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = TORCH_CHUNK) -> Tensor:
    """Log-probs (n,) in the dtype of hidden, 0 where ignored."""
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
