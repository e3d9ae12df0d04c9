"""Build the page of a report: collect the values of its sections, and render them with the template."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from exo.cli import console
from exo.reporting import curves, formatting, methods, training
from exo.reporting.densities import densities
from exo.reporting.results import FAILED_BELOW, Results
from exo.runs import record as run_record


def build_context(results: Results, directory: Path, seed: int) -> dict[str, Any]:
    """Draw the pictures into a directory and return the values that the template shows, by section."""
    return {
        "results": results,
        "methods": methods.methods_table(results),
        "failed_below": FAILED_BELOW,
        "failed_trials": methods.failed_trials(results),
        "frontier": curves.frontier(results, directory),
        "win_rates": methods.win_rates(results),
        "progress": curves.progress(results, directory),
        "sweeps": curves.sweeps(results, directory),
        "densities": densities(results, directory),
        "training": training.training(results, directory),
        "data_rows": training.data_rows(results),
        "samples": training.samples(results, seed),
    }


def render(context: dict[str, Any]) -> str:
    """Return the page as one HTML file that loads nothing: pictures are embedded, texts are escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("date", "interval", "listed", "percent_interval", "plus_minus", "shorten"):
        environment.filters[name] = getattr(formatting, name)
    environment.filters |= {"kl": methods.kl, "duration": console.duration, "command": run_record.command}
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment.get_template("report.html.j2").render(context)
