"""What a row says: its columns tell its shape, and its texts, messages, rewards and tokens are taken out.

A shape is one entry: a name, the columns it needs, and a function from a row to a `Reading`. `SHAPES` names it under
the purposes that it serves. Shapes of particular public data sets are in public.py, what is split first in parting.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from exo.data.errors import Malformed, array, names, number, string
from exo.data.formats.columns import CHAT_NAMES
from exo.data.formats.messages import Chat, Message, answer_of, conversation, decoded, is_chat
from exo.data.formats.prompts import prompt_of
from exo.data.formats.reading import Reading, tokens_of
from exo.data.formats.split_prompt import (
    are_chats,
    conversations,
    dialogues,
    implicit,
    is_complete,
    is_implicit,
    last_turn,
    opening,
    with_prompt,
)

Purpose = Literal["comparisons", "samples", "texts", "prompts", "labels"]
Row = dict[str, Any]


class Shape(NamedTuple):
    name: str
    keys: tuple[str, ...]  # the columns it needs, by the names of ALIASES where those have one
    convert: Callable[[Row], Reading]
    fits: Callable[[Row], bool] = lambda row: True  # if the columns alone do not tell
    turn: bool = True  # a prompt that is a text is a user's turn, which a system prompt may precede
    chat: bool = False  # of a chat data set: prompts that are texts are meant for the chat template
    reference: bool = False  # log-probs of a reference are of these completions
    unused: tuple[str, ...] = ()  # columns that the data set has and nobody needs
    prompt_column: bool = True  # a column holds the prompt
    columns: str = ""  # what --columns says to read the column {} as the prompt, if the shape has none

    def __str__(self) -> str:
        return f"{self.name} ({'/'.join(self.keys)})"

    def named(self, fields: Mapping[str, str]) -> "Shape":
        """Return the same with the columns' names in the data; a question or an instruction is for the template."""
        keys = tuple(fields.get(key, key) for key in self.keys)
        if keys == self.keys:
            return self
        return self._replace(keys=keys, chat=self.chat or (self.turn and fields.get("prompt") in CHAT_NAMES))


# One prompt, and what was answered.


def _preference(row: Row) -> Reading:
    if is_complete(row["chosen"]) and is_complete(row["rejected"]):
        return with_prompt(row["prompt"], conversations(row))
    return answered(row["prompt"], {key: row[key] for key in ("chosen", "rejected")})


def _sharegpt(row: Row) -> Reading:
    prompt = Chat(conversation("conversations", row["conversations"]))
    return answered(prompt, {key: row[key] for key in ("chosen", "rejected")})


def _scored(row: Row) -> Reading:
    completions, rewards = (array(key, row[key]) for key in ("completions", "rewards"))
    if len(completions) != len(rewards):
        raise Malformed(f"{len(completions)} completions but {len(rewards)} rewards")
    return _samples(row)._replace(rewards=tuple(number(f"rewards[{i}]", value) for i, value in enumerate(rewards)))


def _samples(row: Row) -> Reading:
    completions = array("completions", row["completions"])
    reading = answered(row["prompt"], {f"completions[{i}]": value for i, value in enumerate(completions)})
    return reading._replace(tokens=tokens_of(row, len(completions)))


def referenced(reading: Reading, row: Row) -> Reading:
    """Return the reading with the log-probs of a reference model that the row gives, one a completion."""
    pair: dict[str, Any] = {key: row[key] for key in ("ref_chosen_logps", "ref_rejected_logps") if key in row}
    if "ref_logps" not in row and not pair:
        return reading
    if "ref_logps" in row and pair:
        raise Malformed("log-probs of a reference twice, as ref_logps and ref_chosen_logps; keep one")
    logps: dict[str, Any] = pair or {
        f"ref_logps[{i}]": value for i, value in enumerate(array("ref_logps", row["ref_logps"]))
    }
    if len(logps) != len(reading.completions):
        raise Malformed(f"{len(reading.completions)} completions but {len(logps)} log-probs of the reference")
    if reading.later_turns:
        raise Malformed("log-probs of a reference beside answers of several turns, of which the first is used")
    values = tuple(number(name, value) for name, value in logps.items())
    if positive := [name for name, value in zip(logps, values, strict=True) if value > 0]:
        raise Malformed(f"{positive[0]} must be a log-prob, at most 0")
    return reading._replace(ref_logps=values)


def _rated(row: Row) -> Reading:
    """UltraFeedback: each completion with a score of its own."""
    return listed(row["prompt"], "completions", row, "response", "overall_score")


def _ranked(row: Row) -> Reading:
    """Each completion with its rank, 1 or 0 the best; the reward is minus the rank."""
    return listed(row["prompt"], "completions", row, "completion", "rank", sign=-1)


def listed(prompt: Any, key: str, row: Row, text: str, score: str, sign: int = 1) -> Reading:
    """Return a prompt with the objects of a list, each a completion with its score."""
    items = array(key, row[key])
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not {text, score} <= item.keys():
            raise Malformed(f"{key}[{i}] must be an object with {names([text, score])}")
    reading = answered(prompt, {f"{key}[{i}].{text}": item[text] for i, item in enumerate(items)})
    # + 0.0, because minus the rank 0 is -0.0
    rewards = tuple(sign * number(f"{key}[{i}].{score}", item[score]) + 0.0 for i, item in enumerate(items))
    return reading._replace(rewards=rewards)


