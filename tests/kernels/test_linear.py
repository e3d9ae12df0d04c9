"""Losses from hidden states against the fp64 oracle, within the error budget: schedules, layouts, dtypes, options."""

import pytest
import torch
from cases import DTYPES, sums_of
from linear_cases import HEAD, LAYOUT, check_linear_loss, check_linear_tokens, make_linear_case
from pairwise import pairwise

import exo_kernels

SCHEDULES = ["deferred", "group", "store", "recompute"]
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pairwise({"layout": ["shifted", "aligned", "packed"], "dtype": DTYPES, "schedule": SCHEDULES})
def test_schedules_layouts_dtypes(impl, device, schedule, dtype, layout):
    options = {"packed": {"lengths": [2, 5, 0, 3]}, "aligned": {"shift": False}}.get(layout, {})
    case = make_linear_case(dtype=dtype, rewards=True, seed=1, **options)
    check_linear_loss(case, impl, device, schedule=schedule)


@schedules
@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"softcap": 20.0},
        {"logit_scale": 0.25},
        {"temperature": 0.8},
        {"softcap": 12.0, "logit_scale": 0.5, "temperature": 1.3},
        {"softcap": 5.0, "bias": False, "reference_model": "hidden"},
        {"objective": "dpo"},
        {"objective": "dpo", "rewards": True, "beta_r": 0.3},
        {"group_size": 4, "label_smoothing": 0.2},
        {"group_size": torch.tensor([1, 3]), "rewards": True, "beta_pi": 0.7},
        {"group_size": 1},
        {"compat": "official"},
        {"reduction": "sum"},
        {"num_groups": 7},
        {"num_groups": torch.tensor(2.5)},
        {"reference_model": "tokens"},
        {"reference_model": "hidden"},
        {"reference_model": "own"},
        {"reference_model": "own", "lengths": [4, 0, 1, 3]},
        {"reference_model": "hidden", "lengths": [4, 0, 1, 3], "group_size": torch.tensor([3, 1])},
    ],
    ids=lambda o: "-".join(f"{k}_{v}" for k, v in o.items()).replace(" ", ""),
)
def test_options(impl, device, schedule, options):
    check_linear_loss(make_linear_case(4, 4, 16, 37, seed=5, **options), impl, device, schedule=schedule)


@pytest.mark.parametrize("schedule", ["deferred", "store", "recompute"])
@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_reduction_none(impl, device, schedule, objective):
    """Check reduction="none", with a different gradient for each loss; the schedule `group` does not support it."""
    sizes = torch.tensor([1, 4, 2])
    case = make_linear_case(
        7, 3, 16, 29, objective=objective, rewards=True, group_size=sizes, reduction="none", weights=True
    )
    check_linear_loss(case, impl, device, schedule=schedule)


# 1200 is no multiple of a tile. With an offset of -30, a zero read past the end would be by far the largest logit.
@pairwise({"offset": [-30.0, 1000.0], "vocab": [1, 2, 127, 128, 129, 1200], "schedule": SCHEDULES})
def test_vocabularies_with_an_offset(impl, device, schedule, vocab, offset):
    case = make_linear_case(2, 4, 8, vocab, offset=offset, seed=vocab, reference_model="tokens")
    check_linear_loss(case, impl, device, schedule=schedule)


@schedules
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_chunks(impl, device, schedule, rows):
    """Check a budget of a few rows, which gives many chunks, and groups larger than a chunk."""
    case = make_linear_case(
        8, 5, 16, 37, group_size=torch.tensor([1, 4, 1, 2]), rewards=True, reference_model="hidden", softcap=15.0
    )
    check_linear_loss(case, impl, device, schedule=schedule, memory_budget=rows * 550)


@schedules
@pytest.mark.parametrize("reference_model", ["hidden", "own"])
def test_as_many_rows_as_sequences(impl, device, schedule, reference_model):
    """Check packed input with n = N (one sequence is empty): the reference's log-probs (n,) are not sums (N,)."""
    case = make_linear_case(lengths=[2, 0, 1, 1], reference_model=reference_model, group_size=4, rewards=True)
    result = check_linear_loss(case, impl, device, schedule=schedule)
    ref = exo_kernels.linear_token_logps(
        case.options["ref_hidden"], case.options.get("ref_weight", case.weight), case.labels,
        bias=case.options["bias"] if reference_model == "hidden" else None,
    )  # fmt: skip
    ratios = result["policy_logps"].cpu() - sums_of(ref, case.cu_seqlens())
    torch.testing.assert_close(result["implicit_rewards"].cpu(), 0.1 * ratios, rtol=1e-4, atol=1e-5)


# The log-prob functions.


@pairwise({"layout": ["shifted", "aligned", "packed"], "dtype": DTYPES, "schedule": ["deferred", "store", "recompute"]})
def test_token_logps(impl, device, schedule, dtype, layout):
    options = {"packed": {"lengths": [2, 5, 0, 3]}, "aligned": {"shift": False}}.get(layout, {})
    case = make_linear_case(dtype=dtype, seed=2, softcap=25.0, temperature=0.9, **options)
    check_linear_tokens(case, impl, device, schedule=schedule)


@dtypes
@pytest.mark.parametrize("options", [{}, {"softcap": 10.0, "temperature": 0.7}], ids=["plain", "capped"])
def test_entropy(impl, device, dtype, options):
    """Check entropies of nearly uniform and peaked rows, with gradients through both outputs."""
    case = make_linear_case(3, 4, 16, 130, dtype, seed=3, **options)
    check_linear_tokens(case, impl, device, entropy=True)


def test_entropy_in_chunks(impl, device):
    check_linear_tokens(make_linear_case(3, 4, 16, 130, seed=3), impl, device, entropy=True, memory_budget=3000)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_logps(impl, device, packed):
    """Check that the result is linear_token_logps summed in float64, with the same gradients."""
    case = make_linear_case(4, 5, 8, 50, lengths=[4, 0, 9] if packed else None).to(torch.float32, device)
    options = case.selected(*HEAD, *LAYOUT)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    logps = exo_kernels.linear_token_logps(*leaves, case.labels, impl=impl, **options)
    sums = exo_kernels.linear_sequence_logps(*leaves, case.labels, impl=impl, **options)
    expected = sums_of(logps.detach().double(), case.cu_seqlens())
    assert torch.equal(sums, expected.float())
    weights = torch.arange(1.0, sums.numel() + 1, device=device)
    rows = weights.repeat_interleave(case.cu_seqlens().diff()) if packed else weights[:, None].expand(case.labels.shape)
    for a, b in zip(
        torch.autograd.grad(sums, leaves, weights), torch.autograd.grad(logps, leaves, rows.contiguous()), strict=True
    ):
        assert torch.equal(a, b)
