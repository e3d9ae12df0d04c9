"""Show what a stage would train on, before it trains: format, examples, lengths, what is cut, ties, duplicates, leaks.

python -m exo.inspect --data FILE --model DIR_OR_NAME [--stage sft|reward|sample]. It takes every option of the stage,
with the same defaults: replace exo.align in a command by exo.inspect. Exits with 0 if the stage would start, and with 2
and the stage's error if it would not. It reads the tokenizer and config.json of the model but no weights, and it writes
nothing. The functions of the stages do the work, so that inspect fails where the stage would.
"""

import argparse
import contextlib
import dataclasses
import datetime
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from exo import align, models, reward, sample, sft
from exo.cli import console
from exo.cli.errors import RunError
from exo.cli.fields import NOT_NEGATIVE, option
from exo.cli.main import prepare_process, run_command
from exo.cli.parse import parse
from exo.data import Chat, DataError, Dataset, Example, preview, split, statistics
from exo.data.preview import Color
from exo.data.text import chat_template, render, tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenizedExample
from exo.models import lora
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.training import sampler

UNLIMITED = Limits(sys.maxsize, None, "error")


class Stage(NamedTuple):
    module: Any  # its Config, `read` and more are used
    model_from: tuple[str, ...]  # stages whose directories --model may name
    scored: str  # what is done with the scored part of an example


POLICIES = ("sft", "align", "ppo")
STAGES = {
    "align": Stage(align, POLICIES, preview.LOSS_OF_DIFFERENCE),
    "sft": Stage(sft, ("sft",), preview.LOSS),
    "reward": Stage(reward, ("sft",), preview.SCORE),
    "sample": Stage(sample, POLICIES, ""),
}


@dataclass(frozen=True)
class Options:
    """The options of inspect itself, beside those of the stage."""

    stage: Literal["align", "sft", "reward", "sample"] = option("align", "the stage that would read the data")
    eval_data: str | None = option(None, "a held-out or test file; its texts are looked for in --data")
    examples: int = option(3, "rows to show: the first, others up to the longest", NOT_NEGATIVE)
    color: Color = option("auto", "auto colors on a terminal if NO_COLOR is not set")


