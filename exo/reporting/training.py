"""The report's sections on how a run was made: training curves, rows of data, samples to read, commands.

Each returns HTML, or "" where the run has nothing for it. Left out: what came out (findings).
"""

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from exo import data
from exo.cli import console
from exo.reporting import figures, html
from exo.reporting.results import Results, Step
from exo.runs import record as run_record

ALIGNMENT = (  # of metrics.jsonl, where a run has them
    ("loss", "loss (nats)"),
    ("rewards/accuracies", "accuracy of the implicit reward"),
    ("target/entropy", "entropy of the target (nats)"),
    ("target/ess", "effective sample size of the target"),
    ("rewards/stuck", "share of prompts with a stuck pair"),
)
PPO = (
    ("score", "PPO: score of the rollouts"),
    ("kl", "PPO: KL to the reference (nats)"),
    ("value_loss", "PPO: value loss"),
)
Lines = Mapping[str, tuple[str, list[dict[str, Any]]]]  # label -> method, its lines of metrics.jsonl
SHOWN = 3  # held-out prompts whose samples are printed


def training(found: Results, directory: Path) -> str:
    chosen = {setting.first.method: setting.first for setting in found.best_of_method}
    for trial in found.trials:  # what has been trained and not evaluated yet
        chosen.setdefault(trial.method, trial)
    lines = {t.series: (t.method, rows) for t in chosen.values() if (rows := _metrics(found, t.name))}
    pictures, flat = [], []
    for i, (name, label, of) in enumerate(_panels(found, lines)):
        points = {k: (m, [(row["step"], row[name]) for row in rows if name in row]) for k, (m, rows) in of.items()}
        points = {k: line for k, line in points.items() if line[1]}
        if any(value for _, curve in points.values() for _, value in curve):
            pictures.append((figures.training(points, label, directory / f"training-{i}.png"), f"{label}."))
        elif points:
            flat.append(label)
    if not pictures:
        return ""
    clipped = [f"{100 * _clipped(rows):.0f}% ({label})" for label, (_, rows) in lines.items()]
    said = [f"The gradient was clipped in {html.listed(clipped)} of the steps."] * bool(clipped)
    said += [f"Zero at every step, so not drawn: {html.listed(flat)}."] * bool(flat)
    return html.section(
        "Training",
        html.paragraph(" ".join(said)),
        html.figures(pictures),
        html.paragraph(
            "Smoothed over a twentieth of the run, pale as it was; best setting of each method, first seed. A pair is "
            "stuck where the policy ranks it so wrongly that EXO's gradient has all but vanished."
        ),
    )


def _panels(found: Results, lines: Lines) -> Iterator[tuple[str, str, Lines]]:
    """(name in metrics.jsonl, label, lines) of every picture that there may be."""
    for step in found.steps:
        if step.stage in ("sft", "reward"):
            yield "loss", f"loss of {step.name} (nats)", {step.name: ("", _metrics(found, step.name))}
    for name, label in ALIGNMENT:
        yield name, label, {key: line for key, line in lines.items() if line[0] != "ppo"}
    norms = {f"{key}, clipped {100 * _clipped(rows):.0f}%": (method, rows) for key, (method, rows) in lines.items()}
    yield "grad_norm", "gradient norm before clipping", norms
    for name, label in PPO:
        yield name, label, {key: line for key, line in lines.items() if line[0] == "ppo"}


