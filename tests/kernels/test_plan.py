"""The plan of a call: the choice of schedule and chunks, `explain`, and the parsing of budgets."""

import pytest
import torch
from cases import IGNORED
from linear_cases import make_linear_case

import exo_kernels
from exo_kernels.schedules import plan

MIB = 2**20
CPU = torch.device("cpu")


def needs(hidden=True, weight=True, bias=False, entropy=False, reduced_loss=True) -> plan.Needs:
    return plan.Needs(hidden, weight, bias, entropy, reduced_loss)


def sizes(rows=1000, vocab=32000, dtype=torch.float32, device=CPU, stacked=False) -> plan.Sizes:
    return plan.Sizes(rows, 512, vocab, dtype, device, stacked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(7, 7), ("7", 7), ("512MiB", 512 * MIB), ("0.5 GiB", 512 * MIB), ("1gb", 10**9), (" 2 kib ", 2048), ("3B", 3)],
)
def test_budgets(text, expected):
    assert plan.parse_budget(text) == expected


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "", "much", "-3MiB", "3 TiBs", "0", "1e3"])
def test_bad_budgets(bad):
    with pytest.raises(ValueError, match=r"^memory_budget: expected bytes > 0 .*; got "):
        plan.parse_budget(bad)


@pytest.mark.parametrize(
    ("needed", "budget", "expected"),
    [
        (needs(False, False), 512 * MIB, "score"),
        (needs(weight=False), 512 * MIB, "deferred"),
        (needs(weight=False, reduced_loss=False), MIB, "deferred"),
        (needs(), 512 * MIB, "group"),
        (needs(hidden=False), MIB, "group"),
        (needs(weight=False, bias=True), MIB, "group"),
        (needs(reduced_loss=False), 512 * MIB, "store"),
        (needs(reduced_loss=False), 64 * MIB, "recompute"),
        (needs(weight=False, entropy=True, reduced_loss=False), 512 * MIB, "recompute"),
    ],
)
def test_auto(needed, budget, expected):
    assert plan.choose("auto", needed, sizes(), budget)[0] == expected


@pytest.mark.parametrize("schedule", ["deferred", "group", "store", "recompute"])
def test_explicit_schedule_is_used_or_refused(schedule):
    assert plan.choose(schedule, needs(), sizes(), MIB) == (schedule, "requested")
    unreduced = needs(reduced_loss=False)
    if schedule == "group":
        with pytest.raises(ValueError, match="schedule: expected another than 'group'"):
            plan.choose(schedule, unreduced, sizes(), MIB)
    else:
        assert plan.choose(schedule, unreduced, sizes(), MIB)[0] == schedule


@pytest.mark.parametrize("limit", [1, 7, 10, 64, 1000])
@pytest.mark.parametrize("counts", [[], [0], [5], [3, 0, 4, 9, 1, 1, 30, 2], [10] * 12, [64, 1, 64, 63]])
def test_units_hold_complete_groups(counts, limit):
    """Check that units hold all rows in order, and that only a group larger than a chunk is split, in its own unit."""
    units = plan.group_chunks(counts, limit)
    assert [g for unit in units for g in range(unit.groups.start, unit.groups.stop)] == list(range(len(counts)))
    rows = [r for unit in units for part in unit.parts for r in range(part.start, part.stop)]
    assert rows == list(range(sum(counts)))
    for unit in units:
        inside = counts[unit.groups]
        assert all(part.stop - part.start <= limit for part in unit.parts)
        assert len(unit.parts) <= 1 or (len(inside) == 1 and inside[0] > limit)


def test_chunks_are_even():
    """Check that 1100 rows with a limit of 1000 are two chunks of 550: a chunk of 100 rows would not fill a GPU."""
    assert [part.stop - part.start for part in plan.even(1100, 1000)] == [550, 550]
    assert len(plan.group_chunks([100] * 11, 1000)) == 2
    assert [u.parts[0].stop - u.parts[0].start for u in plan.group_chunks([100] * 11, 1000)] == [600, 500]


def test_chunks_are_sized_by_bytes():
    """Check that a row counts 4 V bytes plus its hidden states, and that a chunk has at most 8192 rows."""
    for vocab in (32000, 151936):
        rows = sizes(vocab=vocab).chunk_rows(512 * MIB)
        assert rows == 512 * MIB // (4 * plan.matmul.padded(vocab) + 512 * 4 * 3)
    assert sizes(vocab=100).chunk_rows(512 * MIB) == 8192
    assert sizes().chunk_rows(1) == 1
    stacked = sizes(stacked=True).chunk_rows(512 * MIB)
    assert sizes().chunk_rows(512 * MIB) == pytest.approx(2 * stacked, rel=0.02)
    gpu = plan.Sizes(1000, 512, 32000, torch.bfloat16, torch.device("cuda"), False)
    assert gpu.row_bytes == 6 * 32000 + 512 * (4 + 4 + 2)


def test_explain_describes_the_call():
    case = make_linear_case(8, 6, 16, 997, bias=False, group_size=4)
    n = int((case.labels[:, 1:] != IGNORED).sum())
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    one = 2 * n * 16 * 997
    planned = exo_kernels.explain(hidden, weight, case.labels, group_size=4)
    assert (planned.schedule, planned.rows, planned.rows_with_loss, planned.chunks) == ("group", 48, n, 1)
    assert planned.flops == planned.bound_flops == 3 * one
    assert planned.extra_bytes == n * (4 * 1008 + 16 * 12)
    assert str(planned).startswith("group: the head is trained and the loss is called as one.")
    small = exo_kernels.explain(hidden, weight, case.labels, group_size=4, memory_budget=10 * 4300)
    assert small.oversized_groups == 2 and small.chunk_rows == 10 and small.flops == 4 * one
    assert small.extra_bytes <= 10 * 4300
    logps = exo_kernels.explain(hidden, weight, case.labels, loss=False, memory_budget="64KiB")
    assert logps.schedule == "recompute" and logps.flops == 4 * one and logps.bound_flops == 3 * one
    both = exo_kernels.explain(hidden, weight, case.labels, ref_hidden=case.hidden.detach())
    assert both.flops == 4 * one
    frozen = exo_kernels.explain(hidden, weight.detach(), case.labels, reduction="none")
    assert frozen.schedule == "deferred" and frozen.flops == 2 * one
    with torch.no_grad():
        assert exo_kernels.explain(hidden, weight, case.labels).flops == one


def test_a_group_that_fills_a_chunk_counts_for_the_target():
    """Check that 20 rows in chunks of 8 are filled to 7 each, not to 6 as the 12 rows of the smaller groups would."""
    chunks = plan.group_chunks([3, 3, 1, 3, 2, 8], 8)
    assert [chunk.groups for chunk in chunks] == [slice(0, 3), slice(3, 5), slice(5, 6)]
