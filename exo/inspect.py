"""Show the data that a stage would train on: format, examples, lengths, cut rows, ties, duplicates, leaks.

    python -m exo.inspect --data FILE --model DIR_OR_NAME [--stage sft|reward|sample]

It takes every option of the stage, with the same defaults: replace exo.align in a command by exo.inspect. Exits with 0
if the stage would start, and with 2 and the stage's error if it would not, because it calls the functions of the stage.
It reads the tokenizer and config.json of the model but no weights, and it writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from exo.cli import console
from exo.cli.errors import RunError, describe
from exo.cli.fields import NOT_NEGATIVE, option
from exo.cli.main import prepare_process, run_command
from exo.cli.parse import parse

if TYPE_CHECKING:
    from exo.data import Dataset, Example
    from exo.data.text.tokenize import TokenizedExample

POLICIES = ("sft", "align", "ppo")
MODEL_FROM = {"align": POLICIES, "sft": ("sft",), "reward": ("sft",), "sample": POLICIES}  # stages that produce --model


@dataclass(frozen=True)
class Options:
    """Options that inspect adds to those of the stage."""

    stage: Literal["align", "sft", "reward", "sample"] = option("align", "stage that would read the data")
    eval_data: str | None = option(None, "held-out or test file; its texts should not be in --data")
    examples: int = option(3, "number of rows to show, from the first to the longest", NOT_NEGATIVE)
    color: Literal["auto", "always", "never"] = option("auto", "auto colors on a terminal if NO_COLOR is not set")


class Plan(NamedTuple):
    """The rows that the stage would train on, or its error."""

    rows: list[TokenizedExample]
    counts: Counter[str]  # rows cut, dropped or noted, by reason
    summary: str
    error: ValueError | None = None


def run(options: Any) -> None:
    """Print the report and whether the stage would start; ValueError with its error if it would not."""
    work = "Sampling" if options.stage == "sample" else "Training"
    try:
        summary = _report(options, importlib.import_module(f"exo.{options.stage}"))
    except (ValueError, RunError, OSError) as error:
        message = describe(error) if isinstance(error, OSError) else str(error)
        console.log(f"\n{work} would not start: {message}")
        raise ValueError(message) from None
    console.log(f"\n{work} would start: {summary}")


def _report(options: Any, stage: Any) -> str:
    """Print the report; return a summary of the run, or raise the stage's error."""
    from exo.data import Chat, preview, statistics
    from exo.data.text import chat_template, render, tokenize

    dataset, held_out = _read_data(options, stage)
    console.headline("Data")
    for part in filter(None, (dataset, held_out)):
        console.log(part.summary())
    model, tokenizer = _load_model(options, dataset)
    rendered, rendered_held_out = _render_prompts(options, tokenizer, dataset, held_out)
    _print([render.describe(options.chat_template, rendered, tokenizer)])
    plan = _plan_run(options, stage, rendered, rendered_held_out, tokenizer, model)
    uncut = _tokenize_uncut(options, rendered, tokenizer)
    console.headline("Examples")
    rows = plan.rows or [tokenize.factor_prefix(row) if options.stage == "align" else row for row in uncut]
    scored = {"align": preview.LOSS_AFTER_PREFIX, "sft": preview.LOSS, "reward": preview.SCORE}.get(options.stage, "")
    preview.show(rows, tokenizer, scored, count=options.examples, color=options.color)
    console.headline("Lengths in tokens, before the limits")
    limits = {name: getattr(options, name) for name in vars(options) if name.endswith("_length")}
    _print(preview.length_lines(limits, uncut) or ["no row can be tokenized"])
    if plan.counts:
        console.log("rows cut, dropped or noted:")
    elif not plan.error:
        console.log("the limits cut nothing")
    console.counts(plan.counts)
    console.headline("Rows")
    lines = statistics.comparison_lines(dataset.examples, uncut) + statistics.duplicate_lines(dataset.examples)
    chats = [example for example in rendered.examples if isinstance(example.prompt, Chat)]
    control_tokens = chat_template.Renderer(tokenizer).control_tokens if chats else ()
    if count := statistics.count_rows_with(control_tokens, chats):
        lines.append(f"control tokens in chat messages, which are read as plain text: {count:,} rows")
    _print(lines + (statistics.leak_lines(dataset.examples, held_out.examples) if held_out else []))
    if plan.error:
        raise plan.error
    return plan.summary


def _print(lines: Sequence[str]) -> None:
    """Print lines; wrap them on a terminal only, so that other programs can search the output."""
    for line in lines:
        console.log(textwrap.fill(line, console.width(), subsequent_indent="  ") if sys.stdout.isatty() else line)


def _read_data(options: Any, stage: Any) -> tuple[Dataset, Dataset | None]:
    """Read --data as the stage does, and --eval_data, which every stage can have here."""
    from exo import sample
    from exo.data import DataError, split

    dataset = stage.read(options)
    if not options.eval_data:
        return dataset, None
    try:
        held_out = stage.read(options, "eval_data")
    except DataError as error:
        if options.stage == "align":
            raise
        with contextlib.suppress(DataError):  # test files may have only prompts
            return dataset, sample.read(options, "eval_data")
        raise error
    if options.stage == "align":
        split.warn_of_leaks(dataset, held_out)
    return dataset, held_out


