"""The data of a task as the stages read them: texts to imitate, prompts, held-out prompts, preferences.

python -m exo.prepare --task NAME [--source FILE_DIR_OR_HUB]. exo.experiments.tasks describes the files. Left out:
tokens, which depend on the model.
"""

from dataclasses import dataclass
from pathlib import Path

from exo.cli import console
from exo.cli.fields import at_least, option, require
from exo.cli.main import command
from exo.cli.options import SourceOptions
from exo.experiments import tasks
from exo.runs import stage as run_stage
from exo.runs.atomic import atomic_directory, atomic_file
from exo.runs.stage import Start, stage


@dataclass(frozen=True)
class Config(SourceOptions):
    output_dir: str = option("runs/data", "directory of the run")
    task: str = option("quickstart", f"one of {', '.join(tasks.TASKS)}")
    source: str | None = option(None, "where the task's files are: a file, a directory, or a hub name")
    rows: int | None = option(None, "use at most so many rows of each part of the source", at_least(2))
    tokenizer: str | None = option(None, "model whose tokens cut the texts of imdb: a directory or a hub name")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.task in tasks.TASKS, "task", f"one of {', '.join(tasks.TASKS)}", self.task)
        cuts = self.task in tasks.BY_TOKENS
        needed = "a model, whose tokens cut the texts" if cuts else "none: nothing is cut by tokens"
        require(cuts == (self.tokenizer is not None), "tokenizer", needed, self.tokenizer)
        needed = "where the files are" if self.source is None else "none, since the task makes its own"
        require((self.task == "quickstart") == (self.source is None), "source", needed, self.source)


@stage("prepare")
def run(config: Config, start: Start) -> Path:
    """Write the task's files and return the run directory."""
    wanted = tasks.TaskRequest(config.source or "", config.rows, config.seed, config.tokenizer, config.reading())
    made = tasks.TASKS[config.task](wanted)
    directory = run_stage.begin(start)
    counts = {}
    for name, write in made.items():
        with atomic_directory(directory / name) if "." not in name else atomic_file(directory / name) as path:
            counts[name] = write(path)
        console.log(f"  {name}: {counts[name]:,}" if counts[name] else f"  {name}")
    run_stage.finish(directory, result=counts)
    return directory


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
