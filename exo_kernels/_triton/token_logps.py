"""Token pass and its backward pass on logits: one program a row, nothing read twice, nothing read that has no loss.

Forward: an online log-sum-exp that takes each block's maximum first, so that it costs one exponential an element. It
keeps the row's maximum and the log of the sum above it apart: their sum would round away a common offset of the logits.
Backward: one read and one write of the rows with loss, zeros elsewhere.

Rows are walked as an aligned body and its two edges. The body begins at the first 16-byte boundary, so its accesses are
128 bits wide whatever the vocabulary (50257 is odd, so its rows start anywhere) and wherever a slice begins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
BYTES = tl.constexpr(16)  # the widest access

# 32 elements a thread: 33 exponentials for 32 elements, four 128-bit loads in flight (bf16), about 50 registers.
BLOCK = 4096
NUM_WARPS = 4


@triton.jit
def _split_row(
    first,  # pointer to the row's first element
    V,
    stride_v,
    SIZE: tl.constexpr,  # bytes an element
):
    """Length of the head that stands before the first 16-byte boundary, and of the body in whole 16-byte units."""
    address = first.to(tl.int64)
    head = ((BYTES - address % BYTES) % BYTES) // SIZE
    head = tl.minimum(head, V).to(tl.int32)
    body = (V - head) // (BYTES // SIZE) * (BYTES // SIZE)
    return head, body


@triton.jit
def _edge_columns(head, body, V, UNIT: tl.constexpr):
    """Columns of head and tail, both shorter than one unit, and which of them exist."""
    i = tl.arange(0, 2 * UNIT)
    columns = tl.where(i < UNIT, i, head + body + i - UNIT)
    exists = tl.where(i < UNIT, i < head, columns < V)
    return columns, exists


@triton.jit
def _accumulate(x, m, total, weighted, scale, scale2, ENTROPY: tl.constexpr):
    """Fold a block of logits into (maximum, sum of e^(scale (x - m)), the same weighted by scale (x - m)).

    scale2 is scale * log2(e).
    """
    new = tl.maximum(m, tl.max(x, 0))
    base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
    shift = tl.where(m == float("-inf"), 0.0, m - base)
    decay = tl.exp2(shift * scale2)
    distance = x - base
    e = tl.exp2(distance * scale2)
    if ENTROPY:
        d = tl.where(e > 0, distance * scale, 0.0)
        weighted = decay * (weighted + total * shift * scale) + tl.sum(e * d, 0)
    total = decay * total + tl.sum(e, 0)
    return new, total, weighted


@triton.jit(do_not_specialize=["T", "ignore_index"])
def token_logps_kernel(
    logits, targets,
    logps, saved, entropies,
    T, V, R,
    stride_n, stride_t, stride_v,
    scale: tl.float64,  # 1 / temperature
    ignore_index: tl.int64,
    SIZE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc = logps.dtype.element_ty
    scale2 = tl.full((), scale * LOG2E, acc)
    scale = tl.full((), scale, acc)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(logps + row, 0.0)
        tl.store(saved + row, 0.0)
        tl.store(saved + R + row, 0.0)
        if ENTROPY:
            tl.store(entropies + row, 0.0)
        return
    first = logits + (row // T) * stride_n + (row % T) * stride_t
    head, body = _split_row(first, V, stride_v, SIZE)

    columns, exists = _edge_columns(head, body, V, BYTES // SIZE)
    x = tl.load(first + columns * stride_v, mask=exists, other=float("-inf")).to(acc)
    m = tl.full((), float("-inf"), acc)
    total = tl.zeros((), acc)
    weighted = tl.zeros((), acc)
    m, total, weighted = _accumulate(x, m, total, weighted, scale, scale2, ENTROPY)
    aligned = tl.multiple_of(first + head * stride_v, 16)
    for start in range(0, body, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(aligned + columns * stride_v, mask=columns < body, other=float("-inf")).to(acc)
        m, total, weighted = _accumulate(x, m, total, weighted, scale, scale2, ENTROPY)

    inside = (target >= 0) & (target < V)
    z = tl.load(first + target * stride_v, mask=inside, other=0.0).to(acc)
    m = tl.where(m == float("-inf"), 0.0, m)  # a row of -inf: log-prob -inf, softmax 0, entropy 0
    log_total = tl.where(total > 0, tl.log(total), total)  # total = 0 there, and NaN stays NaN
    logp = (z - m) * scale - log_total
    tl.store(logps + row, tl.where(inside, logp, float("nan")))
    tl.store(saved + row, m)
    tl.store(saved + R + row, log_total)
    if ENTROPY:
        tl.store(entropies + row, tl.where(total == 0, 0.0, log_total - weighted / total))


@triton.jit
def _gradient(x, hit, m, log_total, g, h, entropy, scale, scale2, ENTROPY: tl.constexpr):
    """(g (onehot - p) - h p (log p + H)), g and h already over the temperature."""
    if ENTROPY:
        log_p = (x - m) * scale - log_total
        p = tl.exp2(log_p * LOG2E)
        return tl.where(hit, g, 0.0) - p * (g + h * (tl.where(p > 0, log_p, 0.0) + entropy))
    p = tl.exp2((x - m) * scale2 - log_total * LOG2E)
    return tl.where(hit, g - g * p, -g * p)


@triton.jit(do_not_specialize=["T", "ignore_index"])
def token_logps_backward_kernel(
    grad, logits, targets,
    grad_logps, grad_entropies, entropies, saved,
    T, V, R,
    grad_stride_n, grad_stride_t, grad_stride_v,
    stride_n, stride_t, stride_v,
    scale: tl.float64,  # 1 / temperature
    ignore_index: tl.int64,
    SIZE: tl.constexpr, SAME_ALIGNMENT: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc = saved.dtype.element_ty
    scale2 = tl.full((), scale * LOG2E, acc)
    scale = tl.full((), scale, acc)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    g = tl.load(grad_logps + row).to(acc) * scale
    h = tl.zeros((), acc)
    entropy = h
    if ENTROPY:
        h = tl.load(grad_entropies + row).to(acc) * scale
        entropy = tl.load(entropies + row)
    out = grad + (row // T) * grad_stride_n + (row % T) * grad_stride_t
    head, body = _split_row(out, V, grad_stride_v, SIZE)
    columns, exists = _edge_columns(head, body, V, BYTES // SIZE)
    out_aligned = tl.multiple_of(out + head * grad_stride_v, 16)

    if (target == ignore_index) | ((g == 0) & (h == 0)):
        zeros = tl.zeros((2 * (BYTES // SIZE),), grad.dtype.element_ty)
        tl.store(out + columns * grad_stride_v, zeros, mask=exists)
        for start in range(0, body, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), grad.dtype.element_ty)
            tl.store(out_aligned + columns * grad_stride_v, zeros, mask=columns < body)
        return

    first = logits + (row // T) * stride_n + (row % T) * stride_t
    m = tl.load(saved + row)
    log_total = tl.load(saved + R + row)
    x = tl.load(first + columns * stride_v, mask=exists, other=0.0).to(acc)
    dx = _gradient(x, columns == target, m, log_total, g, h, entropy, scale, scale2, ENTROPY)
    tl.store(out + columns * grad_stride_v, dx, mask=exists)
    aligned = first + head * stride_v
    if SAME_ALIGNMENT:
        aligned = tl.multiple_of(aligned, 16)
    for start in range(0, body, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(aligned + columns * stride_v, mask=columns < body, other=0.0).to(acc)
        hit = columns == target - head
        dx = _gradient(x, hit, m, log_total, g, h, entropy, scale, scale2, ENTROPY)
        tl.store(out_aligned + columns * grad_stride_v, dx, mask=columns < body)


def token_logps(
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, T), (N, T) or (0,), (2, N, T)
    """Log-probabilities of the targets, entropies where asked, and each row's maximum and log-sum above it."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logps = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    entropies = torch.empty(targets.shape if entropy else (0,), dtype=dtype, device=logits.device)
    saved = torch.empty((2, *targets.shape), dtype=dtype, device=logits.device)
    n_rows = targets.numel()
    if n_rows:
        with _on(logits.device):
            token_logps_kernel[(n_rows,)](
                logits, targets.contiguous(),
                logps, saved, entropies,
                logits.shape[1], logits.shape[2], n_rows,
                *logits.stride(),
                1.0 / temperature, ignore_index,
                SIZE=logits.element_size(), ENTROPY=entropy, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return logps, entropies, saved


def new_gradient(logits: Tensor) -> Tensor:
    """Uninitialised: the backward kernel writes every element."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def token_logps_backward(
    grad: Tensor,  # (N, T, V), written whole; may be the logits themselves
    grad_logps: Tensor,  # (N, T)
    grad_entropies: Tensor | None,  # (N, T)
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    entropies: Tensor,  # (N, T), or (0,)
    saved: Tensor,  # (2, N, T)
    temperature: float,
    ignore_index: int,
) -> None:
    """Fill grad with (g (onehot(target) - p) - h p (log p + H)) / temperature; g, h: gradients of log-prob and entropy."""
    n_rows = targets.numel()
    if not n_rows:
        return
    size = logits.element_size()
    skew = [grad.data_ptr() - logits.data_ptr()]
    skew += [size * (a - b) for a, b in zip(grad.stride()[:2], logits.stride()[:2], strict=True)]
    with _on(logits.device):
        token_logps_backward_kernel[(n_rows,)](
            grad, logits, targets.contiguous(),
            grad_logps.contiguous(), grad_logps if grad_entropies is None else grad_entropies.contiguous(),
            entropies, saved,
            logits.shape[1], logits.shape[2], n_rows,
            *grad.stride(), *logits.stride(),
            1.0 / temperature, ignore_index,
            SIZE=size, SAME_ALIGNMENT=all(s % 16 == 0 for s in skew), ENTROPY=grad_entropies is not None,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def _on(device: torch.device) -> torch.cuda.device:
    """Launch on the tensors' own GPU; a no-op where there is none (the interpreter)."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
