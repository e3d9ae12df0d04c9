"""Which schedule, which chunks: the choice, what `explain` says of it, and budgets as users write them."""

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
def test_explicit_is_taken_or_refused(schedule):
    assert plan.choose(schedule, needs(), sizes(), MIB) == (schedule, "requested")
    alone = needs(reduced_loss=False)
    if schedule == "group":
        with pytest.raises(ValueError, match="schedule: expected another than 'group'"):
            plan.choose(schedule, alone, sizes(), MIB)
    else:
        assert plan.choose(schedule, alone, sizes(), MIB)[0] == schedule


@pytest.mark.parametrize("most", [1, 7, 10, 64, 1000])
@pytest.mark.parametrize("counts", [[], [0], [5], [3, 0, 4, 9, 1, 1, 30, 2], [10] * 12, [64, 1, 64, 63]])
def test_units_hold_whole_groups(counts, most):
    """Every row once and in order; no chunk over its limit; only a group larger than that is cut, and it is alone."""
    units = plan.group_chunks(counts, most)
    assert [g for unit in units for g in range(unit.groups.start, unit.groups.stop)] == list(range(len(counts)))
    rows = [r for unit in units for part in unit.parts for r in range(part.start, part.stop)]
    assert rows == list(range(sum(counts)))
    for unit in units:
        inside = counts[unit.groups]
        assert all(part.stop - part.start <= most for part in unit.parts)
        assert len(unit.parts) <= 1 or (len(inside) == 1 and inside[0] > most)


def test_chunks_are_even():
    """1100 rows at 1000 a chunk are two of 550: a chunk of 100 rows would keep a GPU half idle."""
    assert [part.stop - part.start for part in plan.even(1100, 1000)] == [550, 550]
    assert len(plan.group_chunks([100] * 11, 1000)) == 2
    assert [u.parts[0].stop - u.parts[0].start for u in plan.group_chunks([100] * 11, 1000)] == [600, 500]


def test_chunks_are_sized_by_bytes():
    """4 V bytes a row and the thin rows beside it, whatever V / D is; never more than 8192 rows."""
    for vocab in (32000, 151936):
        rows = sizes(vocab=vocab).chunk_rows(512 * MIB)
        assert rows == 512 * MIB // (4 * plan.matmul.padded(vocab) + 512 * 4 * 3)
    assert sizes(vocab=100).chunk_rows(512 * MIB) == 8192
    assert sizes().chunk_rows(1) == 1
    stacked = sizes(stacked=True).chunk_rows(512 * MIB)
    assert sizes().chunk_rows(512 * MIB) == pytest.approx(2 * stacked, rel=0.02)
    gpu = plan.Sizes(1000, 512, 32000, torch.bfloat16, torch.device("cuda"), False)
    assert gpu.row_bytes == 6 * 32000 + 512 * (4 + 4 + 2)


def test_explain_tells_what_happens():
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
