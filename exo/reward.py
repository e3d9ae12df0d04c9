"""Train a reward model: a scalar on the last token, higher for the chosen completion of a pair.

    python -m exo.reward --model DIR_OR_NAME --data FILE

Bradley-Terry: -log sigmoid(r_chosen - r_rejected), mean over pairs; scored completions become pairs of best and worst.
With --labels, lines of {"text", "label"} train a classifier of two classes instead, whose log-odds are the paper's
oracle for sentiment. Saved as a model that AutoModelForSequenceClassification reads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exo.cli import console
from exo.cli.fields import MODEL, PART, POSITIVE, at_least, named, option
from exo.cli.main import command
from exo.cli.options import DataOptions, DataTraining
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo import data
    from exo.data.text.tokenize import TokenizedExample

SHOWN = {"loss": "loss", "accuracy": "acc", "tokens_per_second": "tok/s"}


@dataclass(frozen=True)
class Config(DataTraining, DataOptions):
    output_dir: str = option("runs/reward", "directory of the run")
    learning_rate: float = option(1e-5, "peak learning rate of AdamW", POSITIVE)
    model: str = option("", "directory or hub name of a causal LM, whose body is trained on", MODEL)
    data: str = option(
        "",
        "preferences, scored completions, or texts with a label",
        named("a file of preferences, scored completions or labelled texts"),
    )
    max_completions: int | None = option(None, "make pairs of the first so many completions of each row", at_least(2))
    labels: bool = option(False, "the data are texts with a label, 0 or 1")
    eval_fraction: float = option(0.1, "share of the prompts held out; 0 means none", PART)


@stage("reward", reads=("model", "data"), makes=".")
def run(config: Config, start: Start) -> Path:
    """Train and return the run directory, which is the model directory."""
    from exo import models
    from exo.data.collate import Collator
    from exo.data.text import render
    from exo.distributed import accelerator as distributed
    from exo.distributed import fsdp, gather
    from exo.runs import inputs as run_inputs
    from exo.training import loop, sampler, sft_and_reward
    from exo.training import run as training_run
    from exo.training.optimizer import OptimizerSettings

    dataset = read(config)
    accelerator = distributed.make_accelerator(
        **config.accelerator(), training=distributed.Training(**config.parallel())
    )
    distributed.set_seed(config.seed)
    console.log(dataset.summary())
    name = run_inputs.source("model", config.model, "sft")
    model, tokenizer = models.classifier_from(name, 2 if config.labels else 1, seed=config.seed)
    dtypes = models.dtypes_of(config.save_dtype, name)
    (dataset,) = render.apply(
        tokenizer,
        config.chat_template,
        config.template_kwargs,
        gather.template_date(start, accelerator),
        dataset,
        sampled="render",
    )
    counts: Counter[str] = Counter()
    try:
        examples, held_out = tokens(config, dataset, tokenizer, counts)
    finally:
        console.counts(counts)
    models.check_fits(model, examples + held_out)
    metrics = training_run.begin(start, accelerator, dataset.account(counts))
    steps = sampler.total_steps(len(examples), **config.epochs())
    console.log(f"{len(examples):,} {'texts' if config.labels else 'pairs'}, {steps:,} steps of {config.batch_size}")
    module = (sft_and_reward.LabelLoss if config.labels else sft_and_reward.PairLoss)(
        distributed.place(model, accelerator, config.fsdp)
    ).train(config.dropout)
    collator = Collator(tokenizer.pad_token_id, config.max_tokens_per_batch)
    task = loop.Task.over_epochs(
        module, examples, collator, **config.epochs(), seed=config.seed, denominator=len, shown=SHOWN
    )
    settings = loop.Settings(OptimizerSettings(**config.optimizer()), **config.loop())
    loop.train(task, settings, accelerator, metrics)
    result = sft_and_reward.evaluate(module, held_out, accelerator, collator)
    if result and accelerator.is_main_process:
        metrics.write(step=steps, **result)
    model = fsdp.gather_model(model, accelerator.is_main_process)
    return training_run.end(metrics, model, tokenizer, accelerator, result, dtypes)


def read(config: Config, option: str = "data") -> data.Dataset:
    """Read the file that an option names."""
    from exo import data
    from exo.runs import inputs as run_inputs

    prepared = "labelled.jsonl" if config.labels else "pairs.jsonl"
    path = run_inputs.source(option, getattr(config, option), "prepare", "score", prepared=prepared)
    return data.read(path, purpose="labels" if config.labels else "comparisons", **config.reading_of(option))


def tokens(
    config: Config, dataset: data.Dataset, tokenizer: Any, counts: Counter[str]
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Return the pairs or texts to train on and those held out, which share no prompt (no text) with the others.

    `counts` gets what was cut, dropped or noted. DataError if no row is left to train on.
    """
    from exo.data import DataError, split, transforms
    from exo.data.text import tokenize
    from exo.data.text.limits import Limits

    rows = dataset.examples
    if config.max_completions is not None:
        rows, skipped = transforms.take_first(rows, config.max_completions)
        counts.update(skipped)
    if config.labels:
        if len({example.label for example in rows}) == 1:
            raise DataError(f"{config.data}: expected texts of both labels; all have {rows[0].label}")
    else:
        rows, skipped = transforms.to_pairs(rows)
        counts.update(skipped)
    chosen = split.hold_out(rows, config.eval_fraction, config.seed, config.data, at_least=0)
    encoded = []
    for is_held_out in (False, True):
        part = [example for i, example in enumerate(rows) if (i in chosen) == is_held_out]
        examples, cut = tokenize.encode(
            part, tokenizer, Limits(**config.limits()), dataset.path, retokenize=True, skip_invalid=config.skip_invalid
        )
        counts.update(cut)
        encoded.append(examples)
    train, held_out = encoded
    if not train:
        raise DataError(f"{config.data}: no row is left to train on")
    return train, held_out


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
