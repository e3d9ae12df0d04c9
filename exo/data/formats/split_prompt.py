"""Whole conversations and texts, parted into a prompt and its answers.

Two that are compared part at their first difference, which must be an answer; one that is learned from, before the
assistant's last turn. Turns after the answer are dropped.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from exo.data.errors import Malformed, string
from exo.data.formats.messages import Chat, answer_of, conversation, is_chat, last_answer
from exo.data.formats.reading import Reading
from exo.data.formats.transcripts import split_turns

Row = dict[str, Any]


def is_complete(value: Any) -> bool:
    """Return whether a column holds a conversation from its beginning, and not an answer alone."""
    if not (isinstance(value, list) and is_chat(value) and isinstance(value[0], dict)):
        return False
    return value[0].get("role", value[0].get("from")) not in ("assistant", "gpt", "chatgpt", "function_call")


def with_prompt(prompt: Any, reading: Reading) -> Reading:
    """Return the reading of a whole conversation, after checking that it holds the prompt of the row."""
    if isinstance(reading.prompt, Chat):
        turns = {(message.content or "").strip() for message in reading.prompt.messages}
        asked = [m.content for m in conversation("prompt", prompt)] if is_chat(prompt) else [string("prompt", prompt)]
        if not {(text or "").strip() for text in asked} <= turns:
            raise Malformed("the prompt is not part of the conversation before the answer")
    return reading


def conversations(row: Row) -> Reading:
    """Return where two conversations part: at their first message that differs in any key."""
    chosen, rejected = ([(m.role, m) for m in conversation(key, row[key])] for key in ("chosen", "rejected"))
    shared, good, bad, later, skip = _part(chosen, rejected, speaker="assistant")
    if skip or not shared:
        return Reading(skip=skip or "nothing before the answer")
    answers = (answer_of("chosen", good), answer_of("rejected", bad))
    return Reading(Chat(message for _, message in shared), answers, later_turns=later)


def last_turn(key: str, row: Row) -> Reading:
    """Return a conversation to learn from: the assistant's last turn of weight 1, given everything before it."""
    messages = conversation(key, row[key])
    end = last_answer(messages)
    if not end:
        weightless = any(m.role == "assistant" and not m.learned for m in messages)
        reason = "no message of the assistant" + " with a weight" * weightless
        return Reading(skip=reason if end is None else "nothing before the answer")
    return Reading(Chat(messages[:end]), (answer_of(key, messages[end]),), later_turns=end + 1 < len(messages))


def opening(key: str, row: Row) -> Reading:
    """Return a conversation to continue: up to its last message, without it if that is the assistant's already."""
    messages = conversation(key, row[key])
    asked = messages[:-1] if messages[-1].role == "assistant" else messages
    if not asked or asked[-1].role == "assistant":
        return Reading(skip="nothing to answer")
    return Reading(Chat(asked))


def dialogues(row: Row) -> Reading:
    """Split two whole dialogues where they part: shared turns are the prompt, then the answers.

    Every marker opens a turn, even one that an answer spells out: nothing tells that from a change
    of speaker, and no model should learn to write markers.
    """
    shared, good, bad, later, skip = _part(_turns("chosen", row), _turns("rejected", row), speaker="Assistant")
    if skip:
        return Reading(skip=skip)
    prompt = "".join(f"\n\n{role}:{text}" if role else text for role, text in shared)
    return Reading(f"{prompt}\n\nAssistant:", (good, bad), later_turns=later)


class _Split(NamedTuple):
    shared: Sequence[tuple[str, Any]] = ()
    good: Any = ""
    bad: Any = ""
    later: bool = False
    skip: str = ""


def _part(chosen: Sequence[tuple[str, Any]], rejected: Sequence[tuple[str, Any]], speaker: str) -> _Split:
    """Return two conversations of (role, text or message) where they part, if they part in the speaker's turn."""
    parted = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    at = next(parted, None)
    if at is None:
        same = len(chosen) == len(rejected)
        return _Split(skip="identical dialogues" if same else "one dialogue continues the other")
    (role, good), (other_role, bad) = chosen[at], rejected[at]
    if not role == other_role == speaker:
        return _Split(skip="first difference not in an assistant turn")
    return _Split(chosen[:at], good, bad, max(len(chosen), len(rejected)) > at + 1)


def _turns(key: str, row: Row) -> list[tuple[str, str]]:
    """(role, text) of each turn; text before the first marker, a system prompt say, has role ""."""
    before, turns = split_turns(string(key, row[key]))
    if not any(role == "Assistant" for role, _ in turns):
        needed = "the row must hold two whole Anthropic HH dialogues, two plain texts or two lists of chat messages"
        raise Malformed(f"{key} has no turn that starts with \\n\\nAssistant:; {needed}")
    return [("", before)] * bool(before) + turns


def implicit(row: Row) -> Reading:
    """Two plain texts: what they begin with alike is the prompt, cut back to where no word is cut in two.

    A blank there goes to the completions, as tokenizers have it.
    """
    chosen, rejected = string("chosen", row["chosen"]), string("rejected", row["rejected"])
    if chosen == rejected:
        return Reading(skip="identical completions")
    shorter = min(len(chosen), len(rejected))
    at = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while at and any(
        len(pair) == 2 and pair.isalnum() for pair in (chosen[at - 1 : at + 1], rejected[at - 1 : at + 1])
    ):
        at -= 1
    if at == shorter:
        return Reading(skip="one text continues the other")
    at -= chosen[:at].endswith(" ")
    return Reading(chosen[:at], (chosen[at:], rejected[at:]))


def is_implicit(row: Row) -> bool:
    texts = (row["chosen"], row["rejected"])
    return all(isinstance(text, str) and "\n\nAssistant:" not in text for text in texts)


def are_chats(row: Row) -> bool:
    return is_chat(row["chosen"]) and is_chat(row["rejected"])
