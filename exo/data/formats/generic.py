"""Row formats of no particular data set: preferences, scored completions, conversations, texts, prompts.

A `RowFormat` is a name, the columns it needs, and a function from a row to a `ParsedRow`. Formats of public data sets
are in public_datasets.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from exo.data.errors import Malformed, Row, array, names, number, string
from exo.data.formats import split_prompt as split
from exo.data.formats.columns import CHAT_NAMES
from exo.data.formats.messages import Chat, Message, answer_of, decoded, is_chat, parse_messages
from exo.data.formats.parsed_row import ParsedRow, parse_tokens
from exo.data.formats.prompts import parse_prompt

Purpose = Literal["comparisons", "samples", "texts", "prompts", "labels"]
COMPARED: tuple[Purpose, ...] = ("comparisons", "texts", "prompts")  # of formats with several completions to compare


class RowFormat(NamedTuple):
    name: str
    keys: tuple[str, ...]  # the columns it needs, by the names of ALIASES
    parse: Callable[[Row], ParsedRow]
    fits: Callable[[Row], bool] = lambda row: True  # for formats of the same columns
    purposes: tuple[Purpose, ...] = COMPARED
    refused: Mapping[str, str] = {}  # purposes that the rows do not serve, with the error
    parse_opening: Callable[[Row], ParsedRow] | None = None  # used instead of `parse` to read prompts
    is_turn: bool = True  # a prompt that is a text is a user's turn, which a system prompt may precede
    is_chat: bool = False  # prompts that are texts are meant for the chat template
    has_ref_logps: bool = False  # reference log-probs in the row are of these completions
    unused: tuple[str, ...] = ()  # columns of the data set that are safe to leave unread
    has_prompt: bool = True  # a column holds the prompt
    columns_hint: str = ""  # value of --columns that reads the column {} as the prompt, if the format has none

    def __str__(self) -> str:
        return f"{self.name} ({'/'.join(self.keys)})"

    def with_columns(self, fields: Mapping[str, str]) -> "RowFormat":
        """Return the format with the names of the data; a question or an instruction is meant for the template."""
        keys = tuple(fields.get(key, key) for key in self.keys)
        if keys == self.keys:
            return self
        return self._replace(keys=keys, is_chat=self.is_chat or (self.is_turn and fields.get("prompt") in CHAT_NAMES))


def row_format(
    name: str,
    keys: str,
    parse: Callable[[Row], ParsedRow],
    fits: Callable[[Row], bool] = lambda row: True,
    *,
    unused: str = "",
    **fields: Any,
) -> RowFormat:
    """Return a format; `keys` and `unused` are columns separated by blanks."""
    return RowFormat(name, tuple(keys.split()), parse, fits, unused=tuple(unused.split()), **fields)


def answered(prompt: Any, answers: Mapping[str, Any]) -> ParsedRow:
    """Return a prompt with its answers, texts or messages. Beside a message, a text prompt becomes a user's turn."""
    prompt = parse_prompt(prompt)
    texts = []
    later_turns = False
    for name, value in answers.items():
        if type(value) is not str or value[:1] == "[":
            value = decoded(name, value)
        if not is_chat(value):
            texts.append(string(name, value))
            continue
        first, *later = parse_messages(name, value)
        if first.role != "assistant":
            raise Malformed(f"{name} must begin with a message of the assistant")
        texts.append(answer_of(name, first))
        later_turns = later_turns or bool(later)
        prompt = prompt if isinstance(prompt, Chat) else Chat([Message("user", prompt)])
    return ParsedRow(prompt, tuple(texts), later_turns=later_turns)


def listed(prompt: Any, key: str, row: Row, text: str, score: str, sign: int = 1) -> ParsedRow:
    """Return a prompt with a list of objects, each a completion with its score."""
    items = array(key, row[key])
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not {text, score} <= item.keys():
            raise Malformed(f"{key}[{i}] must be an object with {names([text, score])}")
    parsed = answered(prompt, {f"{key}[{i}].{text}": item[text] for i, item in enumerate(items)})
    # + 0.0, because minus the rank 0 is -0.0
    rewards = tuple(sign * number(f"{key}[{i}].{score}", item[score]) + 0.0 for i, item in enumerate(items))
    return parsed._replace(rewards=rewards)


def items_have(key: str, *item_keys: str) -> Callable[[Row], bool]:
    """Return a predicate: the column is a list of objects with these keys."""

    def fits(row: Row) -> bool:
        items = row[key]
        return isinstance(items, list) and any(isinstance(item, dict) and item.keys() >= {*item_keys} for item in items)

    return fits


_is_rated, _is_ranked = items_have("completions", "response"), items_have("completions", "completion", "rank")


def _is_unscored(row: Row) -> bool:
    return not (_is_rated(row) or _is_ranked(row))


def _preference(row: Row) -> ParsedRow:
    if split.is_complete(row["chosen"]) and split.is_complete(row["rejected"]):
        return split.check_prompt(row["prompt"], split.chats(row))
    return answered(row["prompt"], {key: row[key] for key in ("chosen", "rejected")})


def _sharegpt(row: Row) -> ParsedRow:
    prompt = Chat(parse_messages("conversations", row["conversations"]))
    return answered(prompt, {key: row[key] for key in ("chosen", "rejected")})


def _samples(row: Row) -> ParsedRow:
    completions = array("completions", row["completions"])
    parsed = answered(row["prompt"], {f"completions[{i}]": value for i, value in enumerate(completions)})
    return parsed._replace(tokens=parse_tokens(row, len(completions)))


