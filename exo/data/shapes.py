"""What a row says: its shape is told by its keys, and its texts, messages, rewards and tokens are taken out.

Every shape is one function from a row to a `Reading`, named in `SHAPES` under the purposes it serves; those that
have to be parted first are in parting.py. Left out: tools, system prompts in a column of their own, alpaca's input
column, scores that are not one number.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from exo.data.errors import Malformed, array, names, number, string
from exo.data.messages import Chat, Message, conversation, is_chat
from exo.data.parting import (
    are_chats,
    conversations,
    dialogues,
    implicit,
    is_implicit,
    is_whole,
    last_turn,
    opening,
    with_prompt,
)
from exo.data.reading import Reading, tokens_of

Purpose = Literal["comparisons", "samples", "texts", "prompts", "labels"]
Row = dict[str, Any]


class Shape(NamedTuple):
    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Reading]
    fits: Callable[[Row], bool] = lambda row: True  # where the keys do not tell

    def __str__(self) -> str:
        return f"{self.name} ({'/'.join(self.keys)})"


def match(row: Row, expected: Shape | None, known: tuple[Shape, ...]) -> Shape:
    """The shape that a row's keys tell; it must be that of the rows before. More keys are fine."""
    prompted = "prompt" in row
    fitting = [s for s in known if set(s.keys) <= row.keys() and prompted == ("prompt" in s.keys) and s.fits(row)]
    most = max((len(s.keys) for s in fitting), default=0)
    fitting = [s for s in fitting if len(s.keys) == most]
    if len(fitting) > 1:
        raise Malformed(f"keys of two shapes, {' and '.join('/'.join(s.keys) for s in fitting[:2])}; keep one")
    if fitting and expected in (None, fitting[0]):
        return fitting[0]
    if expected is None:
        if {"prompt", "completions"} <= row.keys() and "rewards" not in row:
            raise Malformed("samples without rewards; python -m exo.score makes them")
        shapes = ", ".join(map(str, known))
        raise Malformed(f"unknown shape, keys found: {names(row)}; shapes read: {shapes}")
    missing = [key for key in expected.keys if key not in row]
    what = f"missing {names(missing)}" if missing else "another shape"
    raise Malformed(f"{what}; the file began as {expected}")


# One prompt, and what was answered.


def _preference(row: Row) -> Reading:
    if is_whole(row["chosen"]) and is_whole(row["rejected"]):
        return with_prompt(row["prompt"], conversations(row))
    reading = _answered(row["prompt"], {key: row[key] for key in ("chosen", "rejected")})
    known: Row = {key: row[key] for key in ("ref_chosen_logps", "ref_rejected_logps") if key in row}
    return _with_reference(reading, known) if known else reading


def _sharegpt(row: Row) -> Reading:
    prompt = Chat(conversation("conversations", row["conversations"]))
    return _answered(prompt, {key: row[key] for key in ("chosen", "rejected")})


def _scored(row: Row) -> Reading:
    completions, rewards = row["completions"], row["rewards"]
    if not (isinstance(completions, list) and isinstance(rewards, list) and completions):
        raise Malformed("completions and rewards must be arrays, and not empty")
    if len(completions) != len(rewards):
        raise Malformed(f"{len(completions)} completions but {len(rewards)} rewards")
    reading = _samples(row)
    return reading._replace(rewards=tuple(number(f"rewards[{i}]", value) for i, value in enumerate(rewards)))


def _samples(row: Row) -> Reading:
    completions = array("completions", row["completions"])
    reading = _answered(row["prompt"], {f"completions[{i}]": value for i, value in enumerate(completions)})
    reading = reading._replace(tokens=tokens_of(row, len(completions)))
    if row.get("ref_logps") is None:
        return reading
    values = enumerate(array("ref_logps", row["ref_logps"]))
    return _with_reference(reading, {f"ref_logps[{i}]": value for i, value in values})


def _with_reference(reading: Reading, known: Mapping[str, Any]) -> Reading:
    """Log-probs of a reference model, one a completion."""
    if len(known) != len(reading.completions):
        raise Malformed(f"{len(reading.completions)} completions but {len(known)} log-probs of the reference")
    return reading._replace(ref_logps=tuple(number(name, value) for name, value in known.items()))


def _rated(row: Row) -> Reading:
    """UltraFeedback: each completion with a score of its own."""
    prompt = row["instruction"] if "instruction" in row else row["prompt"]
    return _listed(prompt, "completions", row, "response", "overall_score", sign=1)


