"""The three matmuls of the language model's head.

Products of 16-bit operands come out in fp32. On CUDA and ROCm the vendor's matmul does that (and, from torch 2.11 on,
adds to an fp32 sum); elsewhere the weight is converted block by block and multiplied in fp32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from exo_kernels.numerics import accumulator

PADDING = 16  # elements: rows of a chunk are padded to a multiple, so that each begins at an aligned address
EXACT_CPU, EXACT_GPU = 2**22, 2**25  # bytes at a time for exact logits: in cache, or in few launches
BLOCK_BYTES = 2**23  # of a 16-bit weight in fp32, if the device cannot multiply it directly


def multiplies_16_bits(device: torch.device) -> bool:
    """Return True if torch.mm has an fp32 result for 16-bit operands there (`out_dtype`)."""
    return device.type == "cuda"


def gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a chunk's gradients, which the two later matmuls take."""
    return dtype if multiplies_16_bits(device) else accumulator(dtype)


def padded(vocab: int) -> int:
    return -(-vocab // PADDING) * PADDING


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a 16-bit weight in fp32, block by block."""
    step = max(1, BLOCK_BYTES // max(weight.shape[1] * 4, 1))
    for i in range(0, len(weight), step):
        rows = slice(i, min(i + step, len(weight)))
        yield rows, weight[rows].float()


def logits(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D), same dtype
    out: Tensor,  # (M, V) accumulators
) -> None:
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif multiplies_16_bits(hidden.device):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.float()
        for columns, block in _blocks(weight):
            torch.mm(hidden, block.t(), out=out[:, columns])


def exact_logits(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    rows: Tensor,  # (M,) int64, of the weight; clamped if out of range
) -> Tensor:  # (M,) float64
    """Return one logit per row, as exact as the operands: the error of an fp32 matmul is too large for log-ratios.

    Products of 16-bit numbers are exact in fp32, those of fp32 numbers in fp64; the sums are fp64.
    """
    wide = torch.float32 if hidden.dtype.itemsize == 2 else torch.float64
    step = max(1, (EXACT_GPU if hidden.device.type == "cuda" else EXACT_CPU) // (24 * hidden.shape[1]))
    rows = rows.clamp(0, len(weight) - 1)
    sums = [
        (hidden[i : i + step].to(wide) * weight[rows[i : i + step]].to(wide)).sum(-1, dtype=torch.float64)
        for i in range(0, len(hidden), step)
    ]
    return torch.cat(sums)


def hidden_gradient(
    d: Tensor,  # (M, V), in gradient_dtype
    weight: Tensor,  # (V, D)
) -> Tensor:  # (M, D) accumulators
    if d.dtype == accumulator(weight.dtype) == weight.dtype:
        return torch.mm(d, weight)
    if d.dtype == weight.dtype:
        return torch.mm(d, weight, out_dtype=torch.float32)
    total = d.new_zeros(len(d), weight.shape[1])
    for columns, block in _blocks(weight):
        total.addmm_(d[:, columns], block)
    return total


def add_weight_gradient_(
    total: Tensor,  # (V, D) accumulators
    d: Tensor,  # (M, V), in gradient_dtype
    hidden: Tensor,  # (M, D), in gradient_dtype
    first: bool,  # total holds nothing yet
) -> None:
    if d.dtype == total.dtype:
        torch.mm(d.t(), hidden, out=total) if first else total.addmm_(d.t(), hidden)
    elif first:
        torch.mm(d.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, d.t(), hidden, out_dtype=total.dtype, out=total)
