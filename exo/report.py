"""The report of a recipe's run: one HTML file with tables and pictures, and the pictures beside it.

python -m exo.report --run RUN --output_dir RUN/report. Every number is read or computed from the run's files. A half
finished run gives a report of what is there, and says what is not. Left out: what no file of the run holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo import artifacts, config, console, findings, lineage, page, provenance, results
from exo.config import named, option


@dataclass(frozen=True)
class Config(config.Stage):
    output_dir: str = option("runs/report", "directory of the report")
    run: str = option("", "directory of a recipe's run", named("the directory of a recipe's run"))


@lineage.stage("report")
def run(config: Config, start: lineage.Start) -> Path:
    """Write report.html and return its directory."""
    found = results.read(Path(config.run))
    methods = findings.methods(found)
    directory = lineage.begin(start)
    title = found.record["recipe"]["title"]
    body = [page.heading(title, 1), *findings.headline(found, methods)]
    body += [findings.frontiers(found, directory), findings.win_rates(found), findings.progress(found, directory)]
    body += [findings.sweeps(found, directory), findings.densities(found, directory)]
    body += [provenance.training(found, directory), provenance.rows(found)]
    body += [provenance.samples(found, config.seed), provenance.commands(found)]
    with artifacts.staged_file(directory / "report.html") as file:
        file.write_text(page.document(title, filter(None, body)), encoding="utf-8")
    _tell(*methods, findings.trials_of_failed(found))
    console.say(f"  page: {directory / 'report.html'}")
    lineage.finish(directory)
    return directory


def _tell(header: Sequence[str], rows: Sequence[Sequence[str]], failed: Sequence[str]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows) if rows else ():
        console.say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in failed:
        console.say(f"FAILED {line}, not more than {results.FAILED_BELOW:g} standard errors above the SFT start")


def main(argv: Sequence[str] | None = None) -> int:
    options = config.parse(Config, argv, prog="python -m exo.report", description=__doc__)
    return artifacts.guarded(run, options)


if __name__ == "__main__":
    raise SystemExit(main())
