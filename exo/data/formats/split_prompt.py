"""Split conversations and texts into a prompt and its answers.

A pair is split at its first difference, which must be an answer, and a single conversation before the assistant's last
turn. Turns after the answer are dropped.
"""

from collections.abc import Sequence
from typing import Any

from exo.data.errors import Malformed, Row, string
from exo.data.formats.messages import Chat, answer_of, is_chat, last_answer, parse_messages
from exo.data.formats.parsed_row import ParsedRow
from exo.data.formats.transcripts import split_turns


def is_complete(value: Any) -> bool:
    """Return whether a value is a conversation from its beginning, not only an answer."""
    if not (isinstance(value, list) and is_chat(value) and isinstance(value[0], dict)):
        return False
    return value[0].get("role", value[0].get("from")) not in ("assistant", "gpt", "chatgpt", "function_call")


def are_chats(row: Row) -> bool:
    return is_chat(row["chosen"]) and is_chat(row["rejected"])


def are_plain(row: Row) -> bool:
    """Return whether both texts of a pair are no Anthropic HH transcripts."""
    return all(isinstance(text, str) and "\n\nAssistant:" not in text for text in (row["chosen"], row["rejected"]))


def are_transcripts(row: Row) -> bool:
    return not are_plain(row) and not are_chats(row)


def check_prompt(prompt: Any, parsed: ParsedRow) -> ParsedRow:
    """Return the content of a conversation; Malformed if it does not hold the prompt of the row."""
    if isinstance(parsed.prompt, Chat):
        turns = {(message.content or "").strip() for message in parsed.prompt.messages}
        texts = [m.content for m in parse_messages("prompt", prompt)] if is_chat(prompt) else [string("prompt", prompt)]
        if not {(text or "").strip() for text in texts} <= turns:
            raise Malformed("the prompt is not part of the conversation before the answer")
    return parsed


def chats(row: Row) -> ParsedRow:
    """Split a pair of conversations at the first message that differs in any key."""
    chosen, rejected = ([(m.role, m) for m in parse_messages(key, row[key])] for key in ("chosen", "rejected"))
    at = _first_difference(chosen, rejected, speaker="assistant")
    if not at or isinstance(at, str):
        return ParsedRow(skip=at or "nothing before the answer")
    answers = (answer_of("chosen", chosen[at][1]), answer_of("rejected", rejected[at][1]))
    later_turns = max(len(chosen), len(rejected)) > at + 1
    return ParsedRow(Chat(message for _, message in chosen[:at]), answers, later_turns=later_turns)


def last_turn(key: str, row: Row) -> ParsedRow:
    """Split a conversation before the assistant's last turn of weight 1."""
    messages = parse_messages(key, row[key])
    end = last_answer(messages)
    if not end:
        weightless = any(m.role == "assistant" and not m.learned for m in messages)
        reason = "no message of the assistant" + " with a weight" * weightless
        return ParsedRow(skip=reason if end is None else "nothing before the answer")
    return ParsedRow(Chat(messages[:end]), (answer_of(key, messages[end]),), later_turns=end + 1 < len(messages))


def opening(key: str, row: Row) -> ParsedRow:
    """Return a conversation to continue, without a last message of the assistant."""
    messages = parse_messages(key, row[key])
    turns = messages[:-1] if messages[-1].role == "assistant" else messages
    if not turns or turns[-1].role == "assistant":
        return ParsedRow(skip="nothing to answer")
    return ParsedRow(Chat(turns))


def transcripts(row: Row) -> ParsedRow:
    """Split two Anthropic HH dialogues at the first turn that differs.

    Every marker starts a turn, even inside an answer, because no model should learn to write markers.
    """
    chosen, rejected = _turns("chosen", row), _turns("rejected", row)
    at = _first_difference(chosen, rejected, speaker="Assistant")
    if isinstance(at, str):
        return ParsedRow(skip=at)
    prompt = "".join(f"\n\n{role}:{text}" if role else text for role, text in chosen[:at])
    later_turns = max(len(chosen), len(rejected)) > at + 1
    return ParsedRow(f"{prompt}\n\nAssistant:", (chosen[at][1], rejected[at][1]), later_turns=later_turns)


def _turns(key: str, row: Row) -> list[tuple[str, str]]:
    """Return (role, text) of each turn; text before the first marker (a system prompt) has role ""."""
    preamble, turns = split_turns(string(key, row[key]))
    if not any(role == "Assistant" for role, _ in turns):
        expected = "the row must hold two complete Anthropic HH dialogues, two plain texts or two lists of messages"
        raise Malformed(f"{key} has no turn that starts with \\n\\nAssistant:; {expected}")
    return [("", preamble)] * bool(preamble) + turns


def _first_difference(
    chosen: Sequence[tuple[str, Any]],  # role, and text or message
    rejected: Sequence[tuple[str, Any]],
    speaker: str,
) -> int | str:
    """Return the index of the first turn that differs if the speaker's, else the reason to skip the row."""
    at = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if at is None:
        return "identical dialogues" if len(chosen) == len(rejected) else "one dialogue continues the other"
    is_answer = chosen[at][0] == rejected[at][0] == speaker
    return at if is_answer else "first difference not in an assistant turn"


def common_prefix(row: Row) -> ParsedRow:
    """Split two plain texts after their common prefix, at the start of a word.

    The blank before the word goes to the completions, as in tokens.
    """
    chosen, rejected = string("chosen", row["chosen"]), string("rejected", row["rejected"])
    if chosen == rejected:
        return ParsedRow(skip="identical completions")
    shorter = min(len(chosen), len(rejected))
    at = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while at and any(
        len(pair) == 2 and pair.isalnum() for pair in (chosen[at - 1 : at + 1], rejected[at - 1 : at + 1])
    ):
        at -= 1
    if at == shorter:
        return ParsedRow(skip="one text continues the other")
    at -= chosen[:at].endswith(" ")
    return ParsedRow(chosen[:at], (chosen[at:], rejected[at:]))
