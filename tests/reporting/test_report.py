"""The report: its numbers are those of the run's files, failures are marked, and texts of data are escaped.

Most tests check the values of a section; the tests below "The page" check the rendered page.
"""

import html
import json
import math
import re
import statistics

import pytest

from exo import report
from exo.reporting import curves, densities, figures, formatting, methods, page, reading, training
from exo.reporting.statistics import Estimate, envelope
from exo.runs import inputs as run_inputs
from exo.runs import plots
from tests.recipe_run import ALIGNMENT, PROMPTS, TRIALS, make_run, put, put_step

HOSTILE = "<script>alert('x')</script> & \"$1\""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return reading.read(make_run(tmp_path_factory.mktemp("finished") / "run", TRIALS))


@pytest.fixture
def drawn(monkeypatch):
    """Collect the axes of pictures by name instead of drawing files."""
    axes = {}

    def save(figure, path):
        axes[path.stem] = figure.axes[0]
        path.write_bytes(b"a picture")
        return path

    monkeypatch.setattr(plots, "save", save)
    yield axes
    plots.plt.close("all")


def render(results, directory) -> str:
    return page.render(page.build_context(results, directory, seed=0))


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page)).split())


def cells(page: str) -> list[list[str]]:
    """Return the rows of all tables."""
    rows = re.findall("<tr.*?</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall("<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


# Trials and settings.


def test_the_gain_is_that_of_the_files(results):
    """For every setting; with one seed, the standard error is that of evaluation.json too."""
    for setting in results.settings:
        gains = [trial.last.gain for trial in setting.trials]
        assert setting.gain.mean == pytest.approx(statistics.fmean(gain.mean for gain in gains))
        if len(gains) == 1:
            assert setting.gain.standard_error == pytest.approx(gains[0].standard_error)
    assert sorted(len(setting.trials) for setting in results.settings) == [1, 1, 1, 1, 2, 2]


def test_the_best_setting_has_the_highest_gain(results):
    assert [(s.first.series, s.first.setting) for s in results.best_per_series] == [
        ("exo-rw K=2", "beta_pi 0.5"), ("exo-rw K=4", "beta_pi 0.5"), ("dpo-rw K=2", "beta_pi 0.1"), ("bon N=4", ""),
    ]  # fmt: skip
    assert [s.first.series for s in results.best_per_method] == ["exo-rw K=2", "dpo-rw K=2", "bon N=4"]


def test_three_standard_errors_decide(results, monkeypatch):
    setting = results.settings[0]
    for gain, failed in ((2.9, True), (3.1, False), (-9, True)):
        monkeypatch.setitem(setting.__dict__, "gain", Estimate(gain, 0, 0, 1.0))
        assert setting.failed is failed
    monkeypatch.setitem(setting.__dict__, "gain", Estimate(0.0, 0, 0, 0.0))
    assert setting.failed, "a policy that never moved"


# Sections.


def test_the_table_of_methods(results):
    header, rows = methods.methods_table(results)
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == ["SFT", "exo-rw K=2", "exo-rw K=4", "dpo-rw K=2 FAILED", "bon N=4"]
    assert "wins over chosen" not in header
    best = [trial for trial in results.trials if trial.k == 2 and trial.varied == {"beta_pi": 0.5}][:2]
    entries = [reading.load_json(trial.folder / "evaluation.json")["checkpoints"][-1] for trial in best]
    row = table["exo-rw K=2"]
    assert row["reward"].split()[0] == f"{statistics.fmean(e['reward']['mean'] for e in entries):+.2f}"
    assert row["gain over SFT"].split()[0] == f"{statistics.fmean(e['rise']['mean'] for e in entries):+.2f}"
    assert row["KL (nats)"].split()[0] == f"{statistics.fmean(e['kl']['mean'] for e in entries):.2f}"
    wins = statistics.fmean(e["win_rate"]["reference"]["mean"] for e in entries)
    assert row["wins over SFT"].split()[0] == f"{100 * wins:.1f}%"
    assert row["seeds"] == "2" and table["bon N=4"]["KL (nats)"] == f"≤ {math.log(4) - 0.75:.2f}"


def test_failed_lists_every_trial(results):
    gains = [t.last.gain for t in results.trials if t.method == "dpo-rw"]
    lines = [
        f"dpo-rw K=2, beta_pi {beta:g}, seed 0: gain {gain.mean:+.2f} ± {gain.standard_error:.2f}"
        for beta, gain in zip((0.1, 0.5), gains, strict=True)
    ]
    assert methods.failed_trials(results) == lines


def test_the_frontier_shows_every_checkpoint(results, drawn, tmp_path):
    table = {(row[0], row[1]): row for row in cells(render(results, tmp_path)) if len(row) == 7 and row[0] != "run"}
    shown = {(round(x, 9), round(y, 9)) for c in drawn["frontier"].containers for x, y in c.lines[0].get_xydata()}
    entries = [e for t in results.trials for e in reading.load_json(t.folder / "evaluation.json")["checkpoints"]]
    files = {
        (round(e["kl"]["mean"] if "kl" in e else e["kl_bound"], 9), round(e["reward"]["mean"], 9)) for e in entries
    }
    assert len(files) == 15
    assert shown == files | {(0.0, round(results.start.last.reward.mean, 9))}
    thick = next(line for line in drawn["frontier"].lines if line.get_linewidth() == 2 and len(line.get_xdata()))
    points = [(c.kl.mean, c.reward.mean) for t in results.trials if t.method == "exo-rw" for c in t.checkpoints]
    assert [tuple(point) for point in thick.get_xydata().tolist()] == envelope(points)
    k3 = results.trials[0].last.kl_k3
    assert len(table) == 16
    assert table[results.trials[0].name, "final"][4] == f"{k3.mean:.2f} [{k3.low:.2f}, {k3.high:.2f}]"
    assert "frontier-exo-rw" in drawn and "frontier-dpo-rw" not in drawn, "one K has no picture by K"


def test_error_bars_are_the_intervals(results, drawn, tmp_path):
    figures.frontier(results, lambda c: c.reward, "reward", tmp_path / "frontier.png")
    last = results.trials[0].last
    bars = {
        tuple(round(float(x), 9) for x in segment.flatten())
        for container in drawn["frontier"].containers
        for collection in container.lines[2]
        for segment in collection.get_segments()
    }
    across = (last.kl.low, last.reward.mean, last.kl.high, last.reward.mean)
    up = (last.kl.mean, last.reward.low, last.kl.mean, last.reward.high)
    assert {tuple(round(x, 9) for x in bar) for bar in (across, up)} <= bars


def test_at_equal_kl(tmp_path, drawn):
    """Rewards are interpolated between checkpoints; methods without a checkpoint at so small a KL are named."""
    run = make_run(tmp_path / "run", [("exo-rw", 2, {}, 0, 2.0), ("dpo-rw", 2, {}, 0, 1.0)])
    path = run / "evaluation/exo-rw/0-seed0/evaluation.json"
    evaluation = json.loads(path.read_text())
    for entry, kl, reward in zip(evaluation["checkpoints"], (1.0, 3.0), (1.0, 2.0), strict=True):
        entry["kl"]["mean"], entry["reward"]["mean"] = kl, reward
    path.write_text(json.dumps(evaluation))
    other = json.loads((run / "evaluation/dpo-rw/1-seed0/evaluation.json").read_text())["checkpoints"]
    # dpo-rw ends at 1.10 nats, where exo-rw is 1/20 of the way from +1 to +2
    rewards = f"{other[1]['reward']['mean']:+.2f} (dpo-rw) and +1.05 (exo-rw)"
    text = text_of(render(reading.read(run), tmp_path))
    assert f"At 1.10 nats, the largest KL that all methods reach, the envelopes are at {rewards}." in text
    evaluation["checkpoints"][0]["kl"]["mean"] = 2.0
    path.write_text(json.dumps(evaluation))
    assert "All checkpoints of exo-rw have a larger KL." in text_of(render(reading.read(run), tmp_path))


def test_reward_against_the_step(results, drawn, tmp_path):
    curves.progress(results, tmp_path)
    best = results.best_per_method[0]
    line = next(line for line in drawn["reward-steps"].lines if line.get_label() == "exo-rw K=2")
    means = [statistics.fmean(t.checkpoints[i].reward.mean for t in best.trials) for i in (0, 1)]
    assert line.get_xydata().tolist() == [[0, results.start.last.reward.mean], [4, means[0]], [8, means[1]]]
    spread = statistics.fmean(trial.last.spread for trial in best.trials)
    band = drawn["reward-steps"].collections[0].get_paths()[0].vertices
    ends = sorted({round(y, 9) for x, y in band.tolist() if x == 8})
    assert ends == [round(means[1] - spread, 9), round(means[1] + spread, 9)]


def test_a_decline_after_the_best_checkpoint_is_reported(tmp_path, drawn):
    run = make_run(tmp_path / "run", [("exo-rw", 2, {}, 0, -2.0)])
    results = reading.read(run)
    start, last = results.start.last.reward.mean, results.trials[0].last.reward.mean
    decline = f"exo-rw K=2 (from {start:+.2f} at step 0 to {last:+.2f})"
    assert curves.progress(results, tmp_path)["declined"] == [decline]
    assert f"lower at the last checkpoint than at an earlier one: {decline}." in text_of(render(results, tmp_path))


def test_the_sweep_holds_the_other_options(results, drawn, tmp_path):
    sweeps = {sweep["option"]: sweep["best"] for sweep in curves.sweeps(results, tmp_path)}
    assert set(drawn) == {"sweep-K", "sweep-beta_pi"}
    over_k = [c.lines[0].get_xdata().tolist() for c in drawn["sweep-K"].containers]
    assert over_k == [[2, 4]], "exo-rw at beta_pi 0.5; dpo-rw has one K"
    low = next(s for s in results.settings if s.first.method == "exo-rw" and s.first.varied == {"beta_pi": 0.1})
    first = drawn["sweep-beta_pi"].containers[0].lines[0].get_xydata().tolist()
    assert first[0] == [0.1, pytest.approx(100 * low.win_rate("reference").mean)] and first[1][0] == 0.5
    assert sweeps["beta_pi"][0] == "exo-rw at 0.5"


def test_rows_and_truncated_samples_are_counted(results):
    section = training.data_rows(results)
    assert section["noted"] == [["sft", "9", "7", "2", "empty: 2"]] and section["skipped"] == 2
    assert ["sft, final", "25.0%"] in section["truncated"]


def test_training_curves_leave_evaluations_out(results, drawn, tmp_path):
    section = training.training(results, tmp_path)
    panels = {axis.get_ylabel(): axis for axis in drawn.values()}
    smoothed = [line for line in panels["loss (nats)"].lines if line.get_label() == "exo-rw K=2"]
    assert smoothed[0].get_xydata().tolist() == [[1, 2.0], [2, 2.0]]
    assert section["clipped"][0] == "50% (exo-rw K=2)"
    assert section["constant_zero"] == ["share of prompts with a stuck pair"]


def test_results_of_judges_are_shown(tmp_path):
    run = make_run(tmp_path / "run", TRIALS[:1])
    judged = {"a": "exo", "win_rate": {"mean": 0.6, "low": 0.5, "high": 0.7}, "ties": {"n": 3}, "agreement": None}
    put(run / "judge/one/judge.json", judged)
    assert methods.win_rates(reading.read(run))["comparisons"] == {
        "judge/one": [["a", "exo"], ["win_rate", "0.600 [0.500, 0.700]"], ["ties.n", "3"], ["agreement", "undecided"]]
    }


def test_densities_of_a_run(results, drawn, tmp_path):
    section = densities.densities(results, tmp_path)
    assert set(drawn) == {"density-rw-1"}
    lines = {line.get_label(): line for line in drawn["density-rw-1"].lines}
    assert lines["exo-rw K=2: ESS 64 of 64"].get_ydata() == pytest.approx(1)
    assert any(label.startswith("optimal, beta 0.25") for label in lines)
    (picture,) = section["pictures"]
    assert (picture["target"], picture["number"], picture["prompt"]) == ("rw", 1, PROMPTS[0])


def test_equal_samples_cost_only_their_picture(tmp_path, drawn):
    run = make_run(tmp_path / "run", TRIALS[:1])
    row = {"prompt": "p", "logps": [-1.0] * 4, "ref_logps": [-2.0] * 4, "rewards": [1.0] * 4}
    put(run / "evaluation/exo-rw/0-seed0/density.jsonl", [row])
    text = text_of(render(reading.read(run), tmp_path))
    assert "Not drawn: prompt 1 (rw): density: expected samples of different log-probability" in text


def test_the_optimum_of_rewards_on_another_scale_is_not_drawn(tmp_path, drawn):
    run = make_run(tmp_path / "run", TRIALS[:1])
    trial = reading.read(run).trials[0]
    row = {"ref_logps": [-1.0, -2.0, -4.0], "logps": [-1.0, -2.0, -3.0], "rewards": [1.0, 2.0, 3.0]}
    assert list(densities.density_curves([trial], [row])) == ["optimal, beta 0.25", "exo-rw K=2"]
    trial.arguments["reward_norm"] = "global"
    assert list(densities.density_curves([trial], [row])) == ["exo-rw K=2"]


def test_a_long_prompt_shows_its_end():
    assert formatting.shorten("a\n b") == "a b"
    assert formatting.shorten("x" * 90 + "end") == "…" + "x" * 77 + "end"


# The page.


def test_the_page_shows_every_section(results, drawn, tmp_path):
    context = page.build_context(results, tmp_path, seed=0)
    assert all(context.values()), "the run has something for every section"
    rendered = page.render(context)
    text, rows = text_of(rendered), cells(rendered)
    assert headings(rendered) == [
        "Reward versus KL", "Win rates", "Reward and KL during training", "Sweeps",
        "Density relative to the reference", "Training", "Data rows", "Samples", "Commands",
    ]  # fmt: skip
    header, methods_rows = context["methods"]
    assert rows[: 1 + len(methods_rows)] == [header, *methods_rows]
    for section, table in (("win_rates", "rows"), ("data_rows", "noted"), ("data_rows", "truncated")):
        assert all(row in rows for row in context[section][table]), section
    assert rendered.count("<img") == len(drawn) == len(set(drawn))
    gain = formatting.plus_minus(max(setting.gain for setting in results.best_per_series))
    winner, rate = context["win_rates"]["best"]
    for sentence in (
        "Started 02 January 2026, 03:04 UTC; seeds 0, 1; K 2, 4. Evaluated on 8 held-out prompts, 2 samples each at",
        f"bon N=4 has the largest gain over SFT: {gain} (KL ≤ {math.log(4) - 0.75:.2f} nats).",
        "3 of 4 methods (counting each K separately) beat SFT by more than 3 standard errors.",
        "FAILED: all trials of these methods, at their last checkpoints " + " ".join(context["failed_trials"]),
        f"{winner} has the highest win rate over the reference: {formatting.percent_interval(rate)} of all pairs",
        "beta_pi: the win rate is highest for exo-rw at 0.5",
        "The gradient was clipped in 50% (exo-rw K=2), 50% (dpo-rw K=2) and 50% (bon N=4) of the steps.",
        "Not drawn because it is zero at every step: share of prompts with a stuck pair.",
        "rw, prompt 1: “prompt 0”",
        "3 of 8 held-out prompts, drawn at random with seed 0",
        "18 of 18 steps finished, in 18 s of work in total.",
        "python -m exo.train",
    ):
        assert sentence in text, sentence
    assert re.findall('<tr class="failed"><td>(.*?)</td>', rendered) == ["dpo-rw K=2 FAILED"]
    assert rendered.count("<dt>prompt</dt>") == 3
    for name, examples in context["samples"]["examples"].items():
        for i in context["samples"]["indices"]:
            sample = f"<dt>{name}, reward {examples[i].rewards[0]:+.2f}</dt><dd>{examples[i].completions[0]}</dd>"
            assert sample in rendered


def test_the_report_is_one_file(tmp_path, capsys):
    run = make_run(tmp_path / "run", [TRIALS[0], TRIALS[5]], text=HOSTILE)
    put(run / "judge/one/judge.json", {HOSTILE: HOSTILE})
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 0
    output = capsys.readouterr().out
    assert "dpo-rw K=2 FAILED" in output and "FAILED dpo-rw K=2, beta_pi 0.1, seed 0: gain" in output
    rendered = (run / "report/report.html").read_text(encoding="utf-8")
    assert "<script" not in rendered, "texts of data are escaped"
    assert html.unescape(rendered).count(HOSTILE) > 4 and html.unescape(rendered).count("<script") > 4
    assert set(re.findall(r'(?:src|href)="(.{14})', rendered)) == {"data:image/png"} and "http" not in rendered
    pictures = list((run / "report").glob("*.png"))
    assert len(pictures) == rendered.count("<img") > 5
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    record = json.loads((run / "report/run.json").read_text())
    assert "finished" in record and record["stage"] == "report"


def test_an_unfinished_run(tmp_path, drawn):
    run = make_run(tmp_path / "run", TRIALS[:4])
    record = json.loads((run / "evaluation/exo-rw/1-seed1/run.json").read_text())
    del record["finished"]
    put(run / "evaluation/exo-rw/1-seed1/run.json", record)
    (run / "evaluation/exo-rw/2-seed0/run.json").unlink()
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 0
    text = text_of((run / "report/report.html").read_text(encoding="utf-8"))
    assert "Unfinished: 2 of 10 steps have no result yet." in text
    assert "evaluation/exo-rw/1-seed1: did not finish" in text
    assert "evaluation/exo-rw/2-seed0: has not started" in text
    assert [len(s.trials) for s in reading.read(run).settings] == [1, 1]


@pytest.mark.parametrize("missing", ["evaluation/sft", "sft"])
def test_without_sft_nothing_is_compared(tmp_path, drawn, missing):
    run = make_run(tmp_path / "run", TRIALS[:1])
    for name in {missing, "evaluation/sft"}:
        (run / name / "run.json").unlink()
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 0
    text = text_of((run / "report/report.html").read_text(encoding="utf-8"))
    assert "No method has been evaluated yet." in text and f"{missing}: has not started" in text
    assert "clipped in 50% (exo-rw K=2)" in text, "trained methods are shown"


def test_a_result_whose_input_has_changed_is_named(tmp_path, drawn):
    original = make_run(tmp_path / "original", TRIALS[:1])
    weights, evaluation = "exo-rw/0-seed0/model.safetensors", "evaluation/exo-rw/0-seed0"
    (original / weights).write_text("weights")
    model = str(original / "exo-rw/0-seed0")
    inputs = {"model": run_inputs.fingerprint(model), "oracle": "elsewhere"}
    arguments = {"output_dir": str(original / evaluation), "model": model, "oracle": "elsewhere:oracle"}
    put_step(original / evaluation, "evaluate", 50, arguments=arguments, inputs=inputs)
    run = original.rename(tmp_path / "moved")
    put_step(run / "exo-rw/0-seed0", "align", 55, arguments=ALIGNMENT)  # a second time, with the same result
    assert not any(step.stale for step in reading.read(run).steps)
    (run / weights).write_text("others")
    results = reading.read(run)
    assert [(s.name, s.stale) for s in results.steps if s.stale] == [(evaluation, "exo-rw/0-seed0")]
    text = text_of(render(results, tmp_path))
    assert "Out of date" in text and "evaluation/exo-rw/0-seed0: exo-rw/0-seed0" in text


def test_a_result_of_other_options_than_the_plans_is_named(tmp_path):
    run = make_run(tmp_path / "run", TRIALS[:1])
    record = json.loads((run / "run.json").read_text())
    for entry in record["plan"]:
        entry["options"] = ALIGNMENT | {"beta_pi": 0.1} if entry["stage"] == "align" else {}
    put(run / "run.json", record)
    results = reading.read(run)
    assert [(s.name, s.stale) for s in results.steps if s.stale] == [("exo-rw/0-seed0", "--beta_pi")]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_with_truncated_sampling_the_page_explains_the_kl(tmp_path, drawn, top_p):
    run = make_run(tmp_path / "run", TRIALS[:1])
    path = run / "evaluation/exo-rw/0-seed0/evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_p": top_p}))
    text = text_of(render(reading.read(run), tmp_path))
    assert ("the KL is that of the full distribution" in text) == (top_p < 1)


