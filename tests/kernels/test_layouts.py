"""Memory layouts: strides that users create, memory outside a view, and offsets beyond 2^31 elements.

`python test_layouts.py IMPL` is the child process of test_offsets_beyond_int32, where a wrong offset is a segmentation
fault.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import check_loss, check_tokens, compare, loss_answer, ulps_of
from cases import aligned, layouts, make_case, make_labels, make_logits

import exo_kernels

NAMES = [name for name, _ in layouts(torch.zeros(1, 1, 1))]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_layout(impl, device, name, dtype, inplace):
    """Check a loss on a view whose rows are not aligned to 16 bytes (131 is odd); memory outside it must stay NaN."""
    case = make_case(2, 3, 131, dtype, seed=1)
    views = []

    def view(logits: torch.Tensor) -> torch.Tensor:
        views.append(dict(layouts(logits))[name])
        return views[0]

    check_loss(case, impl, device, view, inplace_backward=inplace)
    (logits,) = views
    base = logits._base.flatten()
    inside = torch.zeros_like(base, dtype=torch.bool).as_strided(logits.shape, logits.stride(), logits.storage_offset())
    inside.fill_(True)
    assert base[~inside._base].isnan().all()
    assert base[inside._base].isfinite().all()


# The gradient of a leaf has the strides of the leaf; that of a tensor inside a graph does not.
@pytest.mark.parametrize("name", ["transposed-time", "vocab-outermost", "padded-vocab", "every-second-column"])
def test_layout_inside_a_graph(impl, device, name):
    case = make_case(2, 3, 131, seed=2).on(device)
    x = case.logits.clone().requires_grad_()
    loss = exo_kernels.fused_exo_loss(dict(layouts(x * 1))[name], case.labels, case.ref_logps, impl=impl)
    expected = loss_answer(case, case.logits, impl)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, expected["grad"], rtol=1e-5, atol=1e-8)  # budgets are checked above


@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "aligned"])
def test_strided_vectors(impl, device, shift):
    """Check strided labels, references and rewards, and a strided gradient of the log-probs."""
    case = make_case(4, 3, 33, seed=6, per_token_ref=True, rewards=True, shift=shift).on(device)
    rewards = torch.stack([case.options["rewards"], torch.full_like(case.options["rewards"], torch.nan)], 1)[:, 0]
    strided = case._replace(
        labels=case.labels.t().contiguous().t(), ref_logps=case.ref_logps.t().contiguous().t()
    ).with_options(rewards=rewards)
    assert not strided.labels.is_contiguous() and not rewards.is_contiguous()
    expected, result = (loss_answer(c, c.logits, impl) for c in (case, strided))
    assert all(torch.equal(expected[name], result[name]) for name in expected)
    weights = torch.randn(3, 4, device=device).t()
    grads = []
    for w in (weights, weights.contiguous()):
        x = case.logits.detach().requires_grad_()
        logps = exo_kernels.token_logps(x, strided.labels, shift=shift, impl=impl)
        grads += torch.autograd.grad(logps, x, w)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["transposed-time", "without-last-row", "without-first-row", "every-second-sequence"])
def test_aligned_layouts_are_bit_equal(impl, device, name):
    """Check that results do not depend on strides if the alignment of rows stays the same."""
    case = make_case(2, 3, 128, seed=3).on(device)
    expected = loss_answer(case, case.logits, impl)
    result = loss_answer(case, dict(layouts(case.logits))[name], impl)
    assert all(torch.equal(result[key], value) for key, value in expected.items())


@pytest.mark.parametrize("axis", ["sequences", "rows", "both"])
def test_expanded_logits(impl, device, axis):
    case = make_case(4, 3, 33, seed=4)
    shape = {"sequences": (1, 3, 33), "rows": (4, 1, 33), "both": (1, 1, 33)}[axis]

    def view(logits: torch.Tensor) -> torch.Tensor:
        return logits[: shape[0], : shape[1]].expand(4, 3, 33)

    check_loss(case._replace(logits=view(case.logits)), impl, device, view)


def test_expanded_vocabulary(impl, device):
    """Check rows of one number with stride 0, which have a uniform softmax."""
    logits = torch.randn(2, 3, 1).expand(2, 3, 50)
    check_tokens(logits, make_labels((2, 3), 50), impl, device, lambda x: x[..., :1].expand(2, 3, 50), entropy=True)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "int32-sliced"])
def test_strided_labels_and_references(impl, device, kind):
    """Check strided labels with shift=False, because shifting copies them."""
    case = make_case(4, 4, 19, seed=5, per_token_ref=True, ref_dtype=torch.float32, shift=False).on(device)
    if kind == "expanded":
        case = case._replace(labels=case.labels[:1].expand(4, 4), ref_logps=case.ref_logps[:1].expand(4, 4))
    dense = case._replace(labels=case.labels.contiguous(), ref_logps=case.ref_logps.contiguous())

    def restride(x: torch.Tensor) -> torch.Tensor:
        if kind == "transposed":
            return x.t().contiguous().t()
        return torch.stack([x, x], -1)[..., 0] if "sliced" in kind else x

    labels = restride(dense.labels) if kind != "expanded" else case.labels
    strided = case._replace(
        labels=labels.int()[:, :] if "int32" in kind else labels,
        ref_logps=restride(dense.ref_logps) if kind != "expanded" else case.ref_logps,
    )
    expected, result = (loss_answer(c, c.logits, impl) for c in (dense, strided))
    assert all(torch.equal(result[key], value) for key, value in expected.items())


# Rows at every offset from a 16-byte boundary, and vocabularies shorter than 16 bytes.
@pytest.mark.parametrize("vocab", [1, 3, 16, 67])
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_every_alignment(impl, device, offset, vocab):
    labels = make_labels((2, 3), vocab, seed=6, ignored=0.0)
    values = make_logits(aligned(labels), vocab, torch.float16)
    logits = torch.full((values.numel() + offset,), torch.nan, dtype=torch.float16, device=device)
    logits[offset:].copy_(values.flatten())
    result = exo_kernels.token_logps(logits[offset:].view(values.shape), labels.to(device), impl=impl)
    oracle = exo_kernels.reference.token_logps(values.double(), labels)
    plain = exo_kernels.reference.token_logps(values.float(), labels)
    compare("logps", result, plain, oracle, ulps_of(torch.float16) * oracle.abs().clamp(min=1))


FAR = 2**30  # elements: the third row starts at 2^31
STRIDES = {
    "sequences": ((3, 1, 5), (FAR, 5, 1)),
    "rows": ((1, 3, 5), (3 * FAR, FAR, 1)),
    "columns": ((1, 2, 4), (2, 1, FAR)),
}


def test_offsets_beyond_int32(impl, device):
    """Run on a tensor of 4 GB of address space, of which a few pages are used; test_gpu.py uses real memory."""
    if device == "cuda":
        pytest.skip("would need real memory on a GPU: test_gpu.py does that")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parents[2])))}
    command = [sys.executable, "-W", "ignore", __file__, impl]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if "can't allocate" in child.stderr:
        pytest.skip("this machine does not allow 4 GB of address space")
    done = child.stdout.split()
    assert child.returncode == 0 and done == list(STRIDES), (
        f"exit status {child.returncode}, only {done} passed\n{child.stderr}"
    )


def offsets_beyond_int32(axis: str, impl: str) -> None:
    """Check that forward, backward and in-place backward on far rows equal those on near rows bit for bit."""
    shape, strides = STRIDES[axis]
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    far = torch.empty(span, dtype=torch.bfloat16).as_strided(shape, strides)
    near = make_logits(torch.zeros(shape[:2], dtype=torch.long), shape[2], torch.bfloat16)
    labels = torch.arange(shape[0] * shape[1]).view(shape[:2])
    for inplace in (False, True):
        results = []
        for logits in (near.clone(), far.copy_(near)):
            x = logits.detach().requires_grad_()
            logps = exo_kernels.token_logps(x, labels, shift=False, impl=impl)
            if not inplace:
                (grad,) = torch.autograd.grad(logps.sum(), x)
            elif axis == "sequences":  # different rewards, so that every sequence has a slope
                rewards = torch.arange(3.0)
                loss = exo_kernels.fused_dpo_loss(
                    x, labels, torch.zeros(3), group_size=3, rewards=rewards, shift=False, inplace_backward=True,
                    impl=impl,
                )  # fmt: skip
                (grad,) = torch.autograd.grad(loss, x)
            else:  # a group of one has slope 0, so call the operator
                ops = exo_kernels.ops.logits.token_logps(x, labels, 1.0, -100, False, True, impl)
                (grad,) = torch.autograd.grad(ops[0].sum(), x)
            assert grad.any(-1).all()
            results.append((logps.detach(), grad.clone(), x.detach().clone()))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), (axis, inplace, a, b)


if __name__ == "__main__":
    for far_axis in STRIDES:
        offsets_beyond_int32(far_axis, sys.argv[1])
        print(far_axis, flush=True)