def run(options: Any) -> None:
    """Print the report. ValueError with the stage's error if the stage would not start."""
    work = "Sampling" if options.stage == "sample" else "Training"
    try:
        sentence = _report(options)
    except (ValueError, RunError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        console.log(f"\n{work} would not start: {message}")
        raise ValueError(message) from None
    console.log(f"\n{work} would start: {sentence}")


def _report(options: Any) -> str:
    """Print all that is known before training; return what would be trained, or raise the stage's error."""
    dataset, held_out = _read(options.stage, options)
    console.headline("Data")
    for part in filter(None, (dataset, held_out)):
        console.log(part.summary())
    model, tokenizer = _load(options.stage, options, dataset.texts)
    rendered, other = _render(options.stage, options, tokenizer, dataset, held_out)
    _say([render.describe(options.chat_template, rendered, tokenizer)])
    plan = _plan(options.stage, options, rendered, other, tokenizer, model)
    uncut = _uncut(options.stage, rendered, tokenizer)
    console.headline("Examples")
    rows = plan.rows or [tokenize.factor_prefix(row) if options.stage == "align" else row for row in uncut]
    scored = STAGES[options.stage].scored
    preview.show(rows, tokenizer, scored, count=options.examples, color=options.color)
    console.headline("Lengths in tokens, before the limits")
    limits = {name: getattr(options, name) for name in vars(options) if name.endswith("_length")}
    lengths = preview.length_lines(limits, uncut)
    _say(lengths or ["no row can be tokenized"])
    if plan.counts:
        console.log("what is cut, dropped or noted:")
    elif not plan.error:
        console.log("the limits cut nothing")
    console.counts(plan.counts)
    console.headline("Rows")
    lines = statistics.comparison_lines(dataset.examples, uncut) + statistics.repeat_lines(dataset.examples)
    chats = [example for example in rendered.examples if isinstance(example.prompt, Chat)]
    if spelled := chats and statistics.spelling(chats, chat_template.Renderer(tokenizer).control_tokens):
        lines.append(f"control tokens in chat messages, which are read as plain text: {spelled:,} rows")
    _say(lines + (statistics.leak_lines(dataset.examples, held_out.examples) if held_out else []))
    if plan.error:
        raise plan.error
    return plan.sentence


def _say(lines: Sequence[str]) -> None:
    """Print lines, wrapped on a terminal alone: other programs may look for them."""
    for line in lines:
        console.log(textwrap.fill(line, console.width(), subsequent_indent="  ") if sys.stdout.isatty() else line)


class Plan(NamedTuple):
    """What would be trained on, or why nothing would be."""

    rows: list[TokenizedExample]
    counts: Counter[str]  # rows cut, dropped or noted, by reason
    sentence: str
    error: ValueError | None


def _read(name: str, options: Any) -> tuple[Dataset, Dataset | None]:
    """Read --data and --eval_data as the stage does; of its own, inspect reads --eval_data for any stage."""
    stage = STAGES[name].module
    dataset = stage.read(options)
    if not options.eval_data:
        return dataset, None
    try:
        held_out = stage.read(options, "eval_data")
    except DataError as error:
        if name == "align":
            raise
        with contextlib.suppress(DataError):  # test files may have prompts alone
            return dataset, sample.read(options, "eval_data")
        raise error
    if name == "align":
        split.warn_of_leaks(dataset, held_out)
    return dataset, held_out


def _load(name: str, options: Any, texts: Callable[[], Any]) -> tuple[Any, Any]:
    """Return --model on the meta device and its tokenizer."""
    trains_policy = name in ("align", "sft")
    if trains_policy:
        lora.check(lora.LoraSettings(**options.lora()), options.model)
    model = run_inputs.source("model", options.model, *STAGES[name].model_from)
    if trains_policy and not options.load_in_4bit:
        return models.load_or_tiny(model, texts, seed=options.seed, read=models.load_without_weights)
    if name == "reward":
        return models.classifier_without_weights(model)
    return models.load_without_weights(model)


def _render(
    name: str, options: Any, tokenizer: Any, dataset: Dataset, held_out: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Set up the chat template, and return the data that the stage reads with the prompts that it renders."""
    sampled: Any = "render" if name == "reward" else "keep"
    previous = None if options.overwrite_output_dir else run_record.record(Path(options.output_dir))
    inputs = run_inputs.inputs(options, name).values()
    date = datetime.date.fromisoformat(run_stage.template_date(previous, inputs))
    others = [held_out] if held_out and name == "align" else []
    rendered, *others = render.apply(options, tokenizer, date, dataset, *others, sampled=sampled)
    return rendered, others[0] if others else None


def _plan(name: str, options: Any, dataset: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any) -> Plan:
    """Tokenize, cut and split the rows as the stage does."""
    counts: Counter[str] = Counter()
    try:
        rows = _rows(name, options, dataset, held_out, tokenizer, model, counts)
    except ValueError as error:
        return Plan([], counts, "", error)
    if name == "sample":
        return Plan(rows, counts, f"{len(rows):,} prompts x {options.k} completions", None)
    each = f"{sampler.total_steps(**options.steps(len(rows))):,} steps of {options.batch_size}"
    return Plan(rows, counts, f"{len(rows):,} rows, {each}", None)


def _rows(
    name: str, options: Any, dataset: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any,
    counts: Counter[str],
) -> list[TokenizedExample]:  # fmt: skip
    """Return the rows that are trained on, or the prompts that are sampled from."""
    if name == "sample":
        total = len(dataset.examples)
        chosen = [dataset.examples[i % total] for i in sample.chosen(options, total)]
        return _prompts(chosen, tokenizer, options.max_prompt_length, counts)
    others: list[TokenizedExample] = []
    if name == "reward":
        rows, others = reward.tokens(options, dataset, tokenizer, counts)
    else:
        rows = STAGES[name].module.tokens(options, dataset, tokenizer, counts)
    if held_out:
        others = align.tokens(options, held_out, tokenizer, counts)
    models.check_fits(model, rows + others)
    if name != "align":
        return rows
    train = align.parted(options, dataset, rows, others, counts).train
    align.reference_model(options, rows + others, tokenizer, models.load_without_weights)
    return train


def _prompts(examples: Sequence[Example], tokenizer: Any, most: int, counts: Counter[str]) -> list[TokenizedExample]:
    prompts, cut = tokenize.sampled_prompts([example.prompt for example in examples], tokenizer, most)
    counts.update(cut)
    return [
        TokenizedExample(tuple(ids), (), None, example.line) for ids, example in zip(prompts, examples, strict=True)
    ]


def _uncut(name: str, dataset: Dataset, tokenizer: Any) -> list[TokenizedExample]:
    """Return the rows as tokens whatever the limits say, but those that the tokenizer or its template refuses."""
    examples = dataset.examples
    if name == "sample":
        with contextlib.suppress(DataError):
            return _prompts(examples, tokenizer, sys.maxsize, Counter())
        return []
    foreign: Any = "text" if name == "reward" else "refuse"
    return tokenize.encode(examples, tokenizer, UNLIMITED, dataset.path, foreign=foreign, skip_invalid=True)[0]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    head = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    head.add_argument("--stage", default="align")
    stage = head.parse_known_args(arguments)[0].stage
    bases = (Options, STAGES[stage if stage in STAGES else "align"].module.Config)
    options_of: Any = dataclasses.make_dataclass("Config", (), bases=bases, frozen=True)
    options = parse(options_of, arguments, prog="python -m exo.inspect", description=__doc__)
    if options.stage != stage:
        print("error: --stage: expected on the command line, not in --config", file=sys.stderr)
        return 2
    return run_command(run, dataclasses.replace(options, nproc=1))


if __name__ == "__main__":
    prepare_process(__name__)
    raise SystemExit(main())