def _load_model(options: Any, dataset: Dataset) -> tuple[Any, Any]:
    """Return --model on the meta device and its tokenizer."""
    from exo import models
    from exo.models import lora
    from exo.runs import inputs

    is_policy = options.stage in ("align", "sft")
    if is_policy:
        lora.check(lora.LoraSettings(**options.lora()), options.model)
    name = inputs.source("model", options.model, *MODEL_FROM[options.stage])
    if is_policy and not options.load_in_4bit:
        return models.load_or_tiny(name, dataset.texts, seed=options.seed, read=models.load_without_weights)
    return models.classifier_without_weights(name) if options.stage == "reward" else models.load_without_weights(name)


def _render_prompts(
    options: Any, tokenizer: Any, dataset: Dataset, held_out: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Configure the chat template; return the stage's data with rendered prompts."""
    from exo.data.text import render
    from exo.runs import inputs, record
    from exo.runs.stage import template_date

    previous = None if options.overwrite_output_dir else record.record(Path(options.output_dir))
    date = datetime.date.fromisoformat(template_date(previous, inputs.inputs(options, options.stage).values()))
    datasets = [dataset, held_out] if held_out and options.stage == "align" else [dataset]
    sampled: Literal["keep", "render"] = "render" if options.stage == "reward" else "keep"
    template = (options.chat_template, options.template_kwargs)
    rendered, *others = render.apply(tokenizer, *template, date, *datasets, sampled=sampled)
    return rendered, others[0] if others else None


def _plan_run(options: Any, stage: Any, dataset: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any) -> Plan:
    """Tokenize, cut and split the rows as the stage does, and count its steps."""
    from exo.training import sampler

    counts: Counter[str] = Counter()
    try:
        if options.stage == "sample":
            total = len(dataset.examples)
            chosen = [dataset.examples[i % total] for i in stage.chosen(options, total)]
            rows = _tokenize_prompts(chosen, tokenizer, options.max_prompt_length, counts)
            return Plan(rows, counts, f"{len(rows):,} prompts x {options.k} completions")
        rows = _training_rows(options, stage, dataset, held_out, tokenizer, model, counts)
    except ValueError as error:
        return Plan([], counts, "", error)
    steps = sampler.total_steps(len(rows), **options.epochs())
    return Plan(rows, counts, f"{len(rows):,} rows, {steps:,} steps of {options.batch_size}")


def _training_rows(
    options: Any, stage: Any, data: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any, counts: Counter[str]
) -> list[TokenizedExample]:
    """Return the rows to train on, after the stage's checks of all rows and of its reference model."""
    from exo import models
    from exo.training import reference

    rows, others = stage.tokens(options, data, tokenizer, counts), []
    if options.stage == "reward":
        rows, others = rows
    elif held_out:
        others = stage.tokens(options, held_out, tokenizer, counts)
    models.check_fits(model, rows + others)
    if options.stage != "align":
        return rows
    train = stage.split_rows(options, data, rows, others, counts).train
    reference.load(options.reference, options.ref_model, rows + others, tokenizer, models.load_without_weights)
    return train


def _tokenize_prompts(
    examples: Sequence[Example], tokenizer: Any, max_length: int, counts: Counter[str]
) -> list[TokenizedExample]:
    from exo.data.text import tokenize

    prompts, cut = tokenize.sampled_prompts([example.prompt for example in examples], tokenizer, max_length)
    counts.update(cut)
    pairs = zip(prompts, examples, strict=True)
    return [tokenize.TokenizedExample(tuple(ids), (), None, example.line) for ids, example in pairs]


def _tokenize_uncut(options: Any, dataset: Dataset, tokenizer: Any) -> list[TokenizedExample]:
    """Tokenize the rows without limits, and leave out those that the tokenizer or its template refuses."""
    from exo.data import DataError
    from exo.data.text import tokenize
    from exo.data.text.limits import Limits

    if options.stage == "sample":
        with contextlib.suppress(DataError):
            return _tokenize_prompts(dataset.examples, tokenizer, sys.maxsize, Counter())
        return []
    limits, is_reward = Limits(sys.maxsize, None, "error"), options.stage == "reward"
    rows, _ = tokenize.encode(
        dataset.examples, tokenizer, limits, dataset.path, retokenize=is_reward, skip_invalid=True
    )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, whose options include those of the stage in --stage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    head = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    head.add_argument("--stage", default="align")
    name = head.parse_known_args(arguments)[0].stage
    stage = importlib.import_module(f"exo.{name if name in MODEL_FROM else 'align'}")
    config: Any = dataclasses.make_dataclass("Config", (), bases=(Options, stage.Config), frozen=True)
    options = parse(config, arguments, prog="python -m exo.inspect", description=__doc__)
    if options.stage != name:
        print("error: --stage: found in --config; give it on the command line", file=sys.stderr)
        return 2
    return run_command(run, dataclasses.replace(options, nproc=1))


if __name__ == "__main__":
    prepare_process(__name__)
    raise SystemExit(main())
