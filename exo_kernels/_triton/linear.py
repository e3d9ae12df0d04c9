"""Scores and gradients of a chunk of rows between two matmuls: the functions of chunked/linear.py.

One program per row. Chunks are buffers that schedules/chunks.py allocates, so rows begin at aligned addresses and are
padded to full accesses; padding is read and discarded. The first kernel reads the chunk once, the second reads it and
writes the gradient, in place or in 16 bits beside it. tests/kernels/test_aot.py checks the machine code for all this.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exo_kernels._triton.common import LOG2E, WIDEST_ACCESS, accumulate, base_of, launch_options, on_device, rebase
from exo_kernels.numerics import LogitTransform

# Sizes change from call to call and tell the compiler nothing. And on AMD, triton addresses tensors below 2 GiB in a
# way that loses the alignment of their rows, and would load element by element.
RUNTIME = ["a", "out", "V", "M", "stride", "out_stride"]


@triton.jit
def _tanh(x):
    """Return tanh: fp32 by e^(-2|x|), below 5/8 by a series; fp64 by e^(2|x|) - 1, whose lost digits log restores."""
    a = tl.abs(x)
    if x.dtype == tl.float64:
        y = 2.0 * tl.where(a > 40.0, 40.0, a)  # no infinity, but still NaN
        w = tl.exp(y)
        less = tl.where(w == 1.0, y, (w - 1.0) * y / tl.where(w == 1.0, 1.0, tl.log(w)))
        t = less / (less + 2.0)
        return tl.where(x < 0, -t, t)
    w = tl.exp2(1.0 - a * (2 * LOG2E))  # twice the power
    root = tl.rsqrt(1.0 + 0.5 * w)  # about as exact as a division, and five instructions an element cheaper
    t = 1.0 - w * (root * root)
    s = x * x
    series = -5.70498872745e-3 * s + 2.06390887954e-2
    series = series * s - 5.37397155531e-2
    series = series * s + 1.33314422036e-1
    series = series * s - 3.33332819422e-1
    return tl.where(a < 0.625, x + x * (s * series), tl.where(x < 0, -t, t))


@triton.jit
def _before_outer(x, bias, columns, exists, inner, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Return cap(a + bias): logits without the factor `outer`."""
    if BIAS:
        x += tl.load(bias + columns, mask=exists, other=0.0).to(x.dtype)
    if CAPPED:
        x = _tanh(x * inner)
    return x


@triton.jit
def _padded(V, UNIT: tl.constexpr):
    return (V + UNIT - 1) // UNIT * UNIT


