"""The report: its numbers are those of the run's files, failures are marked, half a run is a report, texts stay texts.

Runs are made up here, file by file, as the stages would write them; nothing is trained.
"""

import html
import json
import math
import random
import re
import statistics

import pytest
import torch

from exo import report
from exo.evaluation import density
from exo.evaluation import metrics as evaluation_metrics
from exo.reporting import figures, outcomes, results
from exo.reporting import html as reporting_html
from exo.reporting import training as training_section
from exo.runs import inputs as run_inputs
from exo.runs import plots

PROMPTS = [f"prompt {i}" for i in range(8)]
WHEN = "2026-01-02T03:04:{:02d}+00:00"
HOSTILE = "<script>alert('x')</script> & \"$1\""


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) if isinstance(value, dict) else "".join(json.dumps(row) + "\n" for row in value))


def put_step(directory, stage: str, begun: int, **facts):
    record = {"stage": stage, "command": ["python", "-m", f"exo.{stage}"], "versions": {"python": "3"}, "inputs": {}}
    times = {"platform": "Linux", "started": WHEN.format(begun), "finished": WHEN.format(begun + 1)}
    arguments = {"output_dir": str(directory)} | facts.pop("arguments", {})
    put(directory / "run.json", record | times | {"arguments": arguments} | facts)


def summary(values):
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - 2 * error, "high": mean + 2 * error, "standard_error": error}


def rewards(mean: float, seed: int):
    """Two samples a prompt; prompts and samples differ."""
    draw = random.Random(seed)
    return [[mean + 0.3 * i + draw.gauss(0, 0.5) for _ in range(2)] for i in range(len(PROMPTS))]


def put_evaluation(directory, checkpoints, baseline=None, bound=None, text="fine"):
    """`checkpoints`: (name, step, KL, rewards)."""
    entries = []
    for name, step, kl, scores in checkpoints:
        entry = {
            "name": name,
            "step": step,
            "reward": summary(evaluation_metrics.means(scores)),
            "spread": evaluation_metrics.spread(scores),
        }
        entry |= {"accuracy": summary(evaluation_metrics.accuracies(scores)), "unfinished": 0.25, "win_rate": {}}
        if baseline:
            rises = [
                a - b for a, b in zip(evaluation_metrics.means(scores), evaluation_metrics.means(baseline), strict=True)
            ]
            entry |= {
                "rise": summary(rises),
                "win_rate": {"reference": summary(evaluation_metrics.win_rates(scores, baseline))},
            }
        if bound:
            entry["kl_bound"] = bound
        else:
            around = [kl + 0.01 * i for i in range(-4, 5)]
            entry |= {"kl": summary(around), "kl_k3": summary([1.1 * x for x in around])}
        entries.append(entry)
        rows = zip(PROMPTS, scores, strict=True)
        put(directory / "samples" / f"{name}.jsonl", [
            {"prompt": prompt, "completions": [text, f"{text} again"], "rewards": row} for prompt, row in rows
        ])  # fmt: skip
    asked = {
        "k": 2,
        "temperature": 0.8,
        "top_p": 1.0,
        "scorer": "an oracle",
        "prompts": len(PROMPTS),
        "checkpoints": entries,
    }
    put(directory / "evaluation.json", asked)
    put_step(directory, "evaluate", 50)


