"""Token pass and its backward pass on logits: one program per row; each row with loss is read once, others never.

Forward: an online log-sum-exp that takes each block's maximum first, so that it costs one exponential per element. Each
lane (thread) has a separate maximum and sum, combined after the last block, so the loop has no barrier. A row's maximum
and the log of the sum above it are stored apart: their sum would round away a common offset of the logits. Backward:
one read and one write of the rows with loss, zeros elsewhere.

A row is an aligned body and two edges. The body begins at the first 16-byte boundary, so its accesses are 128 bits wide
for every vocabulary (50257 is odd, so its rows start anywhere) and every slice. tests/kernels/test_aot.py checks the
machine code for all this.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exo_kernels._triton.common import LOG2E, WIDEST_ACCESS, accumulate, base_of, launch_options, on_device, rebase
from exo_kernels.numerics import accumulator

# Not worth separate kernels: UNIT says all that matters about alignment. And on AMD, triton addresses tensors below
# 2 GiB in a way that loses the alignment, and would load element by element.
RUNTIME = ["grad", "logits", "T", "V", "R", "ignore_index", "stride_n", "stride_t", "stride_v"]
RUNTIME += ["grad_stride_n", "grad_stride_t", "grad_stride_v"]


@triton.jit
def _split_row(
    first,  # pointer to the row's first element
    V,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Return the length of the head before the first boundary of an access, and of the body in full accesses."""
    WIDTH: tl.constexpr = UNIT * SIZE
    head = (WIDTH - first.to(tl.int64) % WIDTH) % WIDTH // SIZE
    head = tl.minimum(head, V).to(tl.int32)
    return head, (V - head) // UNIT * UNIT


@triton.jit
def _offset(columns, stride_v, UNIT: tl.constexpr):
    """Return the offset of columns in their row: adjacent unless an access is a single element."""
    if UNIT == 1:
        columns = columns.to(tl.int64) * stride_v
    return columns


@triton.jit
def _edge_columns(head, body, V, UNIT: tl.constexpr, LANES: tl.constexpr):
    """Return at most one column per lane, those of head and tail (both shorter than an access), and which exist."""
    lane = tl.arange(0, LANES)
    columns = tl.where(lane < UNIT, lane, head + body + lane - UNIT)
    return columns, tl.where(lane < UNIT, lane < head, columns < V)


