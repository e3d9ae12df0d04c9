"""Code that the kernels share: the online log-sum-exp of the token passes, and the launch options."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
NUM_WARPS = 4
WIDEST_ACCESS = 16  # bytes
LANE_BYTES = 64  # of a block: four accesses in flight, 33 exponentials for 32 elements (bf16), registers to spare


@triton.jit
def base_of(m):
    """Return the maximum to subtract, 0 for -inf: -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def rebase(m, base, total, weighted, scale, scale2, ENTROPY: tl.constexpr):
    """Convert sums above m to sums above base >= m."""
    shift = tl.where(m == float("-inf"), 0.0, m - base)  # -inf: the sums are still zero
    decay = tl.exp2(shift * scale2)
    if ENTROPY:
        weighted = decay * (weighted + total * (shift * scale))
    return decay * total, weighted


@triton.jit
def accumulate(x, m, total, weighted, scale, scale2, UNIT: tl.constexpr, ENTROPY: tl.constexpr):
    """Fold a block into each lane's (maximum, sum of e^(scale (x - m)), the same weighted by scale (x - m)).

    scale2 is scale * log2(e). The shape is the one in which lanes hold their elements, so no reduction leaves a lane.
    """
    LANES: tl.constexpr = m.shape[0]
    x = tl.reshape(x, (x.shape[0] // (LANES * UNIT), LANES, UNIT))
    new = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    base = base_of(new)
    total, weighted = rebase(m, base, total, weighted, scale, scale2, ENTROPY)
    distance = x - base[None, :, None]
    e = tl.exp2(distance * scale2)
    if ENTROPY:
        weighted += tl.sum(tl.sum(tl.where(e > 0, e * (distance * scale), 0.0), 2), 0)
    return new, total + tl.sum(tl.sum(e, 2), 0), weighted


def warp_size(device: torch.device) -> int:
    """Return the threads of a warp: 32, or 64 on AMD's data-centre GPUs. The interpreter takes any number."""
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32


def launch_options(rows: Tensor, unit: int, lanes: bool = True) -> dict[str, int]:
    """Return launch options for rows that are read in accesses of `unit` elements; `lanes`: with their number."""
    size, n_lanes = rows.element_size(), NUM_WARPS * warp_size(rows.device)
    options = {"SIZE": size, "UNIT": unit, "BLOCK": n_lanes * LANE_BYTES // size, "num_warps": NUM_WARPS}
    options["enable_fp_fusion"] = True  # explicit because triton is about to change its default
    return options | {"LANES": n_lanes} if lanes else options


def on_device(device: torch.device) -> torch.cuda.device:
    """Launch on the tensors' GPU; a no-op without one (in the interpreter)."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
