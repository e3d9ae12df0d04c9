"""The report's sections on what came out: methods, frontiers, win rates, the road there, sweeps, density ratios.

A section draws its pictures into a directory and returns HTML, or "" where the run has nothing for it. The sentence at
its head is made of the numbers below it. Left out: how the run was made (provenance).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from exo import data
from exo.evaluation import density
from exo.reporting import figures, html, results
from exo.reporting.results import Estimate, Results, Setting, Trial


def _pm(value: Estimate | None, form: str = "+.2f") -> str:
    return f"{value.mean:{form}} ± {value.standard_error:.2f}" if value else ""


def _percent(value: Estimate | None) -> str:
    return f"{100 * value.mean:.1f}% ± {100 * value.standard_error:.1f}" if value else ""


def _interval(value: Estimate | None, form: str = ".2f", scale: float = 1, unit: str = "") -> str:
    if value is None:
        return ""
    mean, low, high = (f"{scale * x:{form}}" for x in value[:3])
    return f"{mean}{unit} [{low}, {high}]"


def _kl(setting: Setting) -> str:
    bound = setting.first.last.kl_bound
    return _pm(setting.mean("kl"), ".2f") if bound is None else f"≤ {bound:.2f}"


Table = tuple[list[str], list[list[str]]]


def methods(found: Results) -> Table:
    """The table of the methods: header and rows. What has no word in any row is left out."""
    header = ["method", "best setting", "seeds", "reward", "rise over SFT", "KL (nats)"]
    header += ["wins over SFT", "wins over chosen", "accuracy"]
    rows = []
    if found.start:
        last = found.start.last
        wins = _percent(last.win_rates.get("chosen"))
        rows.append(["SFT", "", "", _pm(last.reward), "", "0", "", wins, _percent(last.accuracy)])
    for setting in found.best:
        name = setting.first.series + " FAILED" * setting.failed
        row = [name, setting.first.setting, str(len(setting.trials)), _pm(setting.mean("reward")), _pm(setting.rise)]
        rates = [setting.mean("win_rates.reference"), setting.mean("win_rates.chosen"), setting.mean("accuracy")]
        rows.append([*row, _kl(setting), *map(_percent, rates)])
    return html.filled(header, rows)


def trials_of_failed(found: Results) -> list[str]:
    """Every setting and seed of a method that did not beat its start, a line each."""
    failed = {setting.first.series for setting in found.best if setting.failed}
    return [
        f"{trial.series}{', ' * bool(trial.setting)}{trial.setting}, seed {trial.seed}: rise {_pm(trial.last.rise)}"
        for trial in found.evaluated
        if trial.series in failed
    ]


def headline(found: Results, methods: Table) -> Iterator[str]:
    recipe = found.record["recipe"]
    facts = [f"Begun {html.date(found.record['started'])}", f"seeds {', '.join(map(str, recipe['seeds']))}"]
    sizes = list(dict.fromkeys(str(trial.k) for trial in found.trials if trial.k))
    facts += [f"K {', '.join(sizes)}"] * bool(sizes)
    if found.start:
        asked = results.evaluation(found.start.folder)
        facts.append(
            f"{asked['prompts']:,} held-out prompts, {asked['k']} samples each at temperature {asked['temperature']:g}"
        )
        facts.append(f"rewards by {asked['scorer']}")
    yield html.paragraph("; ".join(facts) + ".")
    missing = [f"{step.name}: {step.missing}" for step in found.steps if step.missing]
    if missing:
        yield html.note(f"Unfinished: {len(missing)} of {len(found.steps)} steps have no result yet.", missing)
    stale = [f"{step.name}: {step.stale}" for step in found.steps if step.stale]
    if stale:
        yield html.note("Made with what has changed since, or from what is not whole:", stale)
    if not found.best:
        yield html.paragraph("No method has been evaluated yet.")
        return
    top = max(found.best, key=lambda setting: setting.rise.mean)
    lost = sum(setting.failed for setting in found.best)
    yield html.paragraph(
        f"{top.first.series} rises most above its SFT start, by {_pm(top.rise)} at KL {_kl(top)} nats; "
        f"{len(found.best) - lost} of {len(found.best)} beat the start by more than {results.FAILED_BELOW:g} "
        "standard errors."
    )
    yield html.table(*methods, failed=[False, *(setting.failed for setting in found.best)])
    if lost:
        yield html.note("FAILED. All trials, at their last checkpoints:", trials_of_failed(found))
    swept = " The setting is the one of the highest mean rise on these same prompts, which flatters it a little."
    yield html.paragraph(
        "At the last checkpoint, mean ± standard error. The error of the rise is over prompts and seeds, from each "
        "sample's reward; the others take the prompts' error whole, since seeds share the prompts, and add that of the "
        "seeds' means. Accuracy is the mean sigmoid of the reward." + swept * any(t.varied for t in found.evaluated)
    )


def frontiers(found: Results, directory: Path) -> str:
    if not found.evaluated:
        return ""
    reward = "reward, mean over held-out samples"
    pictures = [
        (figures.frontier(found, lambda c: c.reward, reward, directory / "frontier.png"), "Reward against KL."),
        (
            figures.frontier(found, lambda c: c.accuracy, "accuracy", directory / "accuracy.png"),
            "Accuracy, the mean sigmoid of the reward, against KL.",
        ),
    ]
    for method in dict.fromkeys(trial.method for trial in found.evaluated if trial.k):
        series = list(dict.fromkeys(trial.series for trial in found.evaluated if trial.method == method))
        if len(series) > 1:
            path = figures.frontier(found, lambda c: c.reward, reward, directory / f"frontier-{method}.png", series)
            pictures.append((path, f"{method}: reward against KL, by K."))
    rows = []
    for trial in [*filter(None, [found.start]), *found.evaluated]:
        for c in trial.checkpoints:
            kl = f"≤ {c.kl_bound:.2f}" if c.kl_bound is not None else _interval(c.kl)
            rows.append([trial.name, c.name, _interval(c.reward, "+.2f"), kl, _interval(c.kl_k3), f"{c.spread:.2f}",
                         _interval(c.win_rates.get("reference"), ".1f", 100, "%")])  # fmt: skip
    header = ["run", "checkpoint", "reward", "KL, k1 (nats)", "KL, k3 (nats)", "spread", "wins over SFT"]
    truncated = any((results.evaluation(trial.folder)["top_p"] or 1) < 1 for trial in found.evaluated)
    of_what = (
        " Where top_p is less than 1 the rewards are those of truncated samples, and the KL is that of the whole "
        "distribution, from further samples of it; Best-of-N's bound is one to the truncated reference."
    )
    return html.section(
        "Reward against KL",
        html.paragraph(_at_equal_kl(found)),
        html.figures(pictures),
        html.paragraph(
            "A point is a checkpoint with 95% intervals, a thin line a run from SFT on, a thick line the upper "
            "envelope of a method, which luck raises a little where there are many runs. The KL is the mean of "
            "log pi - log pi_ref over samples (k1). Best-of-N has no log-probs of its own; it stands at the most that "
            "its KL can be, log N - (N - 1) / N." + of_what * truncated
        ),
        html.folded(f"All {len(rows)} checkpoints, with 95% intervals", html.table(header, rows)),
    )


def _at_equal_kl(found: Results) -> str:
    """How high each method's envelope stands at the largest KL that all of them reach."""
    points: dict[str, list[tuple[float, float]]] = {}
    for trial in found.evaluated:
        for checkpoint in trial.checkpoints:
            if checkpoint.kl:
                points.setdefault(trial.method, []).append((checkpoint.kl.mean, checkpoint.reward.mean))
    if not points:
        return "No checkpoint has a measured KL."
    common = min(max(kl for kl, _ in measured) for measured in points.values())
    heights = {method: _height(results.envelope(measured), common) for method, measured in points.items()}
    known = sorted(((height, method) for method, height in heights.items() if height is not None), reverse=True)
    unknown = [method for method, height in heights.items() if height is None]
    return (
        f"At {common:.2f} nats, the largest KL that every method reaches, the envelopes stand at "
        f"{html.listed([f'{height:+.2f} ({method})' for height, method in known])}."
        + f" No checkpoint is as near to the reference for {html.listed(unknown)}."
        * bool(unknown)
    )


