"""The regression guard: compare a result with a baseline kept for this kind of machine.

Times are compared as ratios to others in the same run, because absolute times differ from machine to machine. A
baseline holds the figures of several runs; a figure may exceed the largest of them by a margin.
"""

import json
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import BODY, EAGER, IN_CACHE, MIB, OURS, PADDED, spread
from benchmarks.table import BUSY, WIDE

FORMAT = 1
FOLDER = Path(__file__).parent / "baselines"
KEPT = 10  # runs
LEAST_ROUNDS = 5  # to judge a time
TIME_MARGIN, FEW_RUNS, FEW_RUNS_MARGIN = 1.08, 3, 1.12
# "MiB" is resident memory, which holds a freed block of the C library or not
MARGINS = {"MiB": 1.4, "MiB allocated": 1.02, "launches": 1.02, "GB moved": 1.02, "error": 1.25}
SLACK = {"MiB": 1.0, "MiB allocated": 0.5, "launches": 0.0, "GB moved": 0.0, "error": 1.2e-7}  # fp32 rounds by 6e-8


class Metric(NamedTuple):
    """A figure of ours; more is worse."""

    value: float
    unit: str  # "x" for a ratio of times, otherwise a key of MARGINS
    noise: float = 0.0  # the larger spread of the two
    judged: bool = True
    kept: bool = True  # in the baseline


class Verdict(NamedTuple):
    """A metric beside its baseline."""

    case: str
    name: str
    value: float
    kept: list[float]  # values of earlier runs
    allowed: float
    varies: bool  # from run to run; otherwise another run has the same value

    @property
    def factor(self) -> float:
        middle = statistics.median(self.kept)
        return self.value / middle if middle else math.inf

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
    busy = result["busy"] > BUSY and any(row["cpu_seconds"] for row in rows.values())
    found: dict[str, Metric] = {}
    for name, row in rows.items():
        if not name.startswith(OURS):
            continue
        for other in (row["bound"], EAGER, IN_CACHE, BODY, PADDED):
            if other not in rows or other == name or not row["seconds"]:
                continue
            steady = result["steady"] and len(row["seconds"]) >= LEAST_ROUNDS
            # a copy alone on its core takes less CPU time than on two at once, so it is no measure beside a neighbour
            copies = other == row["bound"] and result["unit"] == "GB/s"
            found[f"{name}: time / {other}"] = _ratio(row, rows[other], "seconds", steady and not busy)
            if row["cpu_seconds"]:
                cpu = _ratio(row, rows[other], "cpu_seconds", steady and busy and not copies)
                found[f"{name}: CPU time / {other}"] = cpu._replace(kept=steady and not copies)
        for label, value in (
            ("MiB", row["extra_bytes"] and row["extra_bytes"] / MIB),
            ("MiB allocated", row["allocated_bytes"] and row["allocated_bytes"] / MIB),
            ("launches", row["launches"]),
            ("GB moved", row["moved_bytes"] and row["moved_bytes"] / 1e9),
        ):
            if value is not None:
                steady = result["steady"] or label != "MiB"
                found[f"{name}: {label}"] = Metric(float(value), label, judged=steady, kept=steady)
        found |= {f"{name}: {kind} error": Metric(error, "error") for kind, error in row["errors"].items()}
    return found


def _ratio(row: dict[str, Any], other: dict[str, Any], key: str, judged: bool) -> Metric:
    """Return the ratio of the fastest rounds: noise only adds time, and it may add it to most of the rounds."""
    mine, others = row[key], other[key]
    noise = max(spread(mine), spread(others))
    return Metric(min(mine) / min(others), "x", noise, judged, judged)


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
            Verdict(case, name, metric.value, kept[name], allowed(metric, kept[name]), metric.unit in ("x", "MiB"))
            for name, metric in metrics(result).items()
            if metric.judged and name in kept
        ]

    def add(self, result: dict[str, Any], update: bool = False, replace: Collection[str] = ()) -> list[str]:
        """Add the figures that have no baseline yet, and return their names.

        `update` adds all figures to those of earlier runs; `replace` names those that earlier runs no longer count for.
        """
        kept = self.cases.setdefault(f"{result['suite']}/{result['case']}", {})
        added = []
        for name, metric in metrics(result).items():
            if not metric.kept or name in kept and not update:
                continue
            added.append(name)
            values = [] if name in replace else kept.get(name, [])
            kept[name] = [*values, float(f"{metric.value:.4g}")][-KEPT:]
        return added

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
