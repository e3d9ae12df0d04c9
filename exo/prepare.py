"""Prepare the data of a task: texts to imitate, prompts, held-out prompts, preferences.

    python -m exo.prepare --task NAME [--source FILE_DIR_OR_HUB]

exo.experiments.tasks describes the tasks and the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exo.cli import console
from exo.cli.fields import at_least, option, require
from exo.cli.main import command
from exo.cli.options import SourceOptions
from exo.experiments import tasks
from exo.runs.stage import Start, stage


@dataclass(frozen=True)
class Config(SourceOptions):
    output_dir: str = option("runs/data", "directory of the run")
    task: str = option("quickstart", f"one of {', '.join(tasks.TASKS)}")
    source: str | None = option(None, "files of the task: a file, a directory, or a hub name")
    rows: int | None = option(None, "use at most this many rows of each part of the source", at_least(2))
    tokenizer: str | None = option(None, "for imdb: model whose tokenizer cuts the texts, a directory or a hub name")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task in tasks.TASKS, "task", f"one of {', '.join(tasks.TASKS)}", self.task)
        by_tokens = self.task in tasks.BY_TOKENS
        expected = "a model, whose tokenizer cuts the texts" if by_tokens else "none, because this task needs none"
        require(by_tokens == (self.tokenizer is not None), "tokenizer", expected, self.tokenizer)
        expected = "the files of the task" if self.source is None else "none, because this task generates its files"
        require((self.task == "quickstart") == (self.source is None), "source", expected, self.source)


@stage("prepare", reads=("source", "tokenizer"), makes=".")
def run(config: Config, start: Start) -> Path:
    """Write the task's files and return the run directory."""
    from exo.experiments.tasks.source import TaskRequest
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_directory, atomic_file

    request = TaskRequest(config.source or "", config.rows, config.seed, config.tokenizer, config.reading())
    files = tasks.load(config.task)(request)
    directory = run_stage.begin(start)
    counts = {}
    for name, write in files.items():
        atomic = atomic_file if "." in name else atomic_directory
        with atomic(directory / name) as path:
            counts[name] = write(path)
        console.log(f"  {name}: {counts[name]:,}" if counts[name] else f"  {name}")
    run_stage.finish(directory, result=counts)
    return directory


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