def _ranked(row: Row) -> Reading:
    """Nectar: each answer with its rank, 1 the best; the reward is minus the rank."""
    return _listed(row["prompt"], "answers", row, "answer", "rank", sign=-1)


def _listed(prompt: Any, key: str, row: Row, text: str, score: str, sign: int) -> Reading:
    items = array(key, row[key])
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not {text, score} <= item.keys():
            raise Malformed(f"{key}[{i}] must be an object with {names([text, score])}")
    reading = _answered(prompt, {f"{key}[{i}].{text}": item[text] for i, item in enumerate(items)})
    rewards = tuple(sign * number(f"{key}[{i}].{score}", item[score]) for i, item in enumerate(items))
    return reading._replace(rewards=rewards)


def _answered(prompt: Any, answers: Mapping[str, Any]) -> Reading:
    """Texts or messages in any place. Where an answer is a message, a prompt that is a text is the user's."""
    asked = _prompt_of(prompt)
    texts = []
    later_turns = False
    for name, value in answers.items():
        if not is_chat(value):
            texts.append(string(name, value))
            continue
        first, *later = conversation(name, value)
        if first.role != "assistant":
            raise Malformed(f"{name} must begin with a message of the assistant")
        texts.append(first.content)
        later_turns = later_turns or bool(later)
        asked = asked if isinstance(asked, Chat) else Chat([Message("user", asked)])
    return Reading(asked, tuple(texts), later_turns=later_turns)


def _prompt_of(value: Any) -> str:
    chat = value if isinstance(value, Chat) else Chat(conversation("prompt", value)) if is_chat(value) else None
    if chat is None:
        return string("prompt", value)
    if chat.messages[-1].role == "assistant":
        raise Malformed("the prompt ends with a message of the assistant, which leaves nothing to answer")
    return chat


def _text(row: Row) -> Reading:
    key = "completion" if "completion" in row else "chosen"
    if is_whole(row[key]):
        return with_prompt(row["prompt"], last_turn(key, row))
    return _answered(row["prompt"], {key: row[key]})


def _prompt(row: Row) -> Reading:
    return Reading(_prompt_of(row["prompt"]))


def _labelled(row: Row) -> Reading:
    label = row["label"]
    if type(label) is not int or not 0 <= label <= 1:
        raise Malformed("label must be 0 or 1")
    return Reading(completions=(string("text", row["text"]),), label=label)


def _is_rated(row: Row) -> bool:
    items = row["completions"]
    return isinstance(items, list) and any(isinstance(item, dict) and "response" in item for item in items)


_PREFERENCES = Shape("preferences", ("prompt", "chosen", "rejected"), _preference)
_SCORED = Shape("completions with rewards", ("prompt", "completions", "rewards"), _scored)
_RATED = tuple(
    Shape("UltraFeedback completions with scores", (key, "completions"), _rated, _is_rated)
    for key in ("instruction", "prompt")
)
_RANKED = Shape("Nectar answers with ranks", ("prompt", "answers"), _ranked)
_PARTED = (
    Shape("ShareGPT preferences", ("conversations", "chosen", "rejected"), _sharegpt),
    Shape(
        "Anthropic HH dialogues",
        ("chosen", "rejected"),
        dialogues,
        lambda row: not is_implicit(row) and not are_chats(row),
    ),
    Shape("whole conversations", ("chosen", "rejected"), conversations, are_chats),
    Shape("texts with an implicit prompt", ("chosen", "rejected"), implicit, is_implicit),
)
_SAMPLES = Shape("samples", ("prompt", "completions"), _samples, lambda row: not _is_rated(row))
_TEXTS = (Shape("texts", ("prompt", "completion"), _text), Shape("texts", ("prompt", "chosen"), _text))


def _chats(convert: Callable[[str, Row], Reading]) -> tuple[Shape, ...]:
    keys = (("messages",), ("conversations",), ("prompt", "messages"))
    return tuple(Shape("conversations", found, partial(convert, found[-1])) for found in keys)


SHAPES: dict[Purpose, tuple[Shape, ...]] = {
    "comparisons": (_PREFERENCES, _SCORED, *_PARTED, *_RATED, _RANKED),
    "samples": (_SAMPLES, _SCORED),
    "texts": (*_TEXTS, _PREFERENCES, *_PARTED, *_chats(last_turn)),
    "prompts": (
        Shape("prompts", ("prompt",), _prompt),
        *_TEXTS,
        _PREFERENCES,
        _SAMPLES,
        _SCORED,
        *_PARTED,
        *_RATED,
        _RANKED,
        *_chats(opening),
    ),  # fmt: skip
    "labels": (Shape("labelled texts", ("text", "label"), _labelled),),
}
