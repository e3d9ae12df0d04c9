"""Draw density ratios of policies to the reference (the paper's Figures 3 and 9)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exo import data
from exo.evaluation import density
from exo.reporting import figures
from exo.reporting.results import Results, Trial


def densities(results: Results, directory: Path) -> dict[str, Any] | None:
    """Draw a picture for each prompt and target; return None if the run has no densities."""
    pictures, skipped = [], []
    unreliable: dict[str, set[int]] = {}  # label -> prompts
    for target in ("rw", "pref"):
        trials = [s.first for s in results.best_per_method if s.first.method in (f"exo-{target}", f"dpo-{target}")]
        trials = [trial for trial in trials if (trial.folder / "density.jsonl").exists()]
        files = [[row for _, row in data.read_jsonl(trial.folder / "density.jsonl")] for trial in trials]
        for i, rows in enumerate(zip(*files, strict=True), 1):
            try:
                curves = density_curves(trials, rows)
            except ValueError as error:
                skipped.append(f"prompt {i} ({target}): {error}")
                continue
            for label, (_, curve) in curves.items():
                if curve.thin:
                    unreliable.setdefault(label, set()).add(i)
            path = figures.density(curves, directory / f"density-{target}-{i}.png")
            pictures.append({"path": path, "target": target, "number": i, "prompt": rows[0]["prompt"]})
    if not pictures and not skipped:
        return None
    return {
        "pictures": pictures,
        "skipped": skipped,
        "unreliable": [
            f"{label} (prompt {', '.join(map(str, sorted(prompts)))})" for label, prompts in unreliable.items()
        ],
        "min_effective": density.MIN_EFFECTIVE,
    }


def density_curves(
    trials: Sequence[Trial], rows: Sequence[dict[str, Any]]
) -> dict[str, tuple[str, density.DensityRatio]]:
    """Return label -> (method, curve) for one prompt; the method of an optimal policy is ""."""
    curves = {}
    for trial, row in zip(trials, rows, strict=True):
        beta = trial.arguments["beta_pi"] * trial.arguments["beta_r"]
        if trial.arguments["reward_norm"] == "none":  # the optimum of normalized rewards is a different one
            optimum = density.optimum_weights(row["rewards"], beta)
            curves[f"optimal, beta {beta:g}"] = "", density.density_ratio(row["ref_logps"], optimum)
        policy = density.policy_weights(row["logps"], row["ref_logps"])
        curves[trial.series] = trial.method, density.density_ratio(row["ref_logps"], policy)
    return curves
