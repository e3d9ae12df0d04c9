"""Inputs are never modified, except the logits with inplace_backward, and then autograd detects later uses."""

import pytest
import torch
from budget import check_loss, loss_answer
from cases import Case, make_case
from torch import Tensor

import exo_kernels


def input_tensors(case: Case) -> list[Tensor]:
    """Return every input tensor of a call."""
    return [case.logits, case.labels, case.ref_logps, *(v for v in case.options.values() if isinstance(v, Tensor))]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", ["exo", "dpo"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_inputs_keep_bytes_and_version(impl, device, dtype, objective, packed):
    case = make_case(
        4, 3, 33, dtype, objective=objective, lengths=[3, 0, 4] if packed else None, rewards=True, seed=1,
        group_size=torch.tensor([1, 2] if packed else [1, 3]), per_token_ref=True,
        ref_dtype=torch.float64,
    ).on(device)  # fmt: skip
    case.logits[..., 7] = torch.nan  # because bytes are compared, not values
    inputs = input_tensors(case)
    copies = [(x.clone(), x._version) for x in inputs]
    x = case.logits.detach().requires_grad_()
    function = getattr(exo_kernels, f"fused_{objective}_loss")
    loss, stats = function(x, case.labels, case.ref_logps, impl=impl, return_stats=True, **case.options)
    for value in stats:
        assert not value.requires_grad
        value.zero_()  # the caller may modify statistics without changing the gradient
    loss.backward()
    for x, (original, version) in zip(inputs, copies, strict=True):
        assert same_bytes(x, original)
        assert x._version == version


@pytest.mark.parametrize("function", ["token_logps", "sequence_logps"])
def test_log_probs_leave_inputs_alone(impl, device, function):
    case = make_case(2, 3, 33).on(device)
    original = case.logits.clone()
    x = case.logits.requires_grad_()
    getattr(exo_kernels, function)(x, case.labels, impl=impl).sum().backward()
    assert torch.equal(x, original) and x._version == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gradient_is_written_over_the_logits(impl, device, dtype, packed):
    case = make_case(2, 4, 131, dtype, lengths=[4, 3] if packed else None).on(device)
    expected = loss_answer(case, case.logits, impl)["grad"]
    x = case.logits.clone().requires_grad_()
    version = x._version
    loss = exo_kernels.fused_exo_loss(x, case.labels, case.ref_logps, impl=impl, inplace_backward=True, **case.options)
    assert torch.equal(x, case.logits) and x._version == version  # not yet overwritten
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(grad, expected)
    assert torch.equal(x.detach(), expected)  # overwritten
    assert grad.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert x._version > version


def test_inplace_within_budget(impl, device):
    check_loss(make_case(4, 3, 33, torch.float16, rewards=True), impl, device, inplace_backward=True)


def test_logits_inside_a_graph(impl, device):
    """Check the usual graph: logits = head(hidden), where the backward pass of the head does not need the logits."""
    case = make_case(2, 4, 65).on(device)
    hidden = torch.randn(2, 4, 8, device=device)
    head = torch.randn(8, 65, device=device).requires_grad_()
    grads = []
    for inplace in (False, True):
        loss = exo_kernels.fused_exo_loss(
            hidden @ head, case.labels, case.ref_logps, impl=impl, inplace_backward=inplace
        )
        grads += torch.autograd.grad(loss, head)
    assert torch.equal(*grads)


def test_inplace_is_refused_if_the_logits_are_needed(impl, device):
    case = make_case(2, 4, 33).on(device)
    arguments = (case.labels, case.ref_logps)
    options = {"impl": impl, "inplace_backward": True}
    x = case.logits.clone().requires_grad_()
    loss = exo_kernels.fused_exo_loss(x, *arguments, **options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    x = case.logits.clone().requires_grad_()  # another loss on the same logits, whose backward comes later
    other = exo_kernels.fused_exo_loss(x, *arguments, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + exo_kernels.fused_exo_loss(x, *arguments, **options)).backward()

    x = case.logits.clone().requires_grad_()  # logits that another function saved
    z = x * 1
    squares = z.pow(2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + exo_kernels.fused_exo_loss(z, *arguments, **options)).backward()

    z = torch.softmax(case.logits.clone().requires_grad_(), -1)  # logits that the producing function saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exo_kernels.fused_exo_loss(z, *arguments, **options).backward()


def test_two_losses_on_the_same_logits(impl, device):
    """Check that the last loss to need the logits may overwrite them, with exact gradients."""
    case = make_case(2, 4, 33).on(device)
    grads = []
    for inplace in (False, True):
        x = case.logits.clone().requires_grad_()
        loss = exo_kernels.fused_exo_loss(x, case.labels, case.ref_logps, impl=impl, inplace_backward=inplace)
        loss = loss + 2 * exo_kernels.fused_dpo_loss(x, case.labels, case.ref_logps, impl=impl)
        grads += torch.autograd.grad(loss, x)
    assert torch.equal(*grads)


def test_logits_changed_before_backward_raise(impl, device):
    case = make_case(2, 4, 33).on(device)
    z = case.logits.clone().requires_grad_() * 1
    loss = exo_kernels.fused_exo_loss(z, case.labels, case.ref_logps, impl=impl)
    z.data.zero_()  # autograd does not see changes through .data
    z.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_written_without_backward(impl, device):
    case = make_case(2, 4, 33).on(device)
    original = case.logits.clone()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            exo_kernels.fused_exo_loss(case.logits, case.labels, case.ref_logps, impl=impl, inplace_backward=True)
    assert torch.equal(case.logits, original) and case.logits._version == 0
