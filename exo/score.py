"""Score every completion of a file of samples with a reward model, a classifier or a Python function.

    python -m exo.score --data FILE (--reward_model DIR | --oracle module:function)

All other columns stay. Scores are cached while they are computed; run the same command again to resume a killed run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from exo.cli import console
from exo.cli.fields import at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import ChatOptions, DataOptions, ScorerOptions, Scoring
from exo.runs.stage import Start, stage


@dataclass(frozen=True)
class Config(Scoring, DataOptions, ChatOptions, ScorerOptions):
    output_dir: str = option("runs/scored", "directory of the run")
    data: str = option("", "samples: prompts with completions", named("a file of samples"))
    max_length: int = option(1024, "tokens of prompt and completion together", at_least(2))
    max_prompt_length: int | None = option(
        None,
        "keep at most this many last tokens of a prompt; none cuts the completion first, and leaves the prompt at "
        "least half of max_length",
        at_least(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rendered = self.chat_template not in ("auto", "none") or self.template_kwargs is not None
        expected = "auto with --oracle, which reads plain texts"
        require(not (self.oracle and rendered), "chat_template", expected, rendered)


@stage("score", reads=("data", "reward_model", "oracle"), makes="scored.jsonl")
def run(config: Config, start: Start) -> Path:
    """Score and return the run directory, which has scored.jsonl."""
    from exo import data
    from exo.distributed import gather
    from exo.distributed.accelerator import make_accelerator
    from exo.rollouts import samples, scorers, shards
    from exo.runs import inputs as run_inputs

    path = run_inputs.source("data", config.data, "sample", "best_of_n", "score")
    dataset = data.read(path, purpose="samples", **config.reading(), **config.mixing())
    console.log(dataset.summary())
    if num_scored := sum(example.rewards is not None for example in dataset.examples):
        console.log(f"  {num_scored:,} rows have rewards, which are replaced")
    accelerator = make_accelerator(**config.accelerator())
    options = config.values("max_length max_prompt_length max_tokens_per_batch chat_template template_kwargs")
    options["date"] = gather.template_date(start, accelerator)
    scorer = scorers.load(config.reward_model, config.oracle, accelerator, **options)
    console.log(f"scored by {scorer.name}")
    refused, dropped = scorer.refused(dataset.examples, dataset.path, config.skip_invalid)
    console.counts(dropped)
    examples = [example for i, example in enumerate(dataset.examples) if i not in refused]
    if not examples:
        raise data.DataError(f"{dataset.path}: no row is left to score")
    cache = shards.begin(start, accelerator, dataset.account(dropped))
    progress = console.Progress("rows", len(examples), every=max(1, len(examples) // 4))
    scores, counts = shards.score_shared(scorer, examples, accelerator, cache=cache, progress=progress.advance)
    result = scorers.describe(scores)
    console.log(f"  mean {result['mean']:+.3f}, standard deviation {result['standard_deviation']:.3f}")
    for name in ("rows of one completion", "rows whose rewards are all equal"):
        if result[name]:
            console.log(f"  {result[name]:,} {name}: nothing to compare")
    console.counts(counts)
    rows = (samples.to_row(replace(example, rewards=values)) for example, values in zip(examples, scores, strict=True))
    return shards.end(cache, "scored.jsonl", rows, accelerator, result)


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
