"""Write the report of a recipe's run: one HTML file with tables and pictures, and the pictures beside it.

    python -m exo.report --run RUN --output_dir RUN/report

Every number is read or computed from the run's files. For an unfinished run, the report shows the results so far and
lists the steps that are missing.
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
    from exo.reporting import methods, page, reading
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_file

    results = reading.read(Path(config.run))
    header, rows = methods.methods_table(results)  # a ValueError leaves no directory
    directory = run_stage.begin(start)
    context = page.build_context(results, directory, config.seed)
    with atomic_file(directory / "report.html") as file:
        file.write_text(page.render(context), encoding="utf-8")
    if rows:
        _print_table([header, *rows])
    for trial in context["failed_trials"]:
        console.log(f"FAILED {trial}, not more than {context['failed_below']:g} standard errors above SFT")
    console.log(f"  page: {directory / 'report.html'}")
    run_stage.finish(directory)
    return directory


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.log("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
