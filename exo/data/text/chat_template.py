"""Render chat messages with the tokenizer's chat template.

The prompt is the rendering of its messages with the template's opening of an answer. The completion is the text that
the template adds for the answer, up to its end of turn. A template that renders the prompt differently with an answer
is refused, because the beginning of the completion is then unknown.

exo.data.text.render chooses the template, its arguments and its date for a run, and stores them with the tokenizer. A
`Renderer` renders a plain answer once to find out how the template ends a turn, and ends every answer in the same way:

- with a token (`<|im_end|>`, Gemma's `<end_of_turn>`, `</s>`): the completion ends after it, without the line breaks
  that separate turns, because a sample stops there.
- with nothing, or with other text: the caller appends the tokenizer's end of sequence.

Control tokens in the data would forge turns, so `Renderer` marks them, and subwords tokenizes them as plain text.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from exo.data import Chat, DataError, Message, Reply
from exo.data.text.resource_limits import limited
from exo.data.text.subwords import LEFT, RIGHT

SECONDS, MAX_BYTES = 10.0, 2**28  # for one rendering
PROBE = "ok"
_MARKS = re.compile(f"[{LEFT}{RIGHT}]")
_FORMATS = re.compile(r"""(['"])((?:(?!\1).)*%(?:(?!\1).)*)\1""")  # texts of a template with a % in them


class Settings(NamedTuple):
    """The arguments of a chat template in a run."""

    arguments: Mapping[str, Any] = {}  # such as enable_thinking
    date: datetime.date | None = None  # None: today


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def template_source(tokenizer: Any) -> str:
    """Return the source of a tokenizer's chat templates, or ""."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)


class Answer(NamedTuple):
    """A rendered completion."""

    text: str
    end: str  # the template's end of turn, if that is a token
    needs_eos: bool  # the template writes no end of turn


class Renderer:
    """Renders prompts and answers with a tokenizer's chat template. Make a new one when the template changes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.settings: Settings = getattr(tokenizer, "template_settings", Settings())
        self._last: tuple[Chat | None, list[Any], list[Any]] = None, [], []

    def prompt(self, chat: Chat) -> str:
        """Return the text of a prompt, up to and including the template's opening of an answer."""
        messages, tools = self._mark_chat(chat)
        return self._render(messages, tools, opened=True)

    def answer(self, chat: Chat, prompt: str, answer: str) -> "Answer":
        """Render a completion of `chat`, whose rendering is `prompt`."""
        message = answer.message if isinstance(answer, Reply) else Message("assistant", answer)
        messages, tools = self._mark_chat(chat)
        rendered = self._render([*messages, self._mark(message)], tools, opened=False)
        if not rendered.startswith(prompt):
            raise DataError(
                "the chat template renders the prompt differently once it is answered, so nothing tells where the "
                "answer begins; set template arguments (--template_kwargs) or another --chat_template"
            )
        rest, tail = rendered[len(prompt) :], self._after_answer
        if not rest.endswith(tail):  # some templates trim the end of a conversation
            rest, tail = rest.rstrip(), tail.rstrip()
        if rest.endswith(tail):
            return Answer(rest[: len(rest) - len(tail)], self.end_of_turn, self.end_id is None)
        if not rest.endswith(self.control_tokens):
            raise DataError("the chat template ends this answer differently from a plain one")
        return Answer(rest, "", False)  # gpt-oss ends a call of a tool with another token

    @cached_property
    def _after_answer(self) -> str:
        """The text that the template writes after a plain answer at the end of a conversation."""
        rendered = self._probe(Message("user", PROBE), Message("assistant", PROBE + PROBE))
        _, answered, tail = rendered.rpartition(PROBE + PROBE)
        if not answered:
            raise DataError("the chat template does not write the answer; expected a template of a causal LM")
        return tail

    def _probe(self, *messages: Message) -> str:
        """Render a plain conversation, after a system turn if the template needs one."""
        try:
            return self._render(list(messages), [], opened=False)
        except DataError:
            return self._render([Message("system", PROBE), *messages], [], opened=False)

    @cached_property
    def end_of_turn(self) -> str:
        """The end of a completion: the template's text after an answer, up to its first control token; "" if none."""
        match = self._control_pattern and self._control_pattern.search(self._after_answer)
        return self._after_answer[: match.end()] if match else ""

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends a turn; None if the template writes none."""
        match = self._control_pattern and self._control_pattern.search(self.end_of_turn)
        return self.tokenizer.convert_tokens_to_ids(match[0]) if match else None

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that texts of messages must not contain.

        These are the special tokens and the added tokens that the template writes around turns (DeepSeek's are not
        special), without tokens that it searches in an answer, such as `</think>`.
        """
        added = list(self.tokenizer.added_tokens_decoder.values())
        user, assistant = Message("user", PROBE), Message("assistant", PROBE)
        try:
            written = self._probe(user, assistant, user)
        except DataError:
            written = ""
        template = template_source(self.tokenizer)
        tokens = {t.content for t in added if t.special or t.content in written}
        read = {token for token in tokens if _searches(template, token)}
        read |= {token.replace("</", "<") for token in read}
        return tuple(sorted((t for t in tokens - read if t.strip()), key=len, reverse=True))

    @cached_property
    def _control_pattern(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(re.escape, self.control_tokens))) if self.control_tokens else None

    def _mark_chat(self, chat: Chat) -> tuple[list[Any], list[Any]]:
        if self._last[0] is not chat:
            self._last = chat, self._mark(list(chat.messages)), self._mark(list(chat.tools))
        return self._last[1:]

    def _mark(self, value: Any) -> Any:
        """Return messages or tools with the control tokens in their texts marked."""
        pattern = self._control_pattern
        if isinstance(value, str):
            text = str.__str__(value)
            return pattern.sub(lambda match: f"{LEFT}{match[0]}{RIGHT}", text) if pattern else text
        if isinstance(value, Mapping):
            present = {key: item for key, item in value.items() if item is not None}  # templates would write "None"
            return {self._mark(key): item if key == "role" else self._mark(item) for key, item in present.items()}
        return [self._mark(item) for item in value] if isinstance(value, list | tuple) else value

    def _render(self, messages: list[Any], tools: list[Any], *, opened: bool) -> str:
        if not has_template(self.tokenizer):
            raise DataError(
                "chat messages, but the tokenizer has no chat template; take the model's instruct version, or name one "
                "with --chat_template (chatml, or a file)"
            )
        template = self.tokenizer.get_chat_template(tools=tools or None)
        settings, size = self.settings, sum(len(str(value)) for value in (*messages, *tools))
        if settings.date and "strftime_now" in template:
            template = _strftime(template, settings.date) + template
        try:
            with limited(SECONDS, MAX_BYTES):
                options = {"tools": tools or None, "chat_template": template, "add_generation_prompt": opened}
                rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **settings.arguments)
        except Exception as error:  # the template is code that may raise anything
            lines = str(error).splitlines() or [type(error).__name__]
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            raise DataError(f"the chat template refuses these messages: {kind}{lines[0]}") from None
        if len(rendered) > 2**20 + 64 * size:
            raise DataError(
                f"the chat template makes {len(rendered):,} characters of {size:,}; expected a chat template"
            )
        return rendered


