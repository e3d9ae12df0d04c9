"""Best-of-N: keep the highest-reward completion of every N, the paper's upper bound for a set of samples.

    python -m exo.best_of_n --data SCORED --n N

A row with M N completions keeps M of them. The result is a sample of a policy whose KL to the sampled one is at most
log N - (N - 1)/N nats, and exactly that if all completions differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exo.cli import console
from exo.cli.fields import at_least, named, option
from exo.cli.main import command
from exo.cli.options import DataOptions
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo import data


@dataclass(frozen=True)
class Config(DataOptions):
    output_dir: str = option("runs/best_of_n", "directory of the run")
    data: str = option("", "scored completions, a multiple of n per row", named("a file of scored completions"))
    n: int = option(8, "keep the best of every n completions", at_least(1))


def kl_bound(n: int) -> float:
    """Return the upper bound of KL(best of n || sampled policy), in nats."""
    return math.log(n) - (n - 1) / n


@stage("best_of_n", reads=("data",), makes="samples.jsonl")
def run(config: Config, start: Start) -> Path:
    """Choose the best completions and return the run directory, which has samples.jsonl."""
    from exo import data
    from exo.rollouts import samples
    from exo.runs import inputs as run_inputs
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_file

    path = run_inputs.source("data", config.data, "score")
    dataset = data.read(path, purpose="samples", **config.reading(), **config.mixing())
    console.log(dataset.summary())
    best = [_select_best(example, config.n, path) for example in dataset.examples]
    if num_ties := sum(len(set(example.rewards or ())) == 1 for example in dataset.examples):
        console.log(f"  {num_ties:,} rows with equal rewards: the first completion is kept")
    samples.log_cut(dataset.examples)
    directory = run_stage.begin(start, rows=dataset.account())
    with atomic_file(directory / "samples.jsonl") as file:
        data.write_jsonl(file, map(samples.to_row, best))
    console.log(f"best of {config.n}: at most {kl_bound(config.n):.3f} nats from the sampled policy")
    run_stage.finish(directory, result={"n": config.n, "kl_bound": kl_bound(config.n)})
    return directory


def _select_best(example: data.Example, n: int, path: str) -> data.Example:
    """Keep the completion with the highest reward of every block of n."""
    from exo.data import DataError, transforms

    rewards = example.rewards
    if rewards is None:
        raise DataError(f"{example.place(path)}: expected rewards; got none; run python -m exo.score")
    if len(rewards) % n:
        raise DataError(f"{example.place(path)}: expected a multiple of --n {n} completions; got {len(rewards)}")
    blocks = (range(start, start + n) for start in range(0, len(rewards), n))
    return transforms.select(example, [max(block, key=lambda i: rewards[i]) for block in blocks])


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