def _scored(row: Row) -> ParsedRow:
    completions, rewards = (array(key, row[key]) for key in ("completions", "rewards"))
    if len(completions) != len(rewards):
        raise Malformed(f"{len(completions)} completions but {len(rewards)} rewards")
    return _samples(row)._replace(rewards=tuple(number(f"rewards[{i}]", value) for i, value in enumerate(rewards)))


def _answer(key: str, row: Row) -> ParsedRow:
    if is_chat(row[key]) and not any(message.learned for message in parse_messages(key, row[key])):
        return ParsedRow(skip="no message of the assistant with a weight")
    if split.is_complete(row[key]):
        return split.check_prompt(row["prompt"], split.last_turn(key, row))
    return answered(row["prompt"], {key: row[key]})


def _text(row: Row) -> ParsedRow:
    return ParsedRow(completions=(string("text", row["text"]),))


def _labelled(row: Row) -> ParsedRow:
    label = row["label"]
    if type(label) is not int or not 0 <= label <= 1:
        raise Malformed("label must be 0 or 1")
    return _text(row)._replace(label=label)


def _ranked(row: Row) -> ParsedRow:
    return listed(row["prompt"], "completions", row, "completion", "rank", sign=-1)  # rank 0 or 1 is the best


def _conversations(key: str) -> RowFormat:
    return row_format(
        "conversations",
        key,
        partial(split.last_turn, key),
        parse_opening=partial(split.opening, key),
        purposes=_LEARNED,
        unused="topic avatarUrl",
        has_prompt=False,
    )


def parse_ref_logps(parsed: ParsedRow, row: Row) -> ParsedRow:
    """Return the content with the row's log-probs of a reference model, one per completion."""
    pair: dict[str, Any] = {key: row[key] for key in ("ref_chosen_logps", "ref_rejected_logps") if key in row}
    if "ref_logps" not in row and not pair:
        return parsed
    if "ref_logps" in row and pair:
        raise Malformed("log-probs of a reference twice, as ref_logps and ref_chosen_logps; keep one")
    logps = pair or {f"ref_logps[{i}]": value for i, value in enumerate(array("ref_logps", row["ref_logps"]))}
    if len(logps) != len(parsed.completions):
        raise Malformed(f"{len(parsed.completions)} completions but {len(logps)} log-probs of the reference")
    if parsed.later_turns:
        raise Malformed("log-probs of a reference beside answers of several turns, of which the first is used")
    values = tuple(number(name, value) for name, value in logps.items())
    if positive := [name for name, value in zip(logps, values, strict=True) if value > 0]:
        raise Malformed(f"{positive[0]} must be a log-prob, at most 0")
    return parsed._replace(ref_logps=values)


_LEARNED, _ALL_SAMPLES = ("texts", "prompts"), (*COMPARED, "samples")
_PLAIN: dict[str, Any] = {"is_turn": False, "has_prompt": False}
_UNSCORED = {
    "comparisons": "samples without rewards; python -m exo.score makes them",
    "texts": "several completions a row, and no rewards that tell which to learn; exo.score makes them",
}
_UNPAIRED = (
    "completions labelled good or bad one by one need a loss such as --loss kto, which does not exist yet; sft learns "
    "the good ones with --columns keep=label"
)
FORMATS = (
    row_format("prompts", "prompt", lambda row: ParsedRow(parse_prompt(row["prompt"])), purposes=("prompts",)),
    row_format("texts", "prompt completion", partial(_answer, "completion"), purposes=_LEARNED),
    row_format("texts", "prompt chosen", partial(_answer, "chosen"), purposes=_LEARNED),
    row_format(
        "samples",
        "prompt completions",
        _samples,
        _is_unscored,
        purposes=("prompts", "samples"),
        refused=_UNSCORED,
        has_ref_logps=True,
    ),
    row_format("preferences", "prompt chosen rejected", _preference, has_ref_logps=True),
    row_format(
        "completions with rewards", "prompt completions rewards", _scored, purposes=_ALL_SAMPLES, has_ref_logps=True
    ),
    row_format("ShareGPT preferences", "conversations chosen rejected", _sharegpt, has_ref_logps=True),
    row_format("Anthropic HH dialogues", "chosen rejected", split.transcripts, split.are_transcripts, **_PLAIN),
    row_format(
        "pairs of conversations", "chosen rejected", split.chats, split.are_chats, has_ref_logps=True, has_prompt=False
    ),
    row_format(
        "texts with an implicit prompt",
        "chosen rejected",
        split.common_prefix,
        split.are_plain,
        columns_hint="prompt={}",
        **_PLAIN,
    ),
    row_format(
        "UltraFeedback completions with scores",
        "prompt completions",
        lambda row: listed(row["prompt"], "completions", row, "response", "overall_score"),
        _is_rated,
        is_chat=True,
        has_ref_logps=True,
        unused="models correct_answers incorrect_answers",
    ),
    row_format("completions with ranks", "prompt completions", _ranked, _is_ranked, is_chat=True, has_ref_logps=True),
    _conversations("messages"),
    _conversations("conversations"),
    row_format(
        "conversations",
        "prompt messages",
        lambda row: split.check_prompt(row["prompt"], split.last_turn("messages", row)),
        parse_opening=lambda row: split.check_prompt(row["prompt"], split.opening("messages", row)),
        purposes=_LEARNED,
    ),
    row_format(
        "texts without a prompt", "text", _text, purposes=("texts",), columns_hint="prompt={},completion=text", **_PLAIN
    ),
    row_format("labelled texts", "text label", _labelled, purposes=("labels",), **_PLAIN),
    row_format(
        "completions with a label each",
        "prompt completion label",
        _text,
        purposes=(),
        refused=dict.fromkeys(("comparisons", "texts"), _UNPAIRED),
    ),
)
