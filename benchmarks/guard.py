"""The regression guard: compare a result with a baseline kept for this kind of machine.

Times are compared as ratios to others in the same run, because absolute times differ from machine to machine. A
baseline holds the figures of several runs; a figure may exceed the largest of them by a margin.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import EAGER, MIB, OURS, PADDED, spread, typical
from benchmarks.table import BUSY, WIDE

FORMAT = 1
FOLDER = Path(__file__).parent / "baselines"
KEPT = 10  # runs
TIME_MARGIN, FEW_RUNS, FEW_RUNS_MARGIN = 1.08, 3, 1.12
# "MiB" is resident memory, which holds a freed block of the C library or not
MARGINS = {"MiB": 1.4, "MiB allocated": 1.02, "launches": 1.02, "GB moved": 1.02, "error": 1.25}
SLACK = {"MiB": 1.0, "MiB allocated": 0.5, "launches": 0.0, "GB moved": 0.0, "error": 1e-9}  # for figures near 0


class Metric(NamedTuple):
    """A figure of ours; more is worse."""

    value: float
    unit: str  # "x" for a ratio of times, otherwise a key of MARGINS
    noise: float = 0.0  # the larger spread of the two
    judged: bool = True  # otherwise only kept


class Verdict(NamedTuple):
    """A metric beside its baseline."""

    case: str
    name: str
    value: float
    kept: list[float]  # values of earlier runs
    allowed: float

    @property
    def factor(self) -> float:
        return self.value / statistics.median(self.kept) if any(self.kept) else math.inf

    @property
    def regressed(self) -> bool:
        return not self.value <= self.allowed

    def __str__(self) -> str:
        kept = f"{min(self.kept):.3g}..{max(self.kept):.3g} in {len(self.kept)} run{'s' * (len(self.kept) > 1)}"
        return (
            f"{self.case}: {self.name} is {self.value:.3g}, {self.factor:.2f} x the baseline "
            f"({kept}; allowed {self.allowed:.3g})"
        )


def metrics(result: dict[str, Any]) -> dict[str, Metric]:
    """Return the figures of ours by name."""
    rows = {row["contender"]: row for row in result["rows"] if not row["reason"]}
    busy, steady = result["busy"] > BUSY, result["keep_memory"]
    found: dict[str, Metric] = {}
    for name, row in rows.items():
        if not name.startswith(OURS) or name == PADDED:
            continue
        for other in (row["bound"], EAGER, PADDED):
            # a copy alone on its core takes less CPU time than on two at once, so it is no measure beside a neighbour
            copies = other == row["bound"] and result["unit"] == "GB/s"
            for kind, key, judged in (("time", "seconds", not busy), ("CPU time", "cpu_seconds", busy and not copies)):
                if other in rows and row[key] and rows[other][key]:
                    mine, others = row[key], rows[other][key]
                    noise = max(spread(mine), spread(others))
                    found[f"{name}: {kind} / {other}"] = Metric(
                        typical(mine) / typical(others), "x", noise, judged and steady
                    )
        for label, value in (
            ("MiB", row["extra_bytes"] and row["extra_bytes"] / MIB),
            ("MiB allocated", row["allocated_bytes"] and row["allocated_bytes"] / MIB),
            ("launches", row["launches"]),
            ("GB moved", row["moved_bytes"] and row["moved_bytes"] / 1e9),
        ):
            if value is not None:
                found[f"{name}: {label}"] = Metric(float(value), label, judged=steady or label != "MiB")
        found |= {f"{name}: {kind} error": Metric(error, "error") for kind, error in row["errors"].items()}
    return found


class Baseline:
    """The figures of earlier runs on this kind of machine."""

    def __init__(self, kind: str, folder: Path = FOLDER) -> None:
        self.kind, self.path = kind, folder / f"{kind}.json"
        self.new = not self.path.exists()
        self.cases: dict[str, dict[str, list[float]]] = {}
        if not self.new:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise ValueError(
                    f"{self.path}: a baseline of format {content.get('format')}, expected {FORMAT}: delete it, "
                    "and the next run makes a new one"
                )
            self.cases = content["cases"]

    def compare(self, result: dict[str, Any]) -> list[Verdict]:
        """Return a verdict for every metric that is judged and has a baseline."""
        case = f"{result['suite']}/{result['case']}"
        kept = self.cases.get(case, {})
        return [
            Verdict(case, name, metric.value, kept[name], allowed(metric, kept[name]))
            for name, metric in metrics(result).items()
            if metric.judged and name in kept
        ]

    def add(self, result: dict[str, Any], replace: bool) -> None:
        """Add the figures of a run to those of earlier runs, or replace these by it."""
        kept = self.cases.setdefault(f"{result['suite']}/{result['case']}", {})
        for name, metric in metrics(result).items():
            values = [] if replace else kept.get(name, [])
            kept[name] = [*values, float(f"{metric.value:.4g}")][-KEPT:]

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        content = {"format": FORMAT, "kind": self.kind, "cases": self.cases}
        text = json.dumps(content, indent=1)
        # a list of values is one line, so that a change of a baseline can be read
        self.path.write_text(_one_line_lists(text) + "\n", encoding="utf-8")


def _one_line_lists(text: str) -> str:
    parts = text.split("[")
    return parts[0] + "".join(
        "[" + " ".join(p.partition("]")[0].split()) + "]" + p.partition("]")[2] for p in parts[1:]
    )


def allowed(metric: Metric, kept: list[float]) -> float:
    """Return the largest value that is no regression. A spread above 15% in this run widens the margin to itself."""
    if metric.unit != "x":
        return max(kept) * MARGINS[metric.unit] + SLACK[metric.unit]
    margin = TIME_MARGIN if len(kept) >= FEW_RUNS else FEW_RUNS_MARGIN
    if metric.noise > WIDE:
        margin = max(margin, 1 + metric.noise)
    return max(kept) * margin