@triton.jit(do_not_specialize=RUNTIME)
def chunk_logps_kernel(
    a, bias, targets,
    stats, entropies,
    V, M, stride,
    outer: tl.float64, inner: tl.float64,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
    SIZE: tl.constexpr, UNIT: tl.constexpr,  # bytes an element, elements an access
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc = a.dtype.element_ty
    outer2 = tl.full((), outer * LOG2E, acc)
    outer = tl.full((), outer, acc)
    inner = tl.full((), inner, acc)
    row = tl.program_id(0)
    first = tl.multiple_of(a + row.to(tl.int64) * stride, UNIT * SIZE)
    m = tl.full((LANES,), float("-inf"), acc)
    total = tl.zeros((LANES,), acc)
    weighted = tl.zeros((LANES,), acc)
    body = _padded(V, UNIT)
    for start in range(0, body, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = columns < body
        x = tl.load(first + columns, mask=exists)
        x = _before_outer(x, bias, columns, exists, inner, BIAS, CAPPED)
        x = tl.where(columns < V, x, float("-inf"))
        m, total, weighted = accumulate(x, m, total, weighted, outer, outer2, UNIT, ENTROPY)
    top = tl.max(m, 0)
    total, weighted = rebase(m, base_of(top), total, weighted, outer, outer2, ENTROPY)
    total = tl.sum(total, 0)
    log_total = tl.where(total > 0, tl.log(total), total)  # total = 0 where all is -inf; NaN stays NaN

    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    z = tl.load(a + row.to(tl.int64) * stride + target, mask=inside, other=0.0)
    z = _before_outer(z, bias, target, inside, inner, BIAS, CAPPED)
    tl.store(stats + row, tl.where(inside, z * outer, float("nan")))
    tl.store(stats + M + row, top * outer)
    tl.store(stats + 2 * M + row, log_total)
    if ENTROPY:
        tl.store(entropies + row, tl.where(total == 0, 0.0, log_total - tl.sum(weighted, 0) / total))


@triton.jit(do_not_specialize=RUNTIME)
def chunk_gradient_kernel(
    out, a, bias, targets,
    stats, entropies, g, h,
    V, M, stride, out_stride,
    outer: tl.float64, inner: tl.float64,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, WEIGHTED: tl.constexpr,
    SIZE: tl.constexpr, OUT_SIZE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc = a.dtype.element_ty
    outer = tl.full((), outer, acc)
    inner = tl.full((), inner, acc)
    row = tl.program_id(0)
    first = tl.multiple_of(a + row.to(tl.int64) * stride, UNIT * SIZE)
    out_first = tl.multiple_of(out + row.to(tl.int64) * out_stride, UNIT * OUT_SIZE)
    target = tl.load(targets + row)
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)  # 32 bits to compare with, no wrap
    z = tl.load(stats + row)
    top = tl.load(stats + M + row)
    log_total = tl.load(stats + 2 * M + row)
    nothing = z + top + log_total != z + top + log_total  # no log-prob: zeros
    if WEIGHTED:
        weight = tl.load(g + row).to(acc)
        entropy_weight = tl.load(h + row).to(acc)
        entropy = tl.load(entropies + row)
    body = _padded(V, UNIT)
    for start in range(0, body, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        exists = columns < body
        x = tl.load(first + columns, mask=exists)
        x = _before_outer(x, bias, columns, exists, inner, BIAS, CAPPED)
        log_p = (x * outer - top) - log_total
        p = tl.exp2(log_p * LOG2E)
        hit = columns == target
        if WEIGHTED:
            d = p * (weight + entropy_weight * (tl.where(p > 0, log_p, 0.0) + entropy)) - tl.where(hit, weight, 0.0)
        else:
            d = p - tl.where(hit, 1.0, 0.0)
        if CAPPED:
            d *= 1.0 - x * x
        tl.store(out_first + columns, tl.where(nothing, 0.0, d), mask=exists)


def chunk_logps(
    a: Tensor,  # (M, V) accumulators, rows padded to full accesses
    bias: Tensor | None,  # (V,), padded likewise
    targets: Tensor,  # (M,) int64
    transform: LogitTransform,
    entropy: bool,
) -> tuple[Tensor, Tensor]:  # (3, M), (M,) or (0,)
    """Return every row's target logit (NaN without one), top logit and log sum above it; and the entropies.

    A row of nothing but -inf has the top -inf, and 0 above it; chunk_gradient expects 0 for both.
    """
    n, vocab = a.shape
    stats = a.new_empty(3, n)
    entropies = a.new_empty(n if entropy else 0)
    with on_device(a.device):
        chunk_logps_kernel[(n,)](
            a, a if bias is None else bias, targets,
            stats, entropies,
            vocab, n, a.stride(0),
            transform.outer, transform.inner,
            BIAS=bias is not None, CAPPED=transform.capped, ENTROPY=entropy,
            **launch_options(a, WIDEST_ACCESS // a.element_size()),
        )  # fmt: skip
    return stats, entropies


def chunk_gradient(
    out: Tensor,  # (M, V): a itself, or of another dtype
    a: Tensor,  # (M, V) accumulators
    bias: Tensor | None,
    targets: Tensor,  # (M,) int64
    transform: LogitTransform,
    stats: Tensor,  # (3, M)
    entropies: Tensor | None,  # (M,)
    g: Tensor | None,  # (M,)
    h: Tensor | None,  # (M,)
) -> None:
    """Write the gradient of the negative log-probs up to a factor per row; or that of - g log p(target) - h H."""
    n, vocab = a.shape
    unit = WIDEST_ACCESS // min(a.element_size(), out.element_size())  # fills an access in the narrower dtype
    with on_device(a.device):
        chunk_gradient_kernel[(n,)](
            out, a, a if bias is None else bias, targets,
            stats, stats if entropies is None else entropies, stats if g is None else g, stats if h is None else h,
            vocab, n, a.stride(0), out.stride(0),
            transform.outer, transform.inner,
            BIAS=bias is not None, CAPPED=transform.capped, WEIGHTED=h is not None,
            OUT_SIZE=out.element_size(), **launch_options(a, unit, lanes=False),
        )  # fmt: skip


def chunk_logps_and_gradient(
    out: Tensor, a: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
) -> Tensor:  # (3, M)
    """Return the stats of `chunk_logps`; write the gradient of `chunk_gradient` to `out`."""
    stats, _ = chunk_logps(a, bias, targets, transform, False)
    stats[1].masked_fill_(stats[1] == -torch.inf, 0.0)
    chunk_gradient(out, a, bias, targets, transform, stats, None, None, None)
    return stats
