"""Tests that need a GPU: real launches, bf16 rounding in hardware, real memory.

`make gpu` runs these and, with impl="triton" on the device, every test of the other files that takes an implementation.
Nothing is timed here; see benchmarks/.
"""

import pytest
import torch
from budget import check_loss, check_tokens, loss_answer
from cases import IGNORED, aligned, make_case, make_labels, make_logits

import exo_kernels
from exo_kernels import fused_dpo_loss, fused_exo_loss, preference_loss, token_logps

pytestmark = pytest.mark.gpu
MIB = 2**20


# The vocabularies of Llama 3, Qwen 2.5, Gemma and GPT-2. These models are trained in bf16.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("vocab", [128256, 151936, 256000, 50257])
def test_real_vocabularies(vocab, dtype):
    labels = make_labels((4, 9), vocab)
    check_tokens(make_logits(aligned(labels), vocab, dtype), labels, "triton", "cuda", entropy=True)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_bf16_losses(objective, inplace):
    case = make_case(8, 64, 50257, torch.bfloat16, objective=objective, group_size=4, rewards=True)
    check_loss(case, "triton", "cuda", inplace_backward=inplace)


def test_auto_is_triton():
    case = make_case(4, 5, 129, torch.bfloat16).on("cuda")
    auto, triton = (loss_answer(case, case.logits, impl) for impl in ("auto", "triton"))
    assert all(torch.equal(auto[name], triton[name]) for name in triton)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_other_implementations_run_on_gpu(impl):
    case = make_case(4, 5, 129, torch.float32, rewards=True, group_size=torch.tensor([1, 3]))
    check_loss(case, impl, "cuda")


