"""The report of a recipe's run: one HTML file with tables and pictures, and the pictures beside it.

python -m exo.report --run RUN --output_dir RUN/report. Every number is read or computed from the run's files. A half
finished run gives a report of what is there, and says what is not. Left out: what no file of the run holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo.cli import console
from exo.cli.fields import named, option
from exo.cli.main import command
from exo.cli.options import Stage
from exo.runs.stage import Start, stage


@dataclass(frozen=True)
class Config(Stage):
    output_dir: str = option("runs/report", "directory of the report")
    run: str = option("", "directory of a recipe's run", named("the directory of a recipe's run"))


@stage("report", reads=("run",), makes="report.html")
def run(config: Config, start: Start) -> Path:
    """Write report.html and return its directory."""
    from exo.reporting import html, outcomes, results
    from exo.reporting import training as training_section
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_file

    found = results.read(Path(config.run))
    methods = outcomes.methods(found)
    directory = run_stage.begin(start)
    title = found.record["recipe"]["title"]
    body = [html.heading(title, 1), *outcomes.headline(found, methods)]
    body += [outcomes.frontiers(found, directory), outcomes.win_rates(found), outcomes.progress(found, directory)]
    body += [outcomes.sweeps(found, directory), outcomes.densities(found, directory)]
    body += [training_section.training(found, directory), training_section.rows(found)]
    body += [training_section.samples(found, config.seed), training_section.commands(found)]
    with atomic_file(directory / "report.html") as file:
        file.write_text(html.document(title, filter(None, body)), encoding="utf-8")
    _tell(*methods, outcomes.trials_of_failed(found))
    console.log(f"  page: {directory / 'report.html'}")
    run_stage.finish(directory)
    return directory


def _tell(header: Sequence[str], rows: Sequence[Sequence[str]], failed: Sequence[str]) -> None:
    from exo.reporting import results

    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows) if rows else ():
        console.log("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in failed:
        console.log(f"FAILED {line}, not more than {results.FAILED_BELOW:g} standard errors above the SFT start")


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