def _clipped(rows: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(row["clipped"] for row in rows)


def _metrics(found: Results, name: str) -> list[dict[str, Any]]:
    """The lines of training, without those of evaluations."""
    path = found.directory / name / "metrics.jsonl"
    if not any(step.name == name and not step.missing for step in found.steps) or not path.exists():
        return []
    return [row for _, row in data.read_jsonl(path) if "loss" in row]


def rows(found: Results) -> str:
    plain: list[list[str]] = []
    remarked: list[list[str]] = []
    skipped = 0
    for step in found.steps:
        account = step.record.get("rows")
        if account:
            later = account.get("later", {})
            lost = sum(account["skipped"].values())
            lost += sum(count for reason, count in later.items() if reason.startswith(("rows skipped", "rows dropped")))
            skipped += lost
            degenerate = {
                name: n for name, n in step.record.get("result", {}).items() if name.startswith("rows ") and n
            }
            remarks = {**account["skipped"], **account["noted"], **later, **degenerate}
            said = "; ".join(f"{reason}: {count:,}" for reason, count in remarks.items())
            row = [step.name, f"{account['rows']:,}", f"{account['rows'] - lost:,}", f"{lost:,}", said]
            (remarked if said else plain).append(row)
    if not plain and not remarked:
        return ""
    header = ["step", "rows", "used", "skipped", "remarks"]
    unfinished = [[name, f"{100 * share:.1f}%"] for name, share in _unfinished(found) if share > 0]
    ends = (
        "Samples that were cut at the limit of tokens:" if unfinished else "No sample was cut at its limit of tokens."
    )
    return html.section(
        "What became of the rows",
        html.paragraph(f"{len(plain) + len(remarked)} steps read rows and skipped {skipped:,} of them between them."),
        html.table(header, remarked) if remarked else "",
        html.folded(f"{len(plain)} steps without a remark", html.table(header[:-1], (row[:-1] for row in plain))),
        html.paragraph(ends),
        html.table(["samples", "cut"], unfinished) if unfinished else "",
    )


def _unfinished(found: Results) -> Iterator[tuple[str, float]]:
    for step in found.steps:
        if step.stage == "sample" and not step.missing:
            yield step.name, step.record["result"]["unfinished"]
    for trial in [*filter(None, [found.start]), *found.evaluated]:
        yield from ((f"{trial.name}, {c.name}", c.unfinished) for c in trial.checkpoints)


def samples(found: Results, seed: int) -> str:
    if not found.start:
        return ""
    columns = [("SFT", found.start), *((s.first.series, s.first) for s in found.best_of_method)]
    examples = [(name, trial.samples(trial.last)) for name, trial in columns]
    count = len(examples[0][1])
    places = sorted(random.Random(seed).sample(range(count), min(SHOWN, count)))
    body = []
    for place in places:
        body.append(html.heading(f"Prompt {place + 1}"))
        shown = [("prompt", examples[0][1][place].prompt)]
        for name, rows in examples:
            row = rows[place]
            reward = f", reward {row.rewards[0]:+.2f}" if row.rewards else ""
            shown.append((name + reward, row.completions[0]))
        body.append(html.pairs(shown))
    said = (
        f"{len(places)} of {count:,} held-out prompts, drawn by the seed {seed} and not by how they look; the first "
        "sample of each method's best setting, first seed, last checkpoint."
    )
    return html.section("Samples side by side", html.paragraph(said), *body)


def commands(found: Results) -> str:
    record = found.record
    done = [step for step in found.steps if not step.missing]
    body = [html.code(run_record.command(record))]
    body.append(html.pairs([("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items())),
                            ("platform", record["platform"])]))  # fmt: skip
    steps = [
        html.heading(f"{step.name}, {_took(step)}", 4) + html.code(run_record.command(step.record)) for step in done
    ]
    seconds = sum(_seconds(step) for step in done)
    said = f"{len(done)} of {len(found.steps)} steps finished, {console.duration(seconds)} of work between them."
    return html.section(
        "How to do it again", html.paragraph(said), *body, html.folded("The command of every step", *steps)
    )


def _seconds(step: Step) -> float:
    began, ended = (datetime.fromisoformat(step.record[name]) for name in ("started", "finished"))
    return (ended - began).total_seconds()


def _took(step: Step) -> str:
    return f"begun {html.date(step.record['started'])}, {console.duration(_seconds(step))}"
