"""Peak memory: beyond inputs and gradients, a call stays within its budget.

Bytes are counted as in test_memory.py, inside the operators. test_gpu_linear.py measures the memory of a GPU.
"""

import functools

import pytest
import torch
from cases import IGNORED, seeded
from test_memory import Peak

import exo_kernels
from exo_kernels.schedules import matmul, passes

WIDTH, VOCAB, BUDGET = 64, 4000, 2**21


@pytest.fixture
def peak(monkeypatch) -> Peak:
    mode = Peak()

    def counted(inner, *args, **options):
        with mode:
            return inner(*args, **options)

    for name in ("forward", "backward", "group_pass", "multiply_deferred"):
        monkeypatch.setattr(passes, name, functools.partial(counted, getattr(passes, name)))
    return mode


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [2, 8], ids=["small-groups", "oversized-groups"])
@pytest.mark.parametrize("schedule", ["deferred", "group", "recompute"])
def test_peak_stays_within_the_budget(peak, monkeypatch, schedule, group_size, dtype):
    """Check the peak with mostly prompt rows. A tenth more is allowed for tiles and the numbers of each row."""
    monkeypatch.setattr(matmul, "BLOCK_BYTES", BUDGET // 8)
    monkeypatch.setattr(matmul, "EXACT_CPU", BUDGET // 32)
    monkeypatch.setattr("exo_kernels.chunked.tiles.TILE_BYTES", BUDGET // 32)
    monkeypatch.setattr(passes, "DEFERRED_CPU", BUDGET // 32)
    hidden = torch.randn(8, 384, WIDTH, generator=seeded(0)).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=seeded(1)).to(dtype).requires_grad_(schedule != "deferred")
    labels = torch.randint(VOCAB, (8, 384), generator=seeded(2))
    labels[:, :334] = IGNORED
    options = {"schedule": schedule, "group_size": group_size, "shift": False, "memory_budget": BUDGET}
    loss = exo_kernels.fused_linear_exo_loss(hidden, weight, labels, torch.zeros(8), impl="chunked", **options)
    loss.backward()
    size = hidden.numel() * hidden.element_size()
    returned = size + 4 * weight.numel() * weight.requires_grad  # one fp32 dW
    rows = 12 * 4 * labels.numel()  # numbers and indices of rows
    assert BUDGET / 2 < peak.peak - returned <= 1.1 * BUDGET + rows
    planned = exo_kernels.explain(hidden, weight, labels, **options)
    assert planned.schedule == schedule and (planned.oversized_groups > 0) == (group_size == 8 and schedule == "group")
    assert planned.extra_bytes <= BUDGET


def test_frozen_head_saves_only_the_gradient():
    """Check that hidden states and weight are not saved for the backward pass and may change before it."""
    hidden = torch.randn(4, 5, 8, generator=seeded(0)).requires_grad_()
    weight = torch.randn(37, 8, generator=seeded(1))
    labels = torch.randint(37, (4, 5), generator=seeded(2))
    body = hidden * 1
    loss = exo_kernels.fused_linear_exo_loss(body, weight, labels, torch.zeros(4))
    (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    with torch.no_grad():
        weight.zero_()
        body.zero_()
    loss.backward()
    assert torch.equal(hidden.grad, expected) and expected.any()
