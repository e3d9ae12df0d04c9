"""Build the prompt of a row from its columns: question, system prompt, history and tools.

A question with a system prompt or a history becomes a `Chat`, because only a chat template can join them. An `input` or
a `context` follows its instruction after a line break.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from exo.data.errors import Malformed, Row, array, kind, string
from exo.data.formats.messages import EMPTY, Chat, Message, decoded, is_chat, parse_messages
from exo.data.formats.transcripts import as_chat, is_transcript

BESIDE = ("system", "history", "tools")  # columns that are put before a question
_HELPSTEER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def parse_prompt(value: Any) -> str:
    """Return the prompt in a column: a text, or messages as a Chat."""
    if isinstance(value, Chat):
        chat = value
    elif is_chat(value):
        chat = Chat(parse_messages("prompt", value))
    else:
        return string("prompt", value)
    if chat.messages[-1].role == "assistant":
        raise Malformed("the prompt ends with a message of the assistant, which leaves nothing to answer")
    return chat


def append_input(prompt: Any, name: str, text: Any) -> Any:
    """Return an instruction followed by its input, which may be empty."""
    if text in EMPTY:
        return prompt
    if not isinstance(prompt, str):
        raise Malformed(f"{name} beside a prompt of messages; put it into the messages")
    text = string(name, text)
    return f"{prompt}\n{text}" if prompt.strip() else text


def add_context(prompt: str, row: Row, *, exclude: Sequence[str], is_turn: bool) -> str:
    """Return the prompt with the system prompt, the history and the tools of its row, without `exclude`d columns.

    If `is_turn`, a text is a user's turn. A transcript becomes its turns in any case.
    """
    system, history, tools = (None if name in exclude else row.get(name) for name in BESIDE)
    if system in EMPTY and history in EMPTY and tools in EMPTY:
        return prompt
    context = _history(history)
    if isinstance(system, str) and system.strip():
        context = [Message("system", system), *context]
    elif system not in EMPTY and not isinstance(system, str):
        raise Malformed(f"system must be a string, not {kind(system)}")
    schemas = _tools(tools)
    if not context and not schemas:
        return prompt
    if not isinstance(prompt, Chat) and not is_turn and not is_transcript(prompt):
        raise Malformed("a system prompt, a history or tools beside a text that is no user's turn; write messages")
    chat = as_chat(prompt)
    turns = chat.messages
    if context and context[0].role == "system" and turns[0].role in ("system", "developer"):
        if str(context[0].content).strip() != str(turns[0].content).strip():
            raise Malformed("the system column and the messages have different system prompts")
        context = context[1:]
    return Chat([*context, *turns], schemas or chat.tools)


def _history(value: Any) -> Sequence[Message]:
    value = decoded("history", value)
    if value in EMPTY:
        return []
    if is_chat(value):
        return parse_messages("history", value)
    pairs = array("history", value)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Malformed("history must be messages, or pairs of a question and its answer")
    return [
        Message(role, string(f"history[{i}][{j}]", pair[j]))
        for i, pair in enumerate(pairs)
        for j, role in enumerate(("user", "assistant"))
    ]


def _tools(value: Any) -> list[Any]:
    """Return the JSON schemas of a row's tools, a list or its JSON."""
    if isinstance(value, str) and value.strip():
        with suppress(ValueError, RecursionError):  # refused below
            value = json.loads(value)
    if value in EMPTY or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Malformed("tools must be an array of schemas, or its JSON")
    return value


def parse_speakers(prompt: Any) -> Any:
    """Return a prompt of Nectar or HelpSteer, which marks the speakers, as a Chat, or as a text if it has one turn."""
    if not isinstance(prompt, str) or isinstance(prompt, Chat):
        return prompt
    if "<extra_id_1>" in prompt:
        first, *pieces = _HELPSTEER.split(prompt)
        turns = [("User", first), *zip(pieces[::2], pieces[1::2], strict=True)]
        chat = Chat(Message("assistant" if role == "Assistant" else "user", text) for role, text in turns)
    elif is_transcript(prompt):
        chat = as_chat(prompt)
    elif prompt.startswith("\n\nHuman:"):
        chat = as_chat(f"{prompt}\n\nAssistant:")
    else:
        return prompt
    if chat.messages[-1].role == "assistant":
        raise Malformed("the prompt ends with a turn of the assistant, which leaves nothing to answer")
    return chat.messages[0].content if len(chat.messages) == 1 else chat
