"""Best-of-N: of every N completions of a row the one of the highest reward, the paper's upper bound on what is in them.

python -m exo.best_of_n --data SCORED --n N. A row of M N completions gives M of them. The policy that this amounts to
is at most log N - (N - 1)/N nats from the one that was sampled: exactly that where no two completions are alike.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from exo import data
from exo.cli import console
from exo.cli.fields import at_least, named, option
from exo.cli.main import command
from exo.cli.options import DataOptions
from exo.data import transforms
from exo.rollouts import samples
from exo.runs import inputs as run_inputs
from exo.runs import stage as run_stage
from exo.runs.atomic import atomic_file
from exo.runs.stage import Start, stage


@dataclass(frozen=True)
class Config(DataOptions):
    output_dir: str = option("runs/best_of_n", "directory of the run")
    data: str = option("", "scored completions, a multiple of n in a row", named("a file of scored completions"))
    n: int = option(8, "completions of which the best is taken", at_least(1))


def kl_bound(n: int) -> float:
    """KL(best of n || the policy sampled), at most, in nats."""
    return math.log(n) - (n - 1) / n


@stage("best_of_n")
def run(config: Config, start: Start) -> Path:
    """Choose, and return the run directory, which has samples.jsonl."""
    path = run_inputs.source("data", config.data, "score")
    dataset = data.read(path, purpose="samples", **config.reading(), **config.mixing())
    console.log(dataset.summary())
    chosen = [_best(example, config.n, path) for example in dataset.examples]
    if alike := sum(len(set(example.rewards or ())) == 1 for example in dataset.examples):
        console.log(f"  {alike:,} rows whose rewards are all equal: the first completion is taken")
    samples.log_cut(dataset.examples)
    directory = run_stage.begin(start, rows=dataset.account())
    with atomic_file(directory / "samples.jsonl") as file:
        data.write_jsonl(file, map(samples.to_row, chosen))
    console.log(f"best of {config.n}: at most {kl_bound(config.n):.3f} nats from the policy that was sampled")
    run_stage.finish(directory, result={"n": config.n, "kl_bound": kl_bound(config.n)})
    return directory


def _best(example: data.Example, n: int, path: str) -> data.Example:
    rewards = example.rewards
    if rewards is None:
        raise data.DataError(f"{example.place(path)}: has no rewards; python -m exo.score makes them")
    if len(rewards) % n:
        raise data.DataError(f"{example.place(path)}: expected a multiple of --n {n} completions; got {len(rewards)}")
    blocks = (range(start, start + n) for start in range(0, len(rewards), n))
    return transforms.select(example, [max(block, key=lambda i: rewards[i]) for block in blocks])


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
