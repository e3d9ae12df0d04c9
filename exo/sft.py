"""Supervised fine-tuning: the loss of completions given their prompts, from a causal LM and texts to a model directory.

python -m exo.sft --model DIR_OR_NAME --data FILE. Of preferences, the chosen completion is learned. Mean over the
completion tokens of a step, whatever the micro-batches. Left out: held-out evaluation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from exo import (
    adapter,
    artifacts,
    attention,
    batches,
    config,
    console,
    data,
    encoding,
    examples,
    layouts,
    lineage,
    loop,
    models,
    processes,
    runs,
    templates,
)
from exo.config import MODEL, POSITIVE, named, option
from exo.encoding import TokenGroup
from exo.head import CausalHead
from exo.packing import Batch, Packing
from exo.steps import Share
from exo_kernels import linear_token_logps


@dataclass(frozen=True)
class Config(adapter.Options, config.DataOptions):
    output_dir: str = option("runs/sft", "directory of the run")
    learning_rate: float = option(1e-5, "peak learning rate of AdamW", POSITIVE)
    model: str = option("", "directory or hub name of a causal LM; tiny builds a small one on the data", MODEL)
    data: str = option("", "prompts with a completion, or preferences", named("a file of prompts with completions"))


class NextToken(nn.Module):
    """A causal LM whose forward is the cross-entropy of the completions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = CausalHead(model)

    def forward(self, batch: Batch, num_tokens: int) -> Share:
        rows = attention.rows(self.head, batch)
        logps = linear_token_logps(rows, self.head.weight, **attention.scored(batch), **self.head.options)
        total = -logps.double().sum()
        return Share(total / num_tokens, {"nats_per_token": (total.detach(), len(logps))})


@lineage.stage("sft")
def run(config: Config, start: lineage.Start) -> Path:
    """Fine-tune and return the run directory, which is the model directory."""
    dataset = read(config)
    accelerator = loop.make_accelerator(config)
    set_seed(config.seed)
    console.say(dataset.summary())
    adapter.check(config, config.model)
    name = lineage.source("model", config.model, "sft")
    model, tokenizer = adapter.load(config, name, dataset.texts, accelerator)
    dtypes = models.dtypes_of(config.save_dtype, name)
    (dataset,) = templates.apply(config, tokenizer, processes.template_date(start, accelerator), dataset)
    counts: Counter[str] = Counter()
    try:
        groups = tokens(config, dataset, tokenizer, counts)
    finally:
        console.counts(counts)
    models.check_fits(model, groups)
    metrics = runs.begin(start, accelerator, dataset.account(counts))
    steps = batches.total_steps(config, len(groups))
    console.say(
        f"{len(groups):,} texts, {steps:,} steps of {config.batch_size}, "
        f"{models.parameter_count(model) / 1e6:,.1f}M parameters"
    )
    examples.show(groups, tokenizer, examples.LOSS)
    adapted = adapter.add(model, config, name)
    packing = layouts.choose(
        [loop.placed(model, config, accelerator)], groups, accelerator,
        Packing(tokenizer.pad_token_id, config.max_tokens_per_batch), "off", 1.0, config.dropout,
    )  # fmt: skip
    if accelerator.is_main_process:
        artifacts.update_run(Path(config.output_dir), layout=packing.layout)
    module = NextToken(adapted).train(config.dropout)
    loop.train(
        module, batches.Batches(groups, config, steps), steps, config, accelerator, metrics,
        packing=packing, denominator=_scored_tokens,
        steps_an_epoch=batches.epoch_steps(config, len(groups)), shown={"loss": "loss", "tokens_per_second": "tok/s"},
    )  # fmt: skip
    finished = adapter.finished(module.model, config, accelerator)
    return runs.end(metrics, finished, tokenizer, accelerator, dtypes=dtypes)


def read(config: Config, option: str = "data") -> data.Dataset:
    """Read the file that an option names."""
    path = lineage.source(option, getattr(config, option), "prepare", prepared="sft.jsonl")
    return data.read(path, purpose="texts", **config.reading_of(option))


def tokens(config: Config, dataset: data.Dataset, tokenizer: Any, counts: Counter[str]) -> list[TokenGroup]:
    """Return the rows to train on; `counts` gets what was cut, dropped or noted. DataError if none is left."""
    groups, cut = encoding.encode(
        dataset.groups, tokenizer, config.limits(), dataset.path, skip_invalid=config.skip_invalid
    )
    counts.update(cut)
    if not groups:
        raise data.DataError(f"{config.data}: no row is left to train on")
    return groups


def _scored_tokens(groups: Sequence[TokenGroup]) -> int:
    return sum(len(completion) for group in groups for completion in group.completions)


def main(argv: Sequence[str] | None = None) -> int:
    options = config.parse(Config, argv, prog="python -m exo.sft", description=__doc__)
    return artifacts.guarded(run, options)


if __name__ == "__main__":
    raise SystemExit(main())
