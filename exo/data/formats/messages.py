"""Check chat messages, {"role", "content"} or ShareGPT's {"from", "value"}, and convert them to one form.

A prompt of messages is a `Chat`, an answer with more than a text a `Reply`. Only Renderer renders them. Null and empty
keys are dropped, and so are those of _NOT_RENDERED (ids, dates, names of models); all others reach the template.
Contents that are not text are refused.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from exo.data.errors import Malformed, array, kind, names, string

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
_SHAREGPT = {"human": "user", "gpt": "assistant", **_ROLES, "chatgpt": "assistant", "observation": "tool"}
_SHAREGPT |= {"function_response": "tool"}
EMPTY: tuple[Any, ...] = (None, "", [], {})


class Message(dict[str, Any]):
    """A chat message: its role, its content and every other key in the data, for the chat template."""

    learned: bool = True  # False: it has weight 0 in the data, so that it is context and no target

    def __init__(self, role: str, content: Any, **extra: Any) -> None:
        super().__init__(role=role, content=content, **extra)

    @property
    def role(self) -> str:
        return self["role"]

    @property
    def content(self) -> Any:  # a text, or None beside tool calls
        return self["content"]

    def transcript(self) -> str:
        """Return the content for people to read, followed by the other keys as JSON if there are any."""
        extra = {key: value for key, value in self.items() if key not in ("role", "content")}
        text = self.content or ""
        return f"{text} {json.dumps(extra, sort_keys=True, ensure_ascii=False, default=str)}" if extra else text


class Chat(str):
    """A prompt of chat messages. As a string it is their transcript, which is never an input of a model.

    So code that prints, sorts or compares prompts need not distinguish it. Only Renderer renders the messages, and
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

    As a string it is the message's transcript, so two replies are equal only if all their keys are.
    """

    message: Message

    def __new__(cls, message: Message) -> "Reply":
        reply = super().__new__(cls, message.transcript())
        reply.message = message
        return reply


# Keys that trainers write into a message and no template reads. A message with only these, role and content is plain.
_NOT_RENDERED = frozenset(
    "id uuid message_id parent_id conversation_id turn_id turn_index turn index idx timestamp time date created "
    "created_at create_time model model_name source lang language language_code score rating rank toxic redacted "
    "text_en token_count tokens status".split()
)
_WEIGHTS = ("weight", "train", "loss")  # 0 or false: the turn is not trained on
_NOT_EXTRA = _NOT_RENDERED.union(("role", "content", "from", "value"), _WEIGHTS)
_WITHOUT_TEXT = {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}  # content may be null
_AS_JSON = re.compile(r'\s*\[\s*\{\s*"')
_AS_PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'")


def is_chat(value: Any) -> bool:
    """Return whether a value looks like a message, or a list of them."""
    if isinstance(value, str):
        return False
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)


def decoded(name: str, value: Any) -> Any:
    """Return the list of messages that a text holds as JSON; return any other value unchanged."""
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


def parse_messages(name: str, value: Any) -> tuple[Message, ...]:
    """Return the messages of a list, or of a single message. A list of texts alternates, starting with the user."""
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
    roles = _SHAREGPT if speaker == "from" else _ROLES
    if not isinstance(role, str) or role not in roles:
        string(f"{name}.{speaker}", role)
        raise Malformed(f"{name}.{speaker} must be one of {', '.join(roles)}")
    content = item.get(text)
    if len(item) == 2 and type(content) is str:
        return Message(roles[role], content)
    extra = {key: value for key, value in item.items() if key not in _NOT_EXTRA and value not in EMPTY}
    if text not in item and not _WITHOUT_TEXT & extra.keys():
        raise Malformed(f"{name}: a chat message without {names([text])}")
    if content is not None or not _WITHOUT_TEXT & extra.keys():
        content = _text(f"{name}.{text}", content)
    if "tool_calls" in extra:
        extra["tool_calls"] = array(f"{name}.tool_calls", extra["tool_calls"])
        if not all(isinstance(call, dict) for call in extra["tool_calls"]):
            raise Malformed(f"{name}.tool_calls must be an array of objects")
    message = Message(roles[role], content)
    message.update(extra)
    for key in _WEIGHTS:
        if item.get(key) is not None:
            if item[key] not in (0, 1):
                raise Malformed(f"{name}.{key} must be 0 or 1")
            message.learned = message.learned and bool(item[key])
    return message


def _text(name: str, content: Any) -> str:
    """Return a content that is a text, or a list of text parts, which are joined."""
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


def _calls(name: str, value: Any) -> list[Any]:
    """Return ShareGPT's calls, which are JSON, as the list that templates read."""
    try:
        calls = json.loads(string(name, value))
    except (ValueError, RecursionError):
        raise Malformed(f"{name} of a function_call must be JSON with a name and arguments") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Malformed(f"{name} of a function_call must be JSON with a name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def answer_of(name: str, message: Message) -> str:
    """Return a message of the assistant as a completion: a text, or a Reply if it has more."""
    if not message.learned:
        raise Malformed(f"{name} has weight 0; an answer that is compared must have weight 1")
    return message.content if len(message) == 2 else Reply(message)


def last_answer(messages: tuple[Message, ...]) -> int | None:
    """Return the index of the assistant's last message of weight 1; None without one."""
    answers = (i for i in reversed(range(len(messages))) if messages[i].role == "assistant" and messages[i].learned)
    return next(answers, None)
