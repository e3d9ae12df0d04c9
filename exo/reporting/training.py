"""Draw training curves, and collect how a run was made: rows of data and samples.

Each function returns the values of its section, or None if the run has none.
"""

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exo import data
from exo.reporting import figures
from exo.reporting.results import Results

ALIGNMENT = (  # metrics of metrics.jsonl, drawn if a run has them
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
NUM_PROMPTS = 3  # held-out prompts whose samples are shown


def training(results: Results, directory: Path) -> dict[str, Any] | None:
    trials = {setting.first.method: setting.first for setting in results.best_per_method}
    for trial in results.trials:  # methods that are trained and not evaluated yet
        trials.setdefault(trial.method, trial)
    lines = {t.series: (t.method, rows) for t in trials.values() if (rows := _metrics(results, t.name))}
    pictures, constant_zero = [], []
    for i, (metric, label, runs) in enumerate(_panels(results, lines)):
        curves = {
            name: (method, [(row["step"], row[metric]) for row in rows if metric in row])
            for name, (method, rows) in runs.items()
        }
        curves = {name: curve for name, curve in curves.items() if curve[1]}
        if any(value for _, points in curves.values() for _, value in points):
            pictures.append((figures.training(curves, label, directory / f"training-{i}.png"), label))
        elif curves:
            constant_zero.append(label)
    if not pictures:
        return None
    clipped = [f"{100 * _clipped(rows):.0f}% ({label})" for label, (_, rows) in lines.items()]
    return {"clipped": clipped, "constant_zero": constant_zero, "pictures": pictures}


def _panels(results: Results, lines: Lines) -> Iterator[tuple[str, str, Lines]]:
    """Yield (metric, label, lines) of every picture that a run can have."""
    for step in results.steps:
        if step.stage in ("sft", "reward"):
            yield "loss", f"loss of {step.name} (nats)", {step.name: ("", _metrics(results, step.name))}
    for metric, label in ALIGNMENT:
        yield metric, label, {name: line for name, line in lines.items() if line[0] != "ppo"}
    norms = {f"{name}, clipped {100 * _clipped(rows):.0f}%": (method, rows) for name, (method, rows) in lines.items()}
    yield "grad_norm", "gradient norm before clipping", norms
    for metric, label in PPO:
        yield metric, label, {name: line for name, line in lines.items() if line[0] == "ppo"}


def _clipped(rows: Sequence[dict[str, Any]]) -> float:
    """Return the share of the steps in which the gradient was clipped."""
    return statistics.fmean(row["clipped"] for row in rows)


def _metrics(results: Results, name: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that training wrote, without those of evaluations."""
    path = results.directory / name / "metrics.jsonl"
    if not any(step.name == name and not step.missing for step in results.steps) or not path.exists():
        return []
    return [row for _, row in data.read_jsonl(path) if "loss" in row]


def data_rows(results: Results) -> dict[str, Any] | None:
    """Return per step the rows of data that it read, used and skipped, and the shares of truncated samples."""
    noted, plain = [], []
    total = 0
    for step in results.steps:
        account = step.record.get("rows")
        if not account:
            continue
        later = account.get("later", {})
        skipped = sum(account["skipped"].values())
        skipped += sum(n for reason, n in later.items() if reason.startswith(("rows skipped", "rows dropped")))
        total += skipped
        result = step.record.get("result", {})
        degenerate = {name: n for name, n in result.items() if name.startswith("rows ") and n}
        remarks = {**account["skipped"], **account["noted"], **later, **degenerate}
        row = [step.name, f"{account['rows']:,}", f"{account['rows'] - skipped:,}", f"{skipped:,}"]
        if remarks:
            noted.append([*row, "; ".join(f"{reason}: {count:,}" for reason, count in remarks.items())])
        else:
            plain.append(row)
    if not plain and not noted:
        return None
    sampled = [step for step in results.steps if step.stage == "sample" and not step.missing]
    shares = [(step.name, step.record["result"]["unfinished"]) for step in sampled]
    shares += [(f"{trial.name}, {c.name}", c.unfinished) for trial in results.with_start for c in trial.checkpoints]
    truncated = [[name, f"{100 * share:.1f}%"] for name, share in shares if share > 0]
    return {"noted": noted, "plain": plain, "skipped": total, "truncated": truncated}


def samples(results: Results, seed: int) -> dict[str, Any] | None:
    """Return the samples of SFT and of every method, by name, and the indices of random prompts."""
    if not results.start:
        return None
    trials = {"SFT": results.start} | {setting.first.series: setting.first for setting in results.best_per_method}
    examples = {name: trial.samples(trial.last) for name, trial in trials.items()}
    indices = range(len(examples["SFT"]))
    shown = random.Random(seed).sample(indices, min(NUM_PROMPTS, len(indices)))
    return {"seed": seed, "examples": examples, "indices": sorted(shown)}
