"""Supervised fine-tuning: the loss of completions given their prompts, from {"prompt", "completion"} lines to a model.

python -m exo.sft --model DIR_OR_NAME --data FILE. Mean over the completion tokens of a step, whatever the
micro-batches. Left out: held-out evaluation, other formats, packing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import set_seed
from torch import nn

from exo import artifacts, config, console, data, loop, models, packing, plots
from exo.config import option, require
from exo.head import CausalHead
from exo.packing import IGNORE, Batch, TokenGroup
from exo_kernels import linear_token_logps


@dataclass(frozen=True)
class Config(config.Training):
    output_dir: str = option("runs/sft", "directory of the run")
    learning_rate: float = option(1e-5, "peak learning rate of AdamW")
    model: str = option("", "directory or hub name of a causal LM")
    data: str = option("", 'lines of {"prompt", "completion"}')

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.model), "model", "a directory or a hub name", self.model)
        require(bool(self.data), "data", 'a file of {"prompt", "completion"} lines', self.data)


class NextToken(nn.Module):
    """A causal LM whose forward is the cross-entropy of the completions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = CausalHead(model)

    def forward(self, batch: Batch, num_tokens: int) -> loop.Share:
        hidden = self.head.hidden(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        total = -linear_token_logps(hidden, self.head.weight, batch.labels, **self.head.options).double().sum()
        return loop.Share(total / num_tokens, {"nats_per_token": (total.detach(), (batch.labels != IGNORE).sum())})


def run(config: Config) -> Path:
    """Fine-tune and return the run directory, which is the model directory."""
    accelerator = loop.make_accelerator(config)
    set_seed(config.seed)
    model, tokenizer = models.load(config.model)
    groups = _read(config, tokenizer)
    models.check_fits(model, groups)
    directory = Path(config.output_dir)
    if accelerator.is_main_process:
        inputs = (config.model, config.data)
        artifacts.prepare(config.output_dir, overwrite=config.overwrite_output_dir, inputs=inputs)
        artifacts.write_run(directory, config, "sft")
    accelerator.wait_for_everyone()
    console.say(
        f"{len(groups):,} texts, {loop.total_steps(config, len(groups)):,} steps of {config.batch_size}, "
        f"{models.parameter_count(model) / 1e6:,.1f}M parameters"
    )
    accelerator.init_trackers("exo")
    metrics = artifacts.Metrics(directory / "metrics.jsonl")
    loop.train(
        NextToken(model).train(config.dropout), groups, config, accelerator, metrics,
        pad_id=tokenizer.pad_token_id, denominator=_tokens, shown={"loss": "loss", "tokens_per_second": "tok/s"},
    )  # fmt: skip
    metrics.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        with artifacts.staged_into(directory) as staging:
            models.save(model, tokenizer, staging)
        plots.training_curves(directory)
    return directory


def _tokens(groups: Sequence[TokenGroup]) -> int:
    return sum(len(completion) for group in groups for completion in group.completions)


def _read(config: Config, tokenizer: object) -> list[TokenGroup]:
    """Strict: a line without both strings is an error."""
    texts = []
    for line, row in data.read_jsonl(config.data):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise data.DataError(f"{config.data}:{line}: expected strings 'prompt' and 'completion'")
        texts.append(data.Group(prompt, (completion,), None, line))
    if not texts:
        raise data.DataError(f"{config.data}: holds no line")
    limits = packing.Limits(config.max_length, config.max_completion_length, config.truncate)
    groups, counts = packing.encode(texts, tokenizer, limits, config.data)
    for reason, count in sorted(counts.items()):
        console.say(f"  {count:,} {reason}")
    if not groups:
        raise data.DataError(f"{config.data}: no row is left to train on")
    return groups


def main(argv: Sequence[str] | None = None) -> int:
    options = config.parse(Config, argv, prog="python -m exo.sft", description=__doc__)
    return artifacts.guarded(run, options)


if __name__ == "__main__":
    raise SystemExit(main())