@triton.jit(do_not_specialize=RUNTIME)
def token_logps_kernel(
    logits, targets,
    logps, saved, entropies,
    T, V, R,
    stride_n, stride_t, stride_v,
    scale: tl.float64,  # 1 / temperature
    ignore_index: tl.int64,
    SIZE: tl.constexpr, UNIT: tl.constexpr,  # bytes an element, elements an access
    LANES: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    acc = logps.dtype.element_ty
    scale2 = tl.full((), scale * LOG2E, acc)
    scale = tl.full((), scale, acc)
    row = tl.program_id(0)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(logps + row, 0.0)
        tl.store(saved + row, 0.0)
        tl.store(saved + R + row, 0.0)
        if ENTROPY:
            tl.store(entropies + row, 0.0)
        return
    first = logits + (row // T).to(tl.int64) * stride_n + (row % T).to(tl.int64) * stride_t
    head, body = _split_row(first, V, SIZE, UNIT)

    edges, exist = _edge_columns(head, body, V, UNIT, LANES)
    m = tl.load(first + _offset(edges, stride_v, UNIT), mask=exist, other=float("-inf")).to(acc)
    total = tl.exp2((m - base_of(m)) * scale2)  # 1, or 0 where there is nothing
    weighted = tl.zeros((LANES,), acc)
    aligned = tl.multiple_of(first + _offset(head, stride_v, UNIT), UNIT * SIZE)
    for start in range(0, body, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(aligned + _offset(columns, stride_v, UNIT), mask=columns < body, other=float("-inf")).to(acc)
        m, total, weighted = accumulate(x, m, total, weighted, scale, scale2, UNIT, ENTROPY)

    top = base_of(tl.max(m, 0))  # 0 in a row of -inf: log-prob -inf, softmax 0, entropy 0
    total, weighted = rebase(m, top, total, weighted, scale, scale2, ENTROPY)
    total = tl.sum(total, 0)
    log_total = tl.where(total > 0, tl.log(total), total)  # total = 0 there, and NaN stays NaN
    inside = (target >= 0) & (target < V)
    z = tl.load(first + _offset(target, stride_v, UNIT), mask=inside, other=0.0).to(acc)
    tl.store(logps + row, tl.where(inside, (z - top) * scale - log_total, float("nan")))
    tl.store(saved + row, top)
    tl.store(saved + R + row, log_total)
    if ENTROPY:
        tl.store(entropies + row, tl.where(total == 0, 0.0, log_total - tl.sum(weighted, 0) / total))


@triton.jit
def _gradient(x, hit, m, log_total, g, h, entropy, scale, scale2, ENTROPY: tl.constexpr):
    """Return g (onehot - p) - h p (log p + H), with g and h already divided by the temperature."""
    onehot = tl.where(hit, g, 0.0)
    if ENTROPY:
        log_p = (x - m) * scale - log_total
        p = tl.exp2(log_p * LOG2E)
        return onehot - p * (g + h * (tl.where(p > 0, log_p, 0.0) + entropy))
    return onehot - g * tl.exp2((x - m) * scale2 - log_total * LOG2E)


@triton.jit(do_not_specialize=RUNTIME)
def token_logps_backward_kernel(
    grad, logits, targets,
    grad_logps, grad_entropies, entropies, saved,
    T, V, R,
    grad_stride_n, grad_stride_t, grad_stride_v,
    stride_n, stride_t, stride_v,
    scale: tl.float64,  # 1 / temperature
    ignore_index: tl.int64,
    SIZE: tl.constexpr, UNIT: tl.constexpr, SAME_ALIGNMENT: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    acc = saved.dtype.element_ty
    scale2 = tl.full((), scale * LOG2E, acc)
    scale = tl.full((), scale, acc)
    row = tl.program_id(0)
    n = (row // T).to(tl.int64)
    t = (row % T).to(tl.int64)
    target = tl.load(targets + row)
    g = tl.load(grad_logps + row).to(acc) * scale
    h = tl.zeros((), acc)
    entropy = h
    if ENTROPY:
        h = tl.load(grad_entropies + row).to(acc) * scale
        entropy = tl.load(entropies + row)
    out = grad + n * grad_stride_n + t * grad_stride_t
    head, body = _split_row(out, V, SIZE, UNIT)
    edges, exist = _edge_columns(head, body, V, UNIT, LANES)
    out_aligned = tl.multiple_of(out + _offset(head, grad_stride_v, UNIT), UNIT * SIZE)

    if (target == ignore_index) | ((g == 0) & (h == 0)):
        zeros = tl.zeros((LANES,), grad.dtype.element_ty)
        tl.store(out + _offset(edges, grad_stride_v, UNIT), zeros, mask=exist)
        for start in range(0, body, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            more_zeros = tl.zeros((BLOCK,), grad.dtype.element_ty)
            tl.store(out_aligned + _offset(columns, grad_stride_v, UNIT), more_zeros, mask=columns < body)
        return

    first = logits + n * stride_n + t * stride_t
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)  # 32 bits to compare with, no wrap
    m = tl.load(saved + row)
    log_total = tl.load(saved + R + row)
    x = tl.load(first + _offset(edges, stride_v, UNIT), mask=exist, other=0.0).to(acc)
    dx = _gradient(x, edges == target, m, log_total, g, h, entropy, scale, scale2, ENTROPY)
    tl.store(out + _offset(edges, grad_stride_v, UNIT), dx, mask=exist)
    aligned = first + _offset(head, stride_v, UNIT)
    if SAME_ALIGNMENT:
        aligned = tl.multiple_of(aligned, UNIT * SIZE)
    for start in range(0, body, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(aligned + _offset(columns, stride_v, UNIT), mask=columns < body, other=0.0).to(acc)
        dz = _gradient(z, columns == target - head, m, log_total, g, h, entropy, scale, scale2, ENTROPY)
        tl.store(out_aligned + _offset(columns, grad_stride_v, UNIT), dz, mask=columns < body)


def token_logps(
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, T), (N, T) or (0,), (2, N, T)
    """Return log-probs of the targets, entropies if requested, and each row's maximum and log-sum above it."""
    dtype = accumulator(logits.dtype)
    logps = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    entropies = torch.empty(targets.shape if entropy else (0,), dtype=dtype, device=logits.device)
    saved = torch.empty((2, *targets.shape), dtype=dtype, device=logits.device)
    n_rows = targets.numel()
    if n_rows:
        with on_device(logits.device):
            token_logps_kernel[(n_rows,)](
                logits, targets.contiguous(),
                logps, saved, entropies,
                logits.shape[1], logits.shape[2], n_rows,
                *logits.stride(),
                1.0 / temperature, ignore_index,
                ENTROPY=entropy, **launch_options(logits, _unit(logits, logits)),
            )  # fmt: skip
    return logps, entropies, saved


def new_gradient(logits: Tensor) -> Tensor:
    """Return an uninitialised gradient: the backward kernel writes every element."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def token_logps_backward(
    grad: Tensor,  # (N, T, V), every element is written; may be the logits themselves
    grad_logps: Tensor,  # (N, T)
    grad_entropies: Tensor | None,  # (N, T)
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    entropies: Tensor,  # (N, T), or (0,)
    saved: Tensor,  # (2, N, T)
    temperature: float,
    ignore_index: int,
) -> None:
    """Fill grad with (g (onehot(target) - p) - h p (log p + H)) / temperature.

    g and h are the gradients of the row's log-probability and of its entropy H.
    """
    n_rows = targets.numel()
    if not n_rows:
        return
    skew = [grad.data_ptr() - logits.data_ptr()]
    skew += [grad.element_size() * (a - b) for a, b in zip(grad.stride(), logits.stride(), strict=True)]
    with on_device(logits.device):
        token_logps_backward_kernel[(n_rows,)](
            grad, logits, targets.contiguous(),
            grad_logps.contiguous(), grad_logps if grad_entropies is None else grad_entropies.contiguous(),
            entropies, saved,
            logits.shape[1], logits.shape[2], n_rows,
            *grad.stride(), *logits.stride(),
            1.0 / temperature, ignore_index,
            SAME_ALIGNMENT=all(s % WIDEST_ACCESS == 0 for s in skew), ENTROPY=grad_entropies is not None,
            **launch_options(grad, _unit(grad, logits)),
        )  # fmt: skip


def _unit(x: Tensor, y: Tensor) -> int:
    """Return the elements of an access to rows of x and y, of one dtype."""
    return WIDEST_ACCESS // x.element_size() if x.stride(-1) == y.stride(-1) == 1 else 1
