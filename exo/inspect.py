"""Show what a stage would train on, before it trains: format, examples, lengths, what is cut, ties, duplicates, leaks.

python -m exo.inspect --data FILE --model DIR_OR_NAME [--stage sft|reward|sample]. It takes every option of the stage,
with the same defaults: replace exo.align in a command by exo.inspect. Exits with 0 if the stage would start, and with 2
and the stage's error if it would not. It reads the tokenizer and config.json of the model but no weights, and it writes
nothing.
"""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exo import artifacts, chat, config, console, data_report, dry_run, encoding, examples, templates
from exo.config import NOT_NEGATIVE, option
from exo.data import Chat, DataError, Dataset
from exo.encoding import TokenGroup
from exo.examples import Color


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
    except (ValueError, artifacts.RunError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        console.say(f"\n{work} would not start: {message}")
        raise ValueError(message) from None
    console.say(f"\n{work} would start: {sentence}")


def _report(options: Any) -> str:
    """Print all that is known before training; return what would be trained, or raise the stage's error."""
    dataset, held_out = dry_run.read(options.stage, options)
    console.headline("Data")
    for part in filter(None, (dataset, held_out)):
        console.say(part.summary())
    model, tokenizer = dry_run.load(options.stage, options, dataset.texts)
    rendered, other = dry_run.render(options.stage, options, tokenizer, dataset, held_out)
    _say([_template(options.chat_template, rendered, tokenizer)])
    plan = dry_run.plan(options.stage, options, rendered, other, tokenizer, model)
    uncut = dry_run.uncut(options.stage, rendered, tokenizer)
    console.headline("Examples")
    rows = plan.rows or [encoding.factored(row) if options.stage == "align" else row for row in uncut]
    scored = dry_run.STAGES[options.stage].scored
    examples.show(rows, tokenizer, scored, count=options.examples, color=options.color)
    console.headline("Lengths in tokens, before the limits")
    _say(_length_lines(options, uncut) or ["no row can be tokenized"])
    if plan.counts:
        console.say("what is cut, dropped or noted:")
    elif not plan.error:
        console.say("the limits cut nothing")
    console.counts(plan.counts)
    console.headline("Rows")
    lines = data_report.comparison_lines(dataset.groups, uncut) + data_report.repeat_lines(dataset.groups)
    chats = [group for group in rendered.groups if isinstance(group.prompt, Chat)]
    if spelled := chats and data_report.spelling(chats, chat.Renderer(tokenizer).control_tokens):
        lines.append(f"control tokens in chat messages, which are read as plain text: {spelled:,} rows")
    _say(lines + (data_report.leak_lines(dataset.groups, held_out.groups) if held_out else []))
    if plan.error:
        raise plan.error
    return plan.sentence


def _say(lines: Sequence[str]) -> None:
    """Print lines, wrapped on a terminal alone: other programs may look for them."""
    for line in lines:
        console.say(textwrap.fill(line, console.width(), subsequent_indent="  ") if sys.stdout.isatty() else line)


def _template(option: str, dataset: Dataset, tokenizer: Any) -> str:
    if not any(isinstance(group.prompt, Chat) for group in dataset.groups):
        return f"chat template: not used, texts are read as they are; a completion ends with {tokenizer.eos_token!r}"
    if not chat.has_template(tokenizer):
        return "chat template: none, and the data have chat messages"
    name = "the tokenizer's" if option in templates.MODES else option
    try:
        end = chat.stop_id(tokenizer)
    except DataError as error:
        return f"chat template: {name}; {error}"
    if end is None:
        return f"chat template: {name}; it ends no turn with a token, so a completion ends with {tokenizer.eos_token!r}"
    return f"chat template: {name}; a turn ends with {tokenizer.convert_ids_to_tokens(end)!r}"


def _length_lines(options: Any, rows: Sequence[TokenGroup]) -> list[str]:
    """Describe the lengths that the stage has limits for."""
    completions = [len(ids) for row in rows for ids in row.completions]
    lengths = {
        "max_prompt_length": ("prompt", [len(row.prompt) for row in rows]),
        "max_completion_length": ("completion, its end included", completions),
        "max_length": ("prompt and longest completion", [examples.length(row) for row in rows if row.completions]),
    }
    if getattr(options, "labels", False):  # a text is a prompt with an empty completion
        lengths = {"max_length": ("text, its end included", lengths["max_length"][1])}
    block = "█" if console.can_print("█") else "#"
    return [
        line
        for name, (what, values) in lengths.items()
        if values
        for line in data_report.length_lines(what, values, name, getattr(options, name), block)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    head = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    head.add_argument("--stage", default="align")
    stage = head.parse_known_args(arguments)[0].stage
    bases = (Options, dry_run.STAGES[stage if stage in dry_run.STAGES else "align"].module.Config)
    options_of: Any = dataclasses.make_dataclass("Config", (), bases=bases, frozen=True)
    options = config.parse(options_of, arguments, prog="python -m exo.inspect", description=__doc__)
    if options.stage != stage:
        print("error: --stage: expected on the command line, not in --config", file=sys.stderr)
        return 2
    return artifacts.guarded(run, dataclasses.replace(options, nproc=1))


if __name__ == "__main__":
    raise SystemExit(main())
