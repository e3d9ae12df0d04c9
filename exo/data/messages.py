"""Chat messages: {"role", "content"}, or ShareGPT's {"from", "value"}, checked and made one thing.

A prompt of messages is a `Chat`. Only exo.chat turns it into what a model reads. Left out: tools and their calls, and
contents that are not text.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from exo.data.errors import Malformed, kind, names, string

_ROLES = ("system", "developer", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant"}


class Message(NamedTuple):
    role: str
    content: str


class Chat(str):
    """A prompt of chat messages. As a string it is their transcript, which is for people and never for a model.

    So whatever shows, sorts or compares prompts needs no second way; packing renders the messages, and write_jsonl
    writes them.
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Iterable[Message]) -> "Chat":
        kept = tuple(messages)
        chat = super().__new__(cls, "\n\n".join(f"{role}: {content}" for role, content in kept))
        chat.messages = kept
        return chat


def is_chat(value: Any) -> bool:
    """Whether a value means to be a message, or a list of them."""
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)


def conversation(name: str, value: Any) -> tuple[Message, ...]:
    """The messages of a list; one message alone is a list of one."""
    if not isinstance(value, list):
        return (_message(name, value),)
    if not value:
        raise Malformed(f"{name} must hold messages, and holds none")
    return tuple(_message(f"{name}[{i}]", item) for i, item in enumerate(value))


def _message(name: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise Malformed(f"{name} must be a chat message, not {kind(item)}")
    speaker, text = ("from", "value") if "from" in item else ("role", "content")
    if missing := [key for key in (speaker, text) if key not in item]:
        raise Malformed(f"{name}: a chat message without {names(missing)}")
    if item.get("tool_calls"):
        raise Malformed(f"{name}: tool calls are not read")
    given = string(f"{name}.{speaker}", item[speaker])
    role = _SHAREGPT.get(given, given) if speaker == "from" else given
    if role not in _ROLES:
        known = [*_SHAREGPT, *_ROLES] if speaker == "from" else _ROLES
        raise Malformed(f"{name}.{speaker} must be one of {', '.join(known)}")
    return Message(role, string(f"{name}.{text}", item[text]))


def last_answer(messages: tuple[Message, ...]) -> int | None:
    """Where the assistant speaks last."""
    return next((i for i in reversed(range(len(messages))) if messages[i].role == "assistant"), None)
