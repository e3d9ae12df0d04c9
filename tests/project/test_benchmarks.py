"""The benchmarks' guard, table, comparison of revisions, and the figures in the pages. Nothing here is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import against, guard, harness, planted, publish, table
from benchmarks.accuracy import Case as Accuracy
from benchmarks.linear import Case as Linear
from benchmarks.logits import Case as Logits

ROOT = Path(__file__).parents[2]
OPTIONS = harness.Options("cpu", ours_only=True, keep_memory=True)
LINEAR = Linear(8, 64, 64, 16384, rounds=1)


def row(name, seconds, **figures):
    empty = {"reason": "", "bound": "bound", "errors": {}, "cpu_seconds": seconds, "extra_bytes": None,
             "launches": None, "moved_bytes": None,
             "allocated_bytes": None}  # fmt: skip
    return {"contender": name, "seconds": seconds} | empty | figures


def result(ours, bound=(1.0,) * 5, busy=0.0, **figures):
    rows = [row("bound", list(bound)), row("ours", list(ours), **figures)]
    return {
        "suite": "linear",
        "case": "x",
        "title": "x",
        "unit": "GFLOP/s",
        "work": 1e9,
        "busy": busy,
        "keep_memory": True,
        "steady": True,
        "rows": rows,
    }


SAME = {"extra_bytes": 2**27, "allocated_bytes": 2**27, "launches": 100, "moved_bytes": 10**9, "errors": {"loss": 1e-6}}


@pytest.fixture
def baseline(tmp_path):
    kept = guard.Baseline("machine", tmp_path)
    for _ in range(3):
        kept.add(result([1.1] * 5, **SAME), update=True)
    return kept


@pytest.mark.parametrize(
    ("ours", "figures", "named"),
    [
        ([1.1] * 5, SAME, None),
        ([1.15] * 5, SAME, None),  # within 8%
        ([1.3] * 5, SAME, "ours: time / bound is 1.3, 1.18 x the baseline"),
        ([1.1] * 5, SAME | {"extra_bytes": 2**28}, "ours: MiB is 256, 2.00 x"),
        ([1.1] * 5, SAME | {"launches": 103}, "ours: launches is 103, 1.03 x"),
        ([1.1] * 5, SAME | {"moved_bytes": 2 * 10**9}, "ours: GB moved is 2, 2.00 x"),
        ([1.1] * 5, SAME | {"errors": {"loss": 2e-6}}, "ours: loss error is 2e-06, 2.00 x"),
        ([1.1] * 5, SAME | {"errors": {"loss": float("nan")}}, "ours: loss error is nan"),
    ],
)
def test_the_guard_names_what_regressed(baseline, ours, figures, named):
    regressed = [str(v) for v in baseline.compare(result(ours, **figures)) if v.regressed]
    assert [named in text for text in regressed] == ([True] if named else [])


def test_a_few_slow_rounds_are_no_regression(baseline):
    assert not any(v.regressed for v in baseline.compare(result([1.1, 9.0, 1.12, 9.0, 9.0], **SAME)))


def test_a_spread_above_15_percent_widens_the_margin(baseline):
    noisy = result([1.2, 1.3, 1.5, 1.6, 1.7], **SAME)  # 20% from the smallest to the median
    (verdict,) = [v for v in baseline.compare(noisy) if "time" in v.name]
    assert verdict.allowed == pytest.approx(1.1 * 1.2)
    assert any("spread 20%" in line for line in table.lines(noisy))


def test_on_a_busy_machine_the_cpu_time_is_compared(baseline):
    disturbed = result([2.0] * 5, busy=0.3, cpu_seconds=[1.1] * 5, **SAME)
    names = {v.name for v in baseline.compare(disturbed)}
    assert "ours: CPU time / bound" in names and "ours: time / bound" not in names
    assert not any(v.regressed for v in baseline.compare(disturbed))


def test_fewer_than_five_rounds_judge_no_time(baseline):
    assert not any("time" in v.name for v in baseline.compare(result([9.0] * 4, bound=[1.0] * 4, **SAME)))


def test_a_busy_host_does_not_switch_off_the_times_of_a_gpu(baseline):
    on_gpu = result([1.3] * 5, busy=0.3, **SAME)
    for figures_of in on_gpu["rows"]:
        figures_of["cpu_seconds"] = []
    assert "ours: time / bound" in [v.name for v in baseline.compare(on_gpu) if v.regressed]


def test_a_busy_run_keeps_no_wall_times(tmp_path):
    kept = guard.Baseline("machine", tmp_path)
    added = kept.add(result([2.0] * 5, busy=0.3, **SAME))
    assert "ours: CPU time / bound" in added and "ours: time / bound" not in added


def test_a_baseline_is_read_back_and_keeps_ten_runs(baseline, tmp_path):
    for _ in range(20):
        baseline.add(result([1.1] * 5, **SAME), update=True)
    baseline.save()
    again = guard.Baseline("machine", tmp_path)
    assert again.cases == baseline.cases and not again.new
    assert len(again.cases["linear/x"]["ours: MiB"]) == guard.KEPT
    assert baseline.add(result([1.5] * 5, **SAME)) == [], "only --update-baseline changes kept figures"
    baseline.add(result([1.5] * 5, **SAME), update=True, replace=["ours: time / bound"])
    assert baseline.cases["linear/x"]["ours: time / bound"] == [1.5]
    assert len(baseline.cases["linear/x"]["ours: MiB"]) == guard.KEPT


def test_a_baseline_of_another_format_is_refused_in_one_line(tmp_path):
    (tmp_path / "machine.json").write_text(json.dumps({"format": 99, "cases": {}}))
    with pytest.raises(ValueError, match=r"machine\.json: a baseline of format 99, expected 1: delete it") as error:
        guard.Baseline("machine", tmp_path)
    assert "\n" not in str(error.value)


def test_kept_baselines_can_be_read():
    paths = sorted(guard.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        assert guard.Baseline(path.stem).cases, path


def prepared(errors, call=lambda: None):
    """Return a case with a peer beside ours."""
    contenders = [
        harness.Contender("ours", lambda: torch.ones(1), lambda: (0.0,), 1e-4),
        harness.Contender("peer", call, lambda: (call(),), 1e-3),
    ]
    all_errors = lambda outputs: {name: {"loss": errors[name]} for name in outputs}  # noqa: E731

    class Case(Logits):
        def prepare(self, options):
            return harness.Prepared(contenders, {"absent": "not installed"}, all_errors)

    return Case(8, 2, 2, torch.float32, rounds=2)


def test_a_peer_that_is_wrong_is_not_timed():
    run = harness.Run(prepared({"ours": 1e-6, "peer": 0.5}), OPTIONS)
    run.time(2)
    lines = table.lines(run.result())
    assert any(line.startswith("peer") and "wrong: errors of loss 5.0e-01; allowed 1e-03" in line for line in lines)
    assert any(line.startswith("absent") and "not installed" in line for line in lines)
    assert not run.rows["peer"].seconds and len(run.rows["ours"].seconds) == 2


def test_a_peer_that_raises_is_a_row_with_its_error():
    def fail():
        raise RuntimeError("no kernel for this device\nmore")

    run = harness.Run(prepared({"ours": 1e-6}, fail), OPTIONS)
    assert run.rows["peer"].reason == "RuntimeError: no kernel for this device"


def test_ours_may_not_be_wrong():
    with pytest.raises(AssertionError, match="wrong: errors of loss"):
        harness.Run(prepared({"ours": 0.5, "peer": 0.0}), OPTIONS)


def figures(case):
    return harness.Run(case, OPTIONS).result()


@pytest.mark.parametrize(
    ("slowdown", "case", "named"),
    [
        ("extra-pass", LINEAR, "ours: GB moved"),
        ("extra-pass", Logits(4096, 4, 32, torch.float32, rounds=1), "ours: GB moved"),
        ("weight-gradient-copy", LINEAR, "ours: MiB allocated"),
        ("logits-copy", LINEAR, "ours: MiB allocated"),
        ("logit-in-fp32", Accuracy(2, 256, 4096, torch.float32), "ours: rms error"),
        ("sums-in-fp32", Accuracy(4, 256, 8192, torch.float32), "ours, fp32 sums as reference: rms error"),
    ],
)
def test_a_planted_slowdown_is_found(slowdown, case, named, monkeypatch, tmp_path):
    kept = guard.Baseline("machine", tmp_path)
    kept.add(figures(case))
    assert not any(v.regressed for v in kept.compare(figures(case)))
    planted.SLOWDOWNS[slowdown](monkeypatch.setattr)
    assert named in [v.name for v in kept.compare(figures(case)) if v.regressed]


def comparison(ratios, new=SAME, old=SAME):
    (texts,) = against.worse(result([1.0], **new), result([1.0], **old)).values()
    return against.Comparison("linear/x ours", ratios, texts)


def test_a_comparison_says_what_changed():
    even = [0.99, 1.0, 1.01] * 7
    assert str(comparison(even)).endswith("same")
    assert comparison([1.15 * r for r in even]).regressions == ["1.15 x the time"]
    assert str(comparison([0.8 * r for r in even])).endswith("faster")
    assert "unclear" in str(comparison([0.5, 3.0] * 10)) and not comparison([0.5, 3.0] * 10).regressions
    assert comparison(even, new=SAME | {"allocated_bytes": 2**28}).regressions == ["MiB allocated 256, 128 before"]
    assert comparison(even, new=SAME | {"errors": {"loss": 1e-4}}).regressions == ["loss error 0.0001, 1e-06 before"]


def test_too_few_rounds_have_no_interval(capsys):
    with pytest.raises(SystemExit):
        against.main(["HEAD", "--rounds", "5"])
    assert "--rounds: expected at least 6" in capsys.readouterr().err


def test_an_unknown_revision_is_refused_in_one_line():
    command = [sys.executable, "-m", "benchmarks.against", "no-such-revision"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("cannot check out no-such-revision") and done.stderr.count("\n") == 1


def test_the_pages_have_the_figures_of_the_results(capsys):
    assert publish.main(["--check"]) == 0, capsys.readouterr().out