def _height(envelope: Sequence[tuple[float, float]], x: float) -> float | None:
    """Of a line through the points, which goes on level after the last; None before the first."""
    for (x0, y0), (x1, y1) in zip(envelope, envelope[1:], strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return envelope[-1][1] if x >= envelope[-1][0] else None


def win_rates(found: Results) -> str:
    over = list(dict.fromkeys(name for trial in found.evaluated for name in trial.last.win_rates))
    rows = [
        [
            setting.first.series,
            setting.first.setting,
            *(_interval(setting.mean(f"win_rates.{n}"), ".1f", 100, "%") for n in over),
        ]
        for setting in found.best
    ]
    judged = [html.heading("Judges and labels")]
    for path in sorted([*found.directory.glob("judge/**/judge.json"), *found.directory.glob("label/**/label.json")]):
        judged.append(html.heading(str(path.parent.relative_to(found.directory)), 4))
        judged.append(html.table(["key", "value"], _flat(results.load(path))))
    if not over and len(judged) == 1:
        return ""
    best = [(setting, setting.mean("win_rates.reference")) for setting in found.best]
    known = [(setting.first.series, rate) for setting, rate in best if rate]
    sentence = "Nothing was compared with the reference."
    if known:
        top, rate = max(known, key=lambda item: item[1].mean)
        often = _interval(rate, ".1f", 100, "%")
        sentence = f"{top} is preferred to the reference most often, in {often} of all pairs of samples."
    header = ["method", "best setting", *(f"over {'SFT' if name == 'reference' else name}" for name in over)]
    pairs = "A win is a higher reward for the same prompt, over all pairs of samples, a tie half of one; 95% intervals."
    return html.section(
        "Win rates", html.paragraph(sentence), html.table(*html.filled(header, rows)), html.paragraph(pairs),
        *(judged if len(judged) > 1 else ()),
    )  # fmt: skip


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Key by key; a mean with its interval on one line."""
    for key, value in values.items():
        if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
            yield [prefix + key, f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"]
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            shown = "undecided" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            yield [prefix + key, shown]


def progress(found: Results, directory: Path) -> str:
    rows = {s.first.series: figures.by_step(found, s, "reward") for s in found.best_of_method}
    rows = {series: points for series, points in rows.items() if len(points) > 1}
    if not rows:
        return ""
    fell = []
    for series, points in rows.items():
        step, high, _ = max(points, key=lambda point: point[1])
        if high > points[-1][1]:
            fell.append(f"{series} (from {high:+.2f} at step {step} to {points[-1][1]:+.2f})")
    sentence = "The mean reward is highest at the last checkpoint of every method."
    if fell:
        sentence = f"The mean reward ends below its highest checkpoint for {html.listed(fell)}."
    reward = figures.against_step(found, "reward", "reward", directory / "reward-steps.png", band=True)
    kl = figures.against_step(found, "kl", "KL to the reference (nats)", directory / "kl-steps.png")
    return html.section(
        "Reward and KL against the step",
        html.paragraph(sentence),
        html.figures([
            (reward, "Reward; the band is the standard deviation over the samples of a prompt, averaged over prompts."),
            (kl, "KL to the reference, k1."),
        ]),
        html.paragraph(
            "Best setting of each method, mean over its seeds. A step of PPO is not the work of a step of alignment."
        ),
    )  # fmt: skip


def sweeps(found: Results, directory: Path) -> str:
    pictures, sentences = [], []
    for name in found.varied:
        rows = {}
        for best in found.best_of_method:
            points = _along(found, best, name)
            if len(points) > 1:
                rows[best.first.method] = points
        if rows:
            path = figures.sweep(rows, name, directory / f"sweep-{name}.png")
            pictures.append((path, f"Win rate over the reference against {name}, with 95% intervals."))
            tops = [f"{method} at {max(points, key=lambda p: p[1].mean)[0]:g}" for method, points in rows.items()]
            sentences.append(f"{name}: the win rate is highest for {html.listed(tops)}.")
    if not pictures:
        return ""
    return html.section(
        "What was varied",
        *map(html.paragraph, sentences),
        html.figures(pictures),
        html.paragraph("The other options are those of the method's best setting. Last checkpoint, mean over seeds."),
    )


def _along(found: Results, best: Setting, name: str) -> list[tuple[float, Estimate]]:
    """(value, win rate over the reference) of the settings that differ from the best in this option alone."""

    def values(setting: Setting) -> dict[str, Any]:
        return {"K": setting.first.k} | setting.first.varied

    points = []
    for setting in found.settings:
        mine, rate = values(setting), setting.mean("win_rates.reference")
        alike = setting.first.method == best.first.method and mine | {name: None} == values(best) | {name: None}
        if alike and rate and mine.get(name) is not None:
            points.append((mine[name], rate))
    return sorted(points)


def densities(found: Results, directory: Path) -> str:
    pictures, flat = [], []
    thin: dict[str, set[int]] = {}
    for target in ("rw", "pref"):
        trials = [s.first for s in found.best_of_method if s.first.method in (f"exo-{target}", f"dpo-{target}")]
        trials = [trial for trial in trials if (trial.folder / "density.jsonl").exists()]
        files = [[row for _, row in data.read_jsonl(trial.folder / "density.jsonl")] for trial in trials]
        for i, rows in enumerate(zip(*files, strict=True), 1):
            try:
                curves = _curves(trials, rows)
            except ValueError as error:
                flat.append(f"prompt {i} ({target}): {error}")
                continue
            for label in (label for label, (_, curve) in curves.items() if curve.thin):
                thin.setdefault(label, set()).add(i)
            path = figures.density(curves, directory / f"density-{target}-{i}.png")
            pictures.append((path, f"{target}, prompt {i}: “{html.ending(rows[0]['prompt'])}”"))
    if not pictures and not flat:
        return ""
    places = [f"{label} (prompt {', '.join(map(str, sorted(prompts)))})" for label, prompts in thin.items()]
    warning = (
        f"Pale curves rest on fewer than {density.LITTLE} effective samples and mean little: {html.listed(places)}."
    )
    return html.section(
        "Density against the reference's",
        html.paragraph(warning if thin else f"Every curve rests on {density.LITTLE} effective samples or more."),
        html.note("Not drawn:", flat) if flat else "",
        html.figures(pictures),
        html.paragraph(
            "Samples of the reference under self-normalised weights: pi / pi_ref of the policy, exp(r / beta) of the "
            "optimal policy, beta = beta_pi beta_r of the run (for preferences too, whose loss has no beta_r). The "
            "curve is the ratio of two kernel density estimates of log pi_ref, weighted over unweighted; 1 is the "
            "reference itself. ESS is the effective size of the weighted sample. Best setting of each method, first "
            "seed."
        ),
    )


def _curves(trials: Sequence[Trial], rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, density.DensityRatio]]:
    curves = {}
    for trial, row in zip(trials, rows, strict=True):
        beta = trial.arguments["beta_pi"] * trial.arguments["beta_r"]
        if trial.arguments["reward_norm"] == "none":  # else the optimum is that of other rewards
            best = density.optimum_weights(row["rewards"], beta)
            curves[f"optimal, beta {beta:g}"] = "", density.density_ratio(row["ref_logps"], best)
        mine = density.policy_weights(row["logps"], row["ref_logps"])
        curves[trial.series] = trial.method, density.density_ratio(row["ref_logps"], mine)
    return curves
