"""Tests of the losses from hidden states that need a GPU: 16-bit matmuls with fp32 results, memory, large sizes.

`make gpu` runs these and, with impl="triton" on the device, the tests of test_linear*.py. Nothing is timed here.
"""

import pytest
import torch
from cases import seeded
from linear_cases import check_linear_loss, check_linear_tokens, linear_answer, make_linear_case

import exo_kernels
from exo_kernels.schedules import matmul

pytestmark = pytest.mark.gpu
MIB = 2**20
SCHEDULES = ["deferred", "group", "store", "recompute"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_real_vocabularies(schedule, dtype, vocab):
    case = make_linear_case(4, 9, 256, vocab, dtype, rewards=True, group_size=2, reference_model="hidden")
    check_linear_loss(case, "triton", "cuda", schedule=schedule)


def test_entropy_of_a_real_vocabulary():
    check_linear_tokens(make_linear_case(2, 5, 256, 128256, torch.bfloat16), "triton", "cuda", entropy=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_several_chunks_of_bf16(schedule):
    """Check that the weight's gradient is accumulated in fp32 over chunks of 16-bit operands."""
    case = make_linear_case(16, 40, 128, 4099, torch.bfloat16, rewards=True, group_size=4, softcap=20.0)
    check_linear_loss(case, "triton", "cuda", schedule=schedule, memory_budget=100 * 6 * matmul.padded(4099))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_are_deterministic(schedule):
    case = make_linear_case(32, 64, 128, 4099, torch.bfloat16, rewards=True, group_size=4).to(torch.bfloat16, "cuda")
    first = linear_answer(case, "triton", schedule=schedule, memory_budget="4MiB")
    for _ in range(19):
        again = linear_answer(case, "triton", schedule=schedule, memory_budget="4MiB")
        assert all(torch.equal(again[name], value) for name, value in first.items())


def problem(n: int, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    rng = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(4, n // 4, width, generator=rng, device="cuda", dtype=dtype)
    weight = torch.randn(vocab, width, generator=rng, device="cuda", dtype=dtype) * (4 / width**0.5)
    labels = torch.randint(vocab, (4, n // 4), generator=rng, device="cuda")
    return [hidden.requires_grad_(), weight.requires_grad_(), labels, torch.zeros(4, device="cuda")]


@pytest.mark.parametrize("schedule", ["deferred", "group", "recompute"])
def test_memory_stays_within_the_budget(schedule):
    """Check the peak beyond inputs, gradients and one fp32 copy of the weight's gradient.

    A tenth more is allowed for the workspaces of the matmul library. The budget is less than an eighth of the full
    fp32 logits: 8192 rows of 151936 are 4.6 GiB.
    """
    hidden, weight, labels, ref = problem(8192, 512, 151936)
    weight.requires_grad_(schedule != "deferred")

    def run() -> None:
        loss = exo_kernels.fused_linear_exo_loss(
            hidden, weight, labels, ref, shift=False, schedule=schedule, memory_budget="256MiB"
        )
        torch.autograd.grad(loss, [x for x in (hidden, weight) if x.requires_grad])

    run()  # the libraries' workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    run()
    gradients = 2 * 2 * hidden.numel() + weight.requires_grad * (2 + 4) * weight.numel()
    extra = torch.cuda.max_memory_allocated() - allocated - gradients
    assert extra <= 1.1 * 256 * MIB, f"{extra / MIB:.0f} MiB"


def test_store_of_more_than_2_31_elements():
    """Check that stored gradients beyond 2^31 elements equal recomputed ones. Needs 14 GiB."""
    vocab, n = 151936, 16384
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free memory")
    hidden, weight, labels, _ = problem(n, 64, vocab)
    logps = [
        exo_kernels.linear_token_logps(hidden, weight, labels, shift=False, schedule=schedule, memory_budget="2GiB")
        for schedule in ("store", "recompute")
    ]
    assert torch.equal(*logps)
    g = torch.randn(labels.shape, generator=seeded(1)).cuda()
    stored, recomputed = (torch.autograd.grad(x, (hidden, weight), g) for x in logps)
    assert torch.equal(stored[0], recomputed[0])
    torch.testing.assert_close(stored[1], recomputed[1])  # different chunks, so a different order of rounding


def test_log_ratios_are_accurate_to_1e_3():
    """Compare log-ratios of 512 tokens, from bf16 operands and a policy near its reference, with fp64."""
    hidden, weight, labels, _ = problem(4 * 512, 1024, 50257)
    near = (hidden.float() + 0.02 * torch.randn(hidden.shape, generator=seeded(2)).cuda()).bfloat16()
    ratios = []
    for dtype, module in ((torch.bfloat16, exo_kernels), (torch.float64, exo_kernels.reference)):
        policy, ref = (
            module.linear_token_logps(x.detach().to(dtype), weight.detach().to(dtype), labels, shift=False)
            for x in (hidden, near)
        )
        ratios.append((policy.double() - ref.double()).sum(1))
    error = (ratios[0] - ratios[1]).abs().max()
    assert error <= 1e-3, f"{error:.1e} nat"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_few_synchronisations(schedule):
    """Check that only the count of rows with loss and the bounds of the groups are copied to the host."""
    hidden, weight, labels, ref = problem(512, 128, 4099)
    exo_kernels.fused_linear_exo_loss(hidden, weight, labels, ref, schedule=schedule).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            exo_kernels.fused_linear_exo_loss(hidden, weight, labels, ref, schedule=schedule).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) <= 4  # nonzero may take two, forward and backward