def make_run(directory, trials, text="fine"):
    """`trials`: (method, k, varied, seed, mean reward at the last checkpoint); a half of the rise comes before it."""
    plan = [{"name": "sft", "stage": "sft", "needs": []}]
    plan.append({"name": "evaluation/sft", "stage": "evaluate", "needs": ["sft"], "method": "sft"})
    put_step(directory / "sft", "sft", 1, rows={"format": "x", "rows": 9, "skipped": {"empty": 2}, "noted": {}})
    put(directory / "sft" / "metrics.jsonl", [{"step": i, "loss": 1 / i, "clipped": 0.0} for i in (1, 2, 3)])
    start = rewards(0.0, 99)
    put_evaluation(directory / "evaluation/sft", [("final", 3, 0.0, start)], text=text)
    for i, (method, k, varied, seed, mean) in enumerate(trials):
        name = f"{method}/{i}-seed{seed}"
        facts = {"method": method, "k": k, "seed": seed, "varied": varied} | ({"n": 4} if method == "bon" else {})
        plan.append({"name": name, "stage": "align", "needs": ["sft"]})
        plan.append({"name": f"evaluation/{name}", "stage": "evaluate", "needs": [name], **facts})
        put_step(directory / name, "align", 10, arguments={"beta_pi": 0.5, "beta_r": 0.5, "reward_norm": "none"})
        lines = [
            {"step": s, "loss": 2.0, "grad_norm": 3.0, "clipped": float(s == 1), "rewards/stuck": 0.0} for s in (1, 2)
        ]
        put(directory / name / "metrics.jsonl", [*lines, {"step": 2, "eval_loss": 7.0}])
        half, last = rewards(mean / 2, 10 + i), rewards(mean, 20 + i)
        points = [("step-4", 4, 0.5 + 0.1 * i, half), ("final", 8, 1.0 + 0.1 * i, last)]
        bound = {"bound": math.log(4) - 0.75} if method == "bon" else {}
        put_evaluation(directory / "evaluation" / name, points[-1:] if bound else points, start, text=text, **bound)
        draw = random.Random(i)
        ref = [draw.gauss(-20, 3) for _ in range(64)]
        rows = [{"prompt": PROMPTS[0], "logps": ref, "ref_logps": ref, "rewards": [draw.random() for _ in ref]}]
        put(directory / "evaluation" / name / "density.jsonl", rows)
    recipe = {"title": f"A title {text}", "seeds": [0, 1]}
    put_step(directory, "train", 0, recipe=recipe, plan=plan)
    return directory