def test_preference_loss_on_gpu_equals_cpu():
    policy, ref, rewards = (torch.randn(70, dtype=torch.float64) for _ in range(3))
    sizes = torch.tensor([1, 33, 2, 34])
    for options in ({}, {"rewards": rewards}):
        expected = preference_loss(policy, ref, group_size=sizes, **options)
        moved = {k: v.cuda() for k, v in options.items()}
        result = preference_loss(policy.cuda(), ref.cuda(), group_size=sizes.cuda(), **moved)
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_results_are_deterministic(dtype):
    """Check that twenty runs give the same bits, with enough rows that blocks finish in any order."""
    case = make_case(64, 128, 4099, dtype, group_size=torch.tensor([1, 31, 2, 30]), rewards=True).on("cuda")
    first = loss_answer(case, case.logits, "triton")
    for _ in range(19):
        again = loss_answer(case, case.logits, "triton")
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_more_than_2_31_elements(inplace):
    """Check that rows beyond 2^31 elements are bitwise equal to rows before. Needs 5 GiB in place, 9 otherwise."""
    vocab, rows = 151936, 2**31 // 151936 + 9
    need = rows * vocab * 2 * (1 if inplace else 2) + 2**30
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free memory")
    few = make_logits(torch.arange(8), vocab, torch.bfloat16).cuda()
    labels = torch.full((1, rows), IGNORED, device="cuda")
    labels[0, :8], labels[0, -8:] = torch.arange(8), torch.arange(8)
    logits = torch.zeros(1, rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[0, :8], logits[0, -8:] = few, few
    x = logits.requires_grad_()
    logps, _, _ = exo_kernels.ops.logits.token_logps(x, labels, 1.0, IGNORED, False, inplace, "triton")
    assert torch.equal(logps[0, :8], logps[0, -8:]) and logps[0, :8].any()
    (grad,) = torch.autograd.grad(logps.sum(), x)
    assert torch.equal(grad[0, :8], grad[0, -8:]) and grad[0, -8:].any(-1).all()
    assert not grad[0, 8:-8].any()


def extra_peak(function) -> int:
    """Return the peak bytes that the function allocates beyond those allocated before it."""
    function()  # compile, and fill the allocator's caches
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - allocated


def test_peak_memory_is_the_gradient():
    """Check the peak: under 1 MiB forward, the gradient in the logits' dtype backward, under 1 MiB in place."""
    n, t, vocab = 8, 512, 151936
    logits = torch.randn(n, t, vocab, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(vocab, (n, t), device="cuda")
    ref = torch.zeros(n, device="cuda")
    size = logits.numel() * 2

    def forward() -> None:
        fused_exo_loss(logits, labels, ref)

    def step(inplace: bool) -> None:
        x = logits.detach().requires_grad_()
        torch.autograd.grad(fused_exo_loss(x, labels, ref, inplace_backward=inplace), x)

    assert extra_peak(forward) < MIB
    assert extra_peak(lambda: step(False)) < size + MIB
    assert extra_peak(lambda: step(True)) < MIB


def test_no_synchronisation():
    """Check that a call queues its kernels and returns, without copies to the host."""
    case = make_case(6, 5, 129, torch.bfloat16, rewards=True, group_size=torch.tensor([1, 3, 2])).on("cuda")

    def step(**options) -> None:
        x = case.logits.detach().requires_grad_()
        torch.autograd.grad(fused_exo_loss(x, case.labels, case.ref_logps, **case.options, **options), x)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step(inplace_backward=True, num_groups=torch.tensor(7, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


BAD_VALUES = {
    "labels": {"labels": torch.full((4, 5), 129)},
    "rewards": {"rewards": torch.tensor([0.0, torch.nan, 0.0, 0.0])},
    "group_size": {"group_size": torch.tensor([1, 2])},
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_checked_mode_validates_values(monkeypatch, name):
    case = make_case(4, 5, 129).on("cuda")
    arguments = {"logits": case.logits, "labels": case.labels, "ref_logps": case.ref_logps}
    arguments |= {k: v.cuda() for k, v in BAD_VALUES[name].items()}
    monkeypatch.setenv("EXO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        fused_exo_loss(**arguments)


def test_bad_labels_do_not_poison_the_context():
    """Check that out-of-range labels give NaN, not a device-side assert, so that later calls still work."""
    case = make_case(4, 5, 129).on("cuda")
    bad = case.labels.clone()
    bad[0] = 2**62
    assert fused_dpo_loss(case.logits, bad, case.ref_logps).isnan()
    torch.cuda.synchronize()
    assert fused_dpo_loss(case.logits, case.labels, case.ref_logps).isfinite()


def test_tensors_on_two_devices_are_refused():
    case = make_case(4, 5, 129)
    with pytest.raises(ValueError, match="^labels: .* on cuda"):
        token_logps(case.logits.cuda(), case.labels)
    with pytest.raises(ValueError, match="^ref_logps: .* on cuda"):
        fused_exo_loss(case.logits.cuda(), case.labels.cuda(), case.ref_logps)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_non_current_device():
    case = make_case(4, 5, 129, torch.bfloat16)
    first, second = (loss_answer(c, c.logits, "triton") for c in (case.on("cuda:0"), case.on("cuda:1")))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)
    with torch.cuda.device(1):
        again = loss_answer(case.on("cuda:0"), case.on("cuda:0").logits, "triton")
    assert torch.equal(first["grad"], again["grad"])


def test_kernels_run_on_the_current_stream():
    case = make_case(4, 5, 129).on("cuda")
    expected = loss_answer(case, case.logits, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = loss_answer(case, case.logits, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(result[name], value) for name, value in expected.items())


@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_cuda_graph(objective):
    """Capture forward and backward once, and replay them on other values."""
    a, b = (make_case(4, 5, 129, torch.bfloat16, seed=seed, objective=objective).on("cuda") for seed in (1, 2))
    function = fused_exo_loss if objective == "exo" else fused_dpo_loss
    logits, labels, ref = (x.clone() for x in (a.logits, a.labels, a.ref_logps))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        x = logits.detach().requires_grad_()
        loss = function(x, labels, ref)
        return loss, torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for case in (a, b):
        for static, value in ((logits, case.logits), (labels, case.labels), (ref, case.ref_logps)):
            static.copy_(value)
        graph.replay()
        expected = step()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))