def answered(prompt: Any, answers: Mapping[str, Any]) -> Reading:
    """Return a prompt with its answers, texts or messages. If one is a message, a prompt that is a text is a user's."""
    asked = prompt_of(prompt)
    texts = []
    later_turns = False
    for name, value in answers.items():
        if type(value) is not str or value[:1] == "[":
            value = decoded(name, value)
        if not is_chat(value):
            texts.append(string(name, value))
            continue
        first, *later = conversation(name, value)
        if first.role != "assistant":
            raise Malformed(f"{name} must begin with a message of the assistant")
        texts.append(answer_of(name, first))
        later_turns = later_turns or bool(later)
        asked = asked if isinstance(asked, Chat) else Chat([Message("user", asked)])
    return Reading(asked, tuple(texts), later_turns=later_turns)


def _answer(key: str, row: Row) -> Reading:
    if is_chat(row[key]) and not any(message.learned for message in conversation(key, row[key])):
        return Reading(skip="no message of the assistant with a weight")
    if is_complete(row[key]):
        return with_prompt(row["prompt"], last_turn(key, row))
    return answered(row["prompt"], {key: row[key]})


def _prompt(row: Row) -> Reading:
    return Reading(prompt_of(row["prompt"]))


def _text(row: Row) -> Reading:
    return Reading(completions=(string("text", row["text"]),))


def _labelled(row: Row) -> Reading:
    label = row["label"]
    if type(label) is not int or not 0 <= label <= 1:
        raise Malformed("label must be 0 or 1")
    return _text(row)._replace(label=label)


def _with_prompt(convert: Callable[[str, Row], Reading], row: Row) -> Reading:
    return with_prompt(row["prompt"], convert("messages", row))


def _no_use(reason: str, row: Row) -> Reading:
    raise Malformed(reason)


def items_have(key: str, *wanted: str) -> Callable[[Row], bool]:
    """Return a test of whether a column is a list of objects with these keys."""

    def fits(row: Row) -> bool:
        items = row[key]
        return isinstance(items, list) and any(isinstance(item, dict) and item.keys() >= {*wanted} for item in items)

    return fits


_is_rated, _is_ranked = items_have("completions", "response"), items_have("completions", "completion", "rank")
PREFERENCES = Shape("preferences", ("prompt", "chosen", "rejected"), _preference, reference=True)
SCORED = Shape("completions with rewards", ("prompt", "completions", "rewards"), _scored, reference=True)
RATED = Shape(
    "UltraFeedback completions with scores", ("prompt", "completions"), _rated, _is_rated, chat=True, reference=True,
    unused=("models", "correct_answers", "incorrect_answers"),
)  # fmt: skip
RANKED = Shape("completions with ranks", ("prompt", "completions"), _ranked, _is_ranked, chat=True, reference=True)
PARTED = (
    Shape("ShareGPT preferences", ("conversations", "chosen", "rejected"), _sharegpt, reference=True),
    Shape(
        "Anthropic HH dialogues", ("chosen", "rejected"), dialogues,
        lambda row: not is_implicit(row) and not are_chats(row), turn=False, prompt_column=False,
    ),
    Shape(
        "whole conversations", ("chosen", "rejected"), conversations, are_chats, reference=True, prompt_column=False,
    ),
    Shape(
        "texts with an implicit prompt", ("chosen", "rejected"), implicit, is_implicit, turn=False, prompt_column=False,
        columns="prompt={}",
    ),
)  # fmt: skip
SAMPLES = Shape(
    "samples", ("prompt", "completions"), _samples, lambda row: not (_is_rated(row) or _is_ranked(row)), reference=True
)
ANSWERS = tuple(Shape("texts", ("prompt", key), partial(_answer, key)) for key in ("completion", "chosen"))
TEXT = Shape(
    "texts without a prompt", ("text",), _text, turn=False, prompt_column=False, columns="prompt={},completion=text"
)
LABELLED = Shape("labelled texts", ("text", "label"), _labelled, turn=False, prompt_column=False)
WITHOUT_REWARDS = SAMPLES._replace(convert=partial(_no_use, "samples without rewards; python -m exo.score makes them"))
UNPAIRED = Shape("completions with a label each", ("prompt", "completion", "label"), partial(
    _no_use, "completions labelled good or bad one by one need a loss such as --loss kto, which does not exist yet; "
    "sft learns the good ones with --columns keep=label"
))  # fmt: skip
UNCHOSEN = SAMPLES._replace(
    convert=partial(_no_use, "several completions a row, and no rewards that tell which to learn; exo.score makes them")
)


def chats(convert: Callable[[str, Row], Reading]) -> tuple[Shape, ...]:
    return (
        *(
            Shape("conversations", (key,), partial(convert, key), unused=("topic", "avatarUrl"), prompt_column=False)
            for key in ("messages", "conversations")
        ),
        Shape("conversations", ("prompt", "messages"), partial(_with_prompt, convert)),
    )


LAST_TURNS, OPENINGS = chats(last_turn), chats(opening)
PROMPTS = Shape("prompts", ("prompt",), _prompt)
