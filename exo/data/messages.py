"""Chat messages: {"role", "content"}, or ShareGPT's {"from", "value"}, checked and made one thing.

A prompt of messages is a `Chat`. Only exo.chat turns it into what a model reads. Left out: tools and their calls, and
contents that are not text.
"""

import json
from collections.abc import Iterable
from typing import Any

from exo.data.errors import Malformed, kind, names, string

_ROLES = ("system", "developer", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant"}


class Message(dict[str, Any]):
    """One chat message: its role, its content and every other key that the data give it, for the chat template."""

    def __init__(self, role: str, content: Any, **others: Any) -> None:
        super().__init__(role=role, content=content, **others)

    @property
    def role(self) -> str:
        return self["role"]

    @property
    def content(self) -> Any:  # a text, or None beside tool calls
        return self["content"]

    def transcript(self) -> str:
        """Return the content for people to read, followed by the other keys as JSON if there are any."""
        others = {key: value for key, value in self.items() if key not in ("role", "content")}
        text = self.content or ""
        return f"{text} {json.dumps(others, sort_keys=True, ensure_ascii=False, default=str)}" if others else text


class Chat(str):
    """A prompt of chat messages. As a string it is their transcript, for people and never for a model.

    So whatever prints, sorts or compares prompts treats it as any other prompt. Only exo.chat renders the messages, and
    write_jsonl writes them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...]  # JSON schemas of the tools that the template lists; empty if there are none

    def __new__(cls, messages: Iterable[Message], tools: Iterable[Any] = ()) -> "Chat":
        turns, schemas = tuple(messages), tuple(tools)
        heading = f"tools: {json.dumps(schemas, sort_keys=True, default=str)}\n\n" if schemas else ""
        chat = super().__new__(cls, heading + "\n\n".join(f"{turn.role}: {turn.transcript()}" for turn in turns))
        chat.messages, chat.tools = turns, schemas
        return chat


class Reply(str):
    """A completion that is a chat message with more than a role and a content: reasoning, or calls of tools.

    As a string it is the message's transcript, so that two replies are equal only if every key of theirs is.
    """

    message: Message

    def __new__(cls, message: Message) -> "Reply":
        reply = super().__new__(cls, message.transcript())
        reply.message = message
        return reply


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