TRIALS = [
    ("exo-rw", 2, {"beta_pi": 0.1}, 0, 1.0), ("exo-rw", 2, {"beta_pi": 0.1}, 1, 1.4),
    ("exo-rw", 2, {"beta_pi": 0.5}, 0, 2.0), ("exo-rw", 2, {"beta_pi": 0.5}, 1, 2.4),
    ("exo-rw", 4, {"beta_pi": 0.5}, 0, 1.5), ("dpo-rw", 2, {"beta_pi": 0.1}, 0, 0.01),
    ("dpo-rw", 2, {"beta_pi": 0.5}, 0, -0.5), ("bon", None, {}, 0, 3.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, read."""
    return results.read(make_run(tmp_path_factory.mktemp("whole") / "run", TRIALS))


@pytest.fixture
def drawn(monkeypatch):
    """Pictures are kept, by name, and not drawn to files."""
    kept = {}

    def keep(figure, path):
        kept[path.stem] = figure.axes[0]
        path.write_bytes(b"a picture")
        return path

    monkeypatch.setattr(plots, "save", keep)
    yield kept
    plots.plt.close("all")


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page)).split())


def cells(page: str) -> list[list[str]]:
    """Rows of all tables."""
    rows = re.findall("<tr.*?</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall("<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]


# Means over prompts and seeds.


def test_crossed_by_hand():
    """Two seeds, two prompts: 4.5/2 of the prompts, 2/2 of the seeds, less 1/4 of what neither explains."""
    found = results.crossed([[1.0, 3.0], [2.0, 6.0]])
    assert found.mean == 3.0
    assert found.standard_error == pytest.approx(math.sqrt(2.25 + 1 - 0.25))
    assert (found.low, found.high) == pytest.approx((3 - 1.96 * math.sqrt(3), 3 + 1.96 * math.sqrt(3)))


def test_crossed_of_one_seed_is_the_error_over_prompts():
    assert results.crossed([[1.0, 2.0, 6.0]]).standard_error == pytest.approx(math.sqrt(7 / 3))


def test_crossed_is_unbiased():
    """Against what prompts of variance 1, seeds of 4 and noise of 9 do to a mean over 6 prompts and 5 seeds."""
    torch.manual_seed(0)
    prompts, seeds, noise = torch.randn(2000, 1, 6), 2 * torch.randn(2000, 5, 1), 3 * torch.randn(2000, 5, 6)
    squares = [results.crossed(table).standard_error ** 2 for table in (prompts + seeds + noise).tolist()]
    assert statistics.fmean(squares) == pytest.approx(1 / 6 + 4 / 5 + 9 / 30, rel=0.05)


def test_over_seeds_by_hand():
    first, second = results.Estimate(1, 0, 2, 0.3), results.Estimate(3, 2, 4, 0.5)
    found = results.over_seeds([first, second])
    assert found is not None and found.mean == 2
    assert found.standard_error == pytest.approx(math.hypot(0.4, 1.0))
    assert results.over_seeds([first]) == first
    assert results.over_seeds([first, None]) is None


def test_the_rise_is_that_of_the_files(whole):
    """From the samples for every setting; of one seed it is what evaluation.json says, error and all."""
    for setting in whole.settings:
        said = [trial.last.rise for trial in setting.trials]
        assert setting.rise.mean == pytest.approx(statistics.fmean(rise.mean for rise in said))
        if len(said) == 1:
            assert setting.rise.standard_error == pytest.approx(said[0].standard_error)
    assert sorted(len(setting.trials) for setting in whole.settings) == [1, 1, 1, 1, 2, 2]


def test_the_best_setting_is_the_one_that_rises_most(whole):
    assert [(s.first.series, s.first.setting) for s in whole.best] == [
        ("exo-rw K=2", "beta_pi 0.5"), ("exo-rw K=4", "beta_pi 0.5"), ("dpo-rw K=2", "beta_pi 0.1"), ("bon N=4", ""),
    ]  # fmt: skip
    assert [s.first.series for s in whole.best_of_method] == ["exo-rw K=2", "dpo-rw K=2", "bon N=4"]


def test_the_envelope():
    points = [(3, 2), (1, 1), (1, 0), (2, 0.5), (0.5, -1), (4, 2), (5, 3)]
    assert results.envelope(points) == [(0.5, -1), (1, 1), (3, 2), (5, 3)]


# What the page says.


def test_the_table_of_methods(whole):
    header, rows = outcomes.methods(whole)
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == ["SFT", "exo-rw K=2", "exo-rw K=4", "dpo-rw K=2 FAILED", "bon N=4"]
    assert "wins over chosen" not in header
    best = [trial for trial in whole.trials if trial.k == 2 and trial.varied == {"beta_pi": 0.5}][:2]
    entries = [results.evaluation(trial.folder)["checkpoints"][-1] for trial in best]
    row = table["exo-rw K=2"]
    assert row["reward"].split()[0] == f"{statistics.fmean(e['reward']['mean'] for e in entries):+.2f}"
    assert row["KL (nats)"].split()[0] == f"{statistics.fmean(e['kl']['mean'] for e in entries):.2f}"
    wins = statistics.fmean(e["win_rate"]["reference"]["mean"] for e in entries)
    assert row["wins over SFT"].split()[0] == f"{100 * wins:.1f}%"
    assert row["seeds"] == "2" and table["bon N=4"]["KL (nats)"] == f"≤ {math.log(4) - 0.75:.2f}"


def test_failed_lists_every_trial(whole):
    lines = outcomes.trials_of_failed(whole)
    rises = [t.last.rise for t in whole.trials if t.method == "dpo-rw"]
    assert lines == [
        f"dpo-rw K=2, beta_pi {beta:g}, seed 0: rise {rise.mean:+.2f} ± {rise.standard_error:.2f}"
        for beta, rise in zip((0.1, 0.5), rises, strict=True)
    ]
    page = "".join(outcomes.headline(whole, outcomes.methods(whole)))
    assert "3 of 4 beat the start by more than 3 standard errors" in page
    assert re.findall('<tr class="failed"><td>(.*?)</td>', page) == ["dpo-rw K=2 FAILED"]


def test_three_standard_errors_decide(whole, monkeypatch):
    setting = whole.settings[0]
    for rise, failed in ((2.9, True), (3.1, False), (-9, True)):
        monkeypatch.setitem(setting.__dict__, "rise", results.Estimate(rise, 0, 0, 1.0))
        assert setting.failed is failed
    monkeypatch.setitem(setting.__dict__, "rise", results.Estimate(0.0, 0, 0, 0.0))
    assert setting.failed, "a policy that never moved"


def test_the_frontier_shows_every_checkpoint(whole, drawn, tmp_path):
    page = outcomes.frontiers(whole, tmp_path)
    shown = {(round(x, 9), round(y, 9)) for c in drawn["frontier"].containers for x, y in c.lines[0].get_xydata()}
    entries = [e for t in whole.trials for e in results.evaluation(t.folder)["checkpoints"]]
    files = {
        (round(e["kl"]["mean"] if "kl" in e else e["kl_bound"], 9), round(e["reward"]["mean"], 9)) for e in entries
    }
    assert len(files) == 15
    assert shown == files | {(0.0, round(whole.start.last.reward.mean, 9))}
    thick = next(line for line in drawn["frontier"].lines if line.get_linewidth() == 2 and len(line.get_xdata()))
    points = [(c.kl.mean, c.reward.mean) for t in whole.trials if t.method == "exo-rw" for c in t.checkpoints]
    assert [tuple(point) for point in thick.get_xydata().tolist()] == results.envelope(points)
    table = {(row[0], row[1]): row for row in cells(page)[1:]}
    k3 = whole.trials[0].last.kl_k3
    assert len(table) == 16
    assert table[whole.trials[0].name, "final"][4] == f"{k3.mean:.2f} [{k3.low:.2f}, {k3.high:.2f}]"
    assert "frontier-exo-rw" in drawn and "frontier-dpo-rw" not in drawn, "one K has no picture by K"


def test_error_bars_are_the_intervals(whole, drawn, tmp_path):
    figures.frontier(whole, lambda c: c.reward, "reward", tmp_path / "frontier.png")
    last = whole.trials[0].last
    bars = {
        tuple(round(float(x), 9) for x in segment.flatten())
        for container in drawn["frontier"].containers
        for example in container.lines[2]
        for segment in example.get_segments()
    }
    across = (last.kl.low, last.reward.mean, last.kl.high, last.reward.mean)
    up = (last.kl.mean, last.reward.low, last.kl.mean, last.reward.high)
    assert {tuple(round(x, 9) for x in bar) for bar in (across, up)} <= bars


def test_at_equal_kl(tmp_path, drawn):
    """Between two checkpoints on a line; a method without one as near to the reference is named."""
    run = make_run(tmp_path / "run", [("exo-rw", 2, {}, 0, 2.0), ("dpo-rw", 2, {}, 0, 1.0)])
    path = run / "evaluation/exo-rw/0-seed0/evaluation.json"
    asked = json.loads(path.read_text())
    for entry, kl, reward in zip(asked["checkpoints"], (1.0, 3.0), (1.0, 2.0), strict=True):
        entry["kl"]["mean"], entry["reward"]["mean"] = kl, reward
    path.write_text(json.dumps(asked))
    other = json.loads((run / "evaluation/dpo-rw/1-seed0/evaluation.json").read_text())["checkpoints"]
    page = text_of(outcomes.frontiers(results.read(run), tmp_path))
    # dpo-rw ends at 1.10 nats, where exo-rw has gone 1/20 of the way from +1 to +2
    heights = f"{other[1]['reward']['mean']:+.2f} (dpo-rw) and +1.05 (exo-rw)"
    assert f"At 1.10 nats, the largest KL that every method reaches, the envelopes stand at {heights}." in page
    asked["checkpoints"][0]["kl"]["mean"] = 2.0
    path.write_text(json.dumps(asked))
    assert "No checkpoint is as near to the reference for exo-rw." in text_of(
        outcomes.frontiers(results.read(run), tmp_path)
    )


def test_reward_against_the_step(whole, drawn, tmp_path):
    outcomes.progress(whole, tmp_path)
    best = whole.best_of_method[0]
    line = next(line for line in drawn["reward-steps"].lines if line.get_label() == "exo-rw K=2")
    means = [statistics.fmean(t.checkpoints[i].reward.mean for t in best.trials) for i in (0, 1)]
    assert line.get_xydata().tolist() == [[0, whole.start.last.reward.mean], [4, means[0]], [8, means[1]]]
    spread = statistics.fmean(trial.last.spread for trial in best.trials)
    band = drawn["reward-steps"].collections[0].get_paths()[0].vertices
    ends = sorted({round(y, 9) for x, y in band.tolist() if x == 8})
    assert ends == [round(means[1] - spread, 9), round(means[1] + spread, 9)]


def test_the_sweep_holds_the_other_options(whole, drawn, tmp_path):
    page = text_of(outcomes.sweeps(whole, tmp_path))
    assert set(drawn) == {"sweep-K", "sweep-beta_pi"}
    over_k = [c.lines[0].get_xdata().tolist() for c in drawn["sweep-K"].containers]
    assert over_k == [[2, 4]], "exo-rw at beta_pi 0.5; dpo-rw has one K"
    low = next(s for s in whole.settings if s.first.method == "exo-rw" and s.first.varied == {"beta_pi": 0.1})
    first = drawn["sweep-beta_pi"].containers[0].lines[0].get_xydata().tolist()
    assert first[0] == [0.1, pytest.approx(100 * low.mean("win_rates.reference").mean)] and first[1][0] == 0.5
    assert "beta_pi: the win rate is highest for exo-rw at 0.5" in page


def test_rows_and_cut_samples_are_counted(whole):
    page = training_section.rows(whole)
    assert ["sft", "9", "7", "2", "empty: 2"] in cells(page)
    assert ["sft, final", "25.0%"] in cells(page)


def test_training_curves_leave_evaluations_out(whole, drawn, tmp_path):
    page = text_of(training_section.training(whole, tmp_path))
    curves = {axis.get_ylabel(): axis for axis in drawn.values()}
    smoothed = [line for line in curves["loss (nats)"].lines if line.get_label() == "exo-rw K=2"]
    assert smoothed[0].get_xydata().tolist() == [[1, 2.0], [2, 2.0]]
    assert "clipped in 50% (exo-rw K=2)" in page
    assert "Zero at every step, so not drawn: share of prompts with a stuck pair." in page


def test_judges_are_shown_as_they_are(whole, tmp_path):
    run = make_run(tmp_path / "run", TRIALS[:1])
    put(
        run / "judge/one/judge.json", {"a": "exo", "win_rate": {"mean": 0.6, "low": 0.5, "high": 0.7}, "ties": {"n": 3}}
    )
    rows = cells(outcomes.win_rates(results.read(run)))
    assert ["win_rate", "0.600 [0.500, 0.700]"] in rows and ["a", "exo"] in rows and ["ties.n", "3"] in rows


# Density ratios.


def test_a_policy_that_is_the_reference_has_ratio_one():
    ref = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = density.density_ratio(ref.tolist(), density.policy_weights((ref - 7).tolist(), ref.tolist()))
    assert found.ratio == pytest.approx([1.0] * len(found.ratio))
    assert found.effective == pytest.approx(100)


def test_a_tilted_normal():
    """x = log pi_ref normal, pi / pi_ref = exp(a x): smoothed by h, the ratio is exp((a x - a^2 / 2) / (1 + h^2))."""
    places = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ref, a = torch.special.ndtri(places), 0.7
    found = density.density_ratio(ref.tolist(), density.policy_weights(((1 + a) * ref).tolist(), ref.tolist()))
    h = 0.9 * min(1.0, 2 * 0.6744898 / 1.34) * 20_000**-0.2
    assert density.silverman(ref) == pytest.approx(h, rel=1e-3)
    expected = [math.exp((a * x - a * a / 2) / (1 + h * h)) for x in found.log_ref]
    assert found.ratio == pytest.approx(expected, rel=0.01)
    assert found.log_ref[0] == pytest.approx(-2.054, abs=1e-2)
    assert found.effective == pytest.approx(20_000 * math.exp(-a * a), rel=0.01)


def test_the_bandwidth_goes_by_the_quartiles_where_tails_are_long():
    x = torch.tensor([-100.0, 0, 1, 2, 3, 4, 5, 6, 7, 100], dtype=torch.float64)
    assert density.silverman(x) == pytest.approx(0.9 * (5.75 - 1.25) / 1.34 * 10**-0.2)


def test_the_optimum_follows_rewards_over_beta():
    assert density.optimum_weights([0.0, math.log(3)], 0.5).tolist() == pytest.approx([0.1, 0.9])


def test_samples_that_are_all_alike_have_no_curve():
    with pytest.raises(ValueError, match="all are equal"):
        density.density_ratio([-3.0] * 5, torch.full((5,), 0.2, dtype=torch.float64))


def test_densities_of_a_run(whole, drawn, tmp_path):
    page = text_of(outcomes.densities(whole, tmp_path))
    assert set(drawn) == {"density-rw-1"}
    lines = {line.get_label(): line for line in drawn["density-rw-1"].lines}
    assert lines["exo-rw K=2: ESS 64 of 64"].get_ydata() == pytest.approx(1)
    assert any(label.startswith("optimal, beta 0.25") for label in lines)
    assert "rw, prompt 1: “prompt 0”" in page


def test_a_long_prompt_shows_its_end():
    assert reporting_html.ending("a\n b") == "a b"
    assert reporting_html.ending("x" * 90 + "end") == "…" + "x" * 77 + "end"


# The stage.


def test_the_report_is_one_file(tmp_path, capsys):
    run = make_run(tmp_path / "run", [TRIALS[0], TRIALS[5]], text=HOSTILE)
    put(run / "judge/one/judge.json", {HOSTILE: HOSTILE})
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 0
    said = capsys.readouterr().out
    assert "dpo-rw K=2 FAILED" in said and "FAILED dpo-rw K=2, beta_pi 0.1, seed 0: rise" in said
    page = (run / "report/report.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count(html.escape(HOSTILE)) > 4, "texts of data stay texts"
    assert set(re.findall(r'(?:src|href)="(.{14})', page)) == {"data:image/png"} and "http" not in page
    pictures = list((run / "report").glob("*.png"))
    assert len(pictures) == page.count("<img") > 5 and all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    record = json.loads((run / "report/run.json").read_text())
    assert "finished" in record and record["stage"] == "report"


def test_half_a_run(tmp_path, drawn):
    run = make_run(tmp_path / "run", TRIALS[:4])
    record = json.loads((run / "evaluation/exo-rw/1-seed1/run.json").read_text())
    del record["finished"]
    put(run / "evaluation/exo-rw/1-seed1/run.json", record)
    (run / "evaluation/exo-rw/2-seed0/run.json").unlink()
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 0
    page = text_of((run / "report/report.html").read_text(encoding="utf-8"))
    assert "Unfinished: 2 of 10 steps have no result yet." in page
    assert "evaluation/exo-rw/1-seed1: did not finish" in page
    assert "evaluation/exo-rw/2-seed0: has not begun" in page
    assert [len(s.trials) for s in results.read(run).settings] == [1, 1]


@pytest.mark.parametrize("missing", ["evaluation/sft", "sft"])
def test_without_its_start_nothing_is_compared(tmp_path, drawn, missing):
    run = make_run(tmp_path / "run", TRIALS[:1])
    for name in {missing, "evaluation/sft"}:
        (run / name / "run.json").unlink()
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 0
    page = text_of((run / "report/report.html").read_text(encoding="utf-8"))
    assert "No method has been evaluated yet." in page and f"{missing}: has not begun" in page
    assert "clipped in 50% (exo-rw K=2)" in page, "what has been trained is shown"


def test_a_result_whose_input_has_changed_since_is_named(tmp_path):
    before = make_run(tmp_path / "before", TRIALS[:1])
    weights, evaluation = "exo-rw/0-seed0/model.safetensors", "evaluation/exo-rw/0-seed0"
    (before / weights).write_text("weights")
    model = str(before / "exo-rw/0-seed0")
    known = {"model": run_inputs.fingerprint(model), "oracle": "elsewhere"}
    asked = {"output_dir": str(before / evaluation), "model": model, "oracle": "elsewhere:oracle"}
    put_step(before / evaluation, "evaluate", 50, arguments=asked, inputs=known)
    run = before.rename(tmp_path / "moved")
    put_step(run / "exo-rw/0-seed0", "align", 55)  # again, and the same
    assert not any(step.stale for step in results.read(run).steps)
    (run / weights).write_text("others")
    found = results.read(run)
    assert [(s.name, s.stale) for s in found.steps if s.stale] == [(evaluation, "exo-rw/0-seed0")]
    page = text_of("".join(outcomes.headline(found, outcomes.methods(found))))
    assert "evaluation/exo-rw/0-seed0: exo-rw/0-seed0" in page


def test_a_result_of_other_options_than_the_plans_is_named(tmp_path):
    run = make_run(tmp_path / "run", TRIALS[:1])
    record = json.loads((run / "run.json").read_text())
    for entry in record["plan"]:
        entry["options"] = {"beta_pi": 0.1, "beta_r": 0.5, "reward_norm": "none"} if entry["stage"] == "align" else {}
    put(run / "run.json", record)
    found = results.read(run)
    assert [(s.name, s.stale) for s in found.steps if s.stale] == [("exo-rw/0-seed0", "--beta_pi")]


def test_samples_all_alike_cost_no_more_than_their_picture(tmp_path, drawn):
    run = make_run(tmp_path / "run", TRIALS[:1])
    row = {"prompt": "p", "logps": [-1.0] * 4, "ref_logps": [-2.0] * 4, "rewards": [1.0] * 4}
    put(run / "evaluation/exo-rw/0-seed0/density.jsonl", [row])
    page = text_of(outcomes.densities(results.read(run), tmp_path))
    assert "Not drawn: prompt 1 (rw): density: expected samples of different log-probability" in page


def test_the_optimum_of_rewards_on_another_scale_is_not_drawn(tmp_path, drawn):
    run = make_run(tmp_path / "run", TRIALS[:1])
    trial = results.read(run).trials[0]
    row = {"ref_logps": [-1.0, -2.0, -4.0], "logps": [-1.0, -2.0, -3.0], "rewards": [1.0, 2.0, 3.0]}
    assert list(outcomes._curves([trial], [row])) == ["optimal, beta 0.25", "exo-rw K=2"]
    trial.arguments["reward_norm"] = "global"
    assert list(outcomes._curves([trial], [row])) == ["exo-rw K=2"]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_kl_beside_truncated_sampling_is_said_to_be_of_the_whole_distribution(tmp_path, drawn, top_p):
    run = make_run(tmp_path / "run", TRIALS[:1])
    path = run / "evaluation/exo-rw/0-seed0/evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_p": top_p}))
    assert ("the KL is that of the whole distribution" in outcomes.frontiers(results.read(run), tmp_path)) == (
        top_p < 1
    )


def test_other_prompts_are_not_compared(tmp_path, capsys):
    run = make_run(tmp_path / "run", TRIALS[:1])
    path = run / "evaluation/exo-rw/0-seed0/samples/final.jsonl"
    path.write_text(path.read_text().replace("prompt 3", "prompt 33"))
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 2
    error = capsys.readouterr().err
    assert "expected the prompts of" in error and len(error.splitlines()) == 1 and not (run / "report").exists()


def test_what_is_no_run_of_a_recipe_is_refused(tmp_path, capsys):
    assert report.main(["--run", str(tmp_path), "--output_dir", str(tmp_path / "report")]) == 2
    assert "expected the run of a recipe; python -m exo.train makes one" in capsys.readouterr().err
    run = make_run(tmp_path / "run", [])
    assert report.main(["--run", str(run), "--output_dir", str(run), "--overwrite_output_dir"]) == 1
    assert "which this run reads" in capsys.readouterr().err
    assert (run / "sft/run.json").exists()


def test_a_broken_evaluation_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", TRIALS[:1])
    path = run / "evaluation/sft/evaluation.json"
    path.write_text('{"k": ')
    assert report.main(["--run", str(run), "--output_dir", str(run / "report")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "expected JSON" in error and len(error.splitlines()) == 1
