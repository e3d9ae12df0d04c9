"""Chat messages: {"role", "content"}, ShareGPT's {"from", "value"}, checked and converted to one form.

A prompt of messages is a `Chat`, an answer with more than a text a `Reply`. Only Renderer renders them. Keys that are
null or empty are dropped, and so are those that no template reads (ids, dates, names of models: _NOT_RENDERED); all
others reach the template. Left out: contents that are not text.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from exo.data.errors import Malformed, array, kind, names, string

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
_SHAREGPT = {"human": "user", "gpt": "assistant", **_ROLES, "chatgpt": "assistant", "observation": "tool"}
_SHAREGPT |= {"function_response": "tool"}
_NOTHING: tuple[Any, ...] = (None, "", [], {})


class Message(dict[str, Any]):
    """One chat message: its role, its content and every other key that the data give it, for the chat template."""

    learned: bool = True  # False: the data give it weight 0, so that it is context and no target

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

    So whatever prints, sorts or compares prompts treats it as any other prompt. Only Renderer renders the messages, and
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


# What other trainers write into a message that no template reads. A message that has only these besides its role and
# content is a plain one.
_NOT_RENDERED = frozenset(
    "id uuid message_id parent_id conversation_id turn_id turn_index turn index idx timestamp time date created "
    "created_at create_time model model_name source lang language language_code score rating rank toxic redacted "
    "text_en token_count tokens status".split()
)
_SPOKEN = ("role", "content", "from", "value")
_LEARNED = ("weight", "train", "loss")  # 0 or false: the turn is not learned
_THINKING = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
)  # beside these content is null
_AS_JSON = re.compile(r'\s*\[\s*\{\s*"')
_AS_PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'")


def is_chat(value: Any) -> bool:
    """Return whether a value means to be a message, or a list of them."""
    if isinstance(value, str):
        return False
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)


def decoded(name: str, value: Any) -> Any:
    """Return the list of messages that a text holds as JSON; any other value as it is."""
    if type(value) is not str or value[:1] not in "[ \n\t\r":
        return value
    if _AS_PYTHON.match(value):
        raise Malformed(f"{name} holds messages as Python writes them; write JSON instead, with json.dumps")
    if not _AS_JSON.match(value):
        return value
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_messages = all(isinstance(item, dict) and ({"role", "from"} & item.keys()) for item in items)
    return items if are_messages else value


def conversation(name: str, value: Any) -> tuple[Message, ...]:
    """Return the messages of a list; one message alone is a list of one. Texts alone alternate, the user's first."""
    value = decoded(name, value)
    if not isinstance(value, list):
        return (_message(name, value),)
    if not value:
        raise Malformed(f"{name} must hold messages, and holds none")
    if all(type(item) is str for item in value):
        return tuple(Message(("user", "assistant")[i % 2], item) for i, item in enumerate(value))
    if all(isinstance(item, dict) and item.keys() >= {"input", "output"} for item in value):
        return tuple(
            Message(role, string(f"{name}[{i}].{key}", item[key]))
            for i, item in enumerate(value)
            for role, key in (("user", "input"), ("assistant", "output"))
        )
    return tuple(_message(f"{name}[{i}]", item) for i, item in enumerate(value))


def _message(name: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise Malformed(f"{name} must be a chat message, not {kind(item)}")
    speaker, text = ("from", "value") if "from" in item else ("role", "content")
    if speaker not in item:
        raise Malformed(f"{name}: a chat message without {names([speaker])}")
    role = item[speaker]
    if role in ("function_call", "tool_call") and speaker == "from":
        return Message("assistant", None, tool_calls=_calls(f"{name}.{text}", item.get(text)))
    known = _SHAREGPT if speaker == "from" else _ROLES
    if not isinstance(role, str) or role not in known:
        string(f"{name}.{speaker}", role)
        raise Malformed(f"{name}.{speaker} must be one of {', '.join(known)}")
    content = item.get(text)
    if len(item) == 2 and type(content) is str:
        return Message(known[role], content)
    others = {
        key: value
        for key, value in item.items()
        if key not in _SPOKEN and key not in _NOT_RENDERED and key not in _LEARNED and value not in _NOTHING
    }
    if text not in item and not any(key in others for key in _THINKING):
        raise Malformed(f"{name}: a chat message without {names([text])}")
    if content is not None or not any(key in others for key in _THINKING):
        content = _text(f"{name}.{text}", content)
    if "tool_calls" in others:
        others["tool_calls"] = _objects(f"{name}.tool_calls", others["tool_calls"])
    message = Message(known[role], content)
    message.update(others)
    message.learned = _learned(name, item)
    return message


def _text(name: str, content: Any) -> str:
    """Return a content that is a text, or a list of parts of which each is one."""
    if not isinstance(content, list):
        return string(name, content)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise Malformed(f"{name} must be a string or parts of type text; {name}[{i}] is {kind(part)}")
        if part.get("type") != "text":
            raise Malformed(f"{name}[{i}] is of type {names([str(part.get('type'))])}, and not text")
        texts.append(string(f"{name}[{i}].text", part.get("text")))
    return "".join(texts)


def _objects(name: str, value: Any) -> list[Any]:
    objects = array(name, value)
    if not all(isinstance(item, dict) for item in objects):
        raise Malformed(f"{name} must be an array of objects")
    return objects


def _learned(name: str, item: dict[str, Any]) -> bool:
    for key in _LEARNED:
        value = item.get(key)
        if value is not None and value not in (0, 1):
            raise Malformed(f"{name}.{key} must be 0 or 1")
    return all(item.get(key) is None or bool(item[key]) for key in _LEARNED)


def _calls(name: str, value: Any) -> list[Any]:
    """Return ShareGPT's calls, a text of JSON, as the list that templates read."""
    try:
        calls = json.loads(string(name, value))
    except (ValueError, RecursionError):
        raise Malformed(f"{name} of a function_call must be JSON with a name and arguments") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Malformed(f"{name} of a function_call must be JSON with a name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def answer_of(name: str, message: Message) -> str:
    """Return a message of the assistant as a completion: its text, or a Reply where it has more than that."""
    if not message.learned:
        raise Malformed(f"{name} has weight 0, which an answer that is compared cannot have")
    return message.content if len(message) == 2 else Reply(message)


def last_answer(messages: tuple[Message, ...]) -> int | None:
    """Return the place of the assistant's last message that is to be learned; None without one."""
    places = (i for i in reversed(range(len(messages))) if messages[i].role == "assistant" and messages[i].learned)
    return next(places, None)