# Refusals.


def test_other_prompts_are_not_compared(tmp_path, capsys):
    run = make_run(tmp_path / "run", TRIALS[:1])
    path = run / "evaluation/exo-rw/0-seed0/samples/final.jsonl"
    path.write_text(path.read_text().replace("prompt 3", "prompt 33"))
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 2
    error = capsys.readouterr().err
    assert "expected the prompts of" in error and len(error.splitlines()) == 1 and not (run / "report").exists()


def test_a_directory_without_a_recipes_run_is_refused(tmp_path, capsys):
    assert report.main(["--run", str(tmp_path), "--output_dir", str(tmp_path / "report")]) == 2
    assert "expected the run of a recipe; python -m exo.train makes one" in capsys.readouterr().err
    run = make_run(tmp_path / "run", [])
    assert report.main(["--run", str(run), "--output_dir", str(run), "--overwrite_output_dir"]) == 1
    assert "which this run reads" in capsys.readouterr().err
    assert (run / "sft/run.json").exists()


@pytest.mark.parametrize("content, expected", [('{"k": ', "expected JSON"), ("{}", "expected files as exo.train")])
def test_a_broken_evaluation_is_refused_in_a_line(tmp_path, capsys, content, expected):
    run = make_run(tmp_path / "run", TRIALS[:1])
    path = run / "evaluation/sft/evaluation.json"
    path.write_text(content)
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 2
    error = capsys.readouterr().err
    assert expected in error and str(run) in error and len(error.splitlines()) == 1
    assert str(path) in error or content == "{}"