def is_written(answer: str, rendered: str) -> bool:
    """Return whether the rendering of an answer contains all its texts; templates may move blanks."""
    message = answer.message if isinstance(answer, Reply) else {"content": str.__str__(answer)}
    written = "".join(_MARKS.sub("", rendered).split())
    return all("".join(text.split()) in written for text in _texts(message))


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a message, without its role and the arguments of calls, which templates write differently."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "type", "id", "arguments"):
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def stop_id(tokenizer: Any) -> int | None:
    """Return the token that ends a turn of the chat template; None without a token, or a template that works."""
    try:
        return Renderer(tokenizer).end_id if has_template(tokenizer) else None
    except DataError:  # no chat can be rendered with it, so all prompts are plain
        return None


def _searches(template: str, token: str) -> bool:
    """Return whether the template searches a token in a content: `'</think>' in content`, `split('</think>')`."""
    quoted = f"""['"]{re.escape(token)}['"]"""
    return bool(re.search(rf"{quoted}\s+in\b|split\(\s*{quoted}", template))


def _strftime(template: str, date: datetime.date) -> str:
    """Return jinja source that defines `strftime_now` for a fixed date and the formats that a template writes."""
    noon = datetime.datetime.combine(date, datetime.time(12))
    dates = {text: noon.strftime(text) for _, text in _FORMATS.findall(template)}
    return "{%- macro strftime_now(format) -%}{{ " + json.dumps(dates) + "[format] }}{%- endmacro -%}"
