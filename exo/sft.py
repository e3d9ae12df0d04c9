"""Supervised fine-tuning: the loss of completions given their prompts, from a causal LM to a model directory.

    python -m exo.sft --model DIR_OR_NAME --data FILE

Preferences train on the chosen completion. The loss is the mean over the completion tokens of a step, whatever the
micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exo.cli import console
from exo.cli.fields import MODEL, POSITIVE, named, option
from exo.cli.main import command
from exo.cli.options import AdapterOptions, DataOptions
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo import data
    from exo.data.text.tokenize import TokenizedExample


@dataclass(frozen=True)
class Config(AdapterOptions, DataOptions):
    output_dir: str = option("runs/sft", "directory of the run")
    learning_rate: float = option(1e-5, "peak learning rate of AdamW", POSITIVE)
    model: str = option("", "directory or hub name of a causal LM; tiny builds a small one on the data", MODEL)
    data: str = option("", "prompts with a completion, or preferences", named("a file of prompts with completions"))


@stage("sft", reads=("model", "data"), makes=".")
def run(config: Config, start: Start) -> Path:
    """Fine-tune and return the run directory, which is the model directory."""
    from exo import models
    from exo.data import preview
    from exo.data.collate import Collator
    from exo.data.text import render
    from exo.distributed import accelerator as distributed
    from exo.distributed import fsdp, gather
    from exo.models import lora
    from exo.models.attention import choose
    from exo.runs import inputs as run_inputs
    from exo.runs import record as run_record
    from exo.training import loop, sampler
    from exo.training import run as training_run
    from exo.training.optimizer import OptimizerSettings
    from exo.training.sft_and_reward import NextToken

    dataset = read(config)
    accelerator = distributed.make_accelerator(
        **config.accelerator(), training=distributed.Training(**config.parallel())
    )
    distributed.set_seed(config.seed)
    console.log(dataset.summary())
    adapter = lora.LoraSettings(**config.lora())
    lora.check(adapter, config.model)
    name = run_inputs.source("model", config.model, "sft")
    model, tokenizer = lora.load(
        name, dataset.texts, adapter, accelerator, seed=config.seed, sharded=fsdp.is_requested(config.fsdp)
    )
    dtypes = models.dtypes_of(config.save_dtype, name)
    (dataset,) = render.apply(
        tokenizer, config.chat_template, config.template_kwargs, gather.template_date(start, accelerator), dataset
    )
    counts: Counter[str] = Counter()
    try:
        examples = tokens(config, dataset, tokenizer, counts)
    finally:
        console.counts(counts)
    models.check_fits(model, examples)
    metrics = training_run.begin(start, accelerator, dataset.account(counts))
    steps = sampler.total_steps(len(examples), **config.epochs())
    console.log(
        f"{len(examples):,} texts, {steps:,} steps of {config.batch_size}, "
        f"{models.parameter_count(model) / 1e6:,.1f}M parameters"
    )
    preview.show(examples, tokenizer, preview.LOSS)
    adapted = lora.apply(model, adapter, name)
    collator = choose.choose_layout(
        [distributed.place(model, accelerator, config.fsdp)], examples, accelerator,
        Collator(tokenizer.pad_token_id, config.max_tokens_per_batch), "off", 1.0, config.dropout,
    )  # fmt: skip
    if accelerator.is_main_process:
        run_record.update_run(Path(config.output_dir), layout=collator.layout)
    module = NextToken(adapted).train(config.dropout)
    task = loop.Task.over_epochs(
        module, examples, collator, **config.epochs(), seed=config.seed, denominator=_scored_tokens,
        shown={"loss": "loss", "tokens_per_second": "tok/s"},
    )  # fmt: skip
    settings = loop.Settings(OptimizerSettings(**config.optimizer()), **config.loop())
    loop.train(task, settings, accelerator, metrics)
    finished = lora.merged(module.model, adapter, accelerator)
    return training_run.end(metrics, finished, tokenizer, accelerator, dtypes=dtypes)


def read(config: Config, option: str = "data") -> data.Dataset:
    """Read the file that an option names."""
    from exo import data
    from exo.runs import inputs as run_inputs

    path = run_inputs.source(option, getattr(config, option), "prepare", prepared="sft.jsonl")
    return data.read(path, purpose="texts", **config.reading_of(option))


def tokens(config: Config, dataset: data.Dataset, tokenizer: Any, counts: Counter[str]) -> list[TokenizedExample]:
    """Return the rows to train on; `counts` gets those cut, dropped or noted. DataError if none is left."""
    from exo.data import DataError
    from exo.data.text import tokenize
    from exo.data.text.limits import Limits

    examples, cut = tokenize.encode(
        dataset.examples, tokenizer, Limits(**config.limits()), dataset.path, skip_invalid=config.skip_invalid
    )
    counts.update(cut)
    if not examples:
        raise DataError(f"{config.data}: no row is left to train on")
    return examples


def _scored_tokens(examples: Sequence[TokenizedExample]) -> int:
    return sum(len(completion) for example in examples for completion in example.completions)


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
