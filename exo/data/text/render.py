"""Choose the chat template of a run, and the prompts to render with it."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any, Literal

from exo.cli import console
from exo.data import Chat, DataError, Dataset, Example
from exo.data.text.chat_template import Settings, has_template, stop_id, template_source

MODES = ("auto", "always", "none")
RESERVED = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "conversation"}
RESERVED |= {"continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding"}
RESERVED |= {"truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens", "strftime_now"}
BUILT_IN = {
    "chatml": "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "plain": "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content | trim }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
}


def apply(
    tokenizer: Any,
    template: str,
    arguments: str | None,
    date: datetime.date,
    *datasets: Dataset,
    sampled: Literal["keep", "render"] = "keep",
) -> tuple[Dataset, ...]:
    """Configure the tokenizer's chat template, and return the data with the prompts to render as chats.

    See `configure` for `template` and `arguments`, and `render_plain` for `sampled`.
    """
    configure(tokenizer, template, arguments, date)
    return tuple(render_plain(dataset, tokenizer, template, sampled=sampled) for dataset in datasets)


def configure(tokenizer: Any, template: str, arguments: str | None, date: datetime.date | None) -> None:
    """Set the tokenizer's chat template, and its arguments and date.

    `template` is "auto", "always" or "none", which keep the tokenizer's template; a file; the name of one of its
    templates; or "chatml" or "plain". `arguments` is a JSON object. ValueError for anything else.
    """
    try:
        values = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError("--template_kwargs: expected a JSON object, such as '{\"enable_thinking\": false}'")
    if reserved := sorted(values.keys() & RESERVED):
        raise ValueError(f"--template_kwargs: expected arguments of the template; {reserved[0]} is set by the run")
    if template not in MODES:
        tokenizer.chat_template = _load_template(tokenizer, template)
    elif template == "always" and not has_template(tokenizer):
        raise ValueError("--chat_template always: the tokenizer has no chat template; name a file, chatml or plain")
    source = template_source(tokenizer)
    if unread := [name for name in values if name not in source]:
        raise ValueError(f"--template_kwargs: the chat template does not read {unread[0]!r}")
    tokenizer.template_settings = Settings(values, date)


def second_model_option(template: str) -> str:
    """Return --chat_template for a second model of a run, which keeps the template of its tokenizer."""
    return template if template in MODES else "always"


def _load_template(tokenizer: Any, name: str) -> str:
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in named:
        return named[name]
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--chat_template {name}: expected a jinja template in UTF-8") from None
    if name in BUILT_IN:
        return BUILT_IN[name]
    raise ValueError(f"--chat_template {name}: expected a file, or one of {', '.join([*MODES, *named, *BUILT_IN])}")


def render_plain(dataset: Dataset, tokenizer: Any, template: str, *, sampled: Literal["keep", "render"]) -> Dataset:
    """Return the data with their plain prompts as chat messages, if `template` (--chat_template) or the data need that.

    Rows with completions that were sampled from plain prompts are returned unchanged, or refused if the option requires
    rendering; `sampled="render"`, for a reward model, renders them.
    """
    examples = [example for example in dataset.examples if not isinstance(example.prompt, Chat) and example.prompt]
    if template == "none" or not examples or dataset.examples[0].label is not None:
        return dataset
    is_sampled = sampled == "keep" and any(example.tokens is not None for example in examples)
    if template != "auto":
        if is_sampled:
            raise DataError(
                f"{dataset.path}: samples of plain prompts; sample with --chat_template {template} too, or leave it out"
            )
    elif is_sampled or not dataset.conversational:
        if has_template(tokenizer) and not is_sampled:
            first = examples[0]
            answer = first.completions[0][:40] if first.completions else ""
            console.log(
                "  the tokenizer has a chat template, but these prompts are plain texts, which are used as they are: "
                f"{first.prompt[-60:]!r}{f' + {answer!r}' if answer else ''}\n  pass --chat_template always to render "
                "them as user turns, or none to silence this note"
            )
        return dataset
    elif not has_template(tokenizer):
        raise DataError(
            f"{dataset.path}: {dataset.format.split(' (')[0]} are chats, and the tokenizer has no chat template; set "
            "--chat_template chatml, plain or a file, or none to use the texts as they are"
        )
    return dataclasses.replace(dataset, examples=[render(example) for example in dataset.examples])


def render(example: Example) -> Example:
    """Return an example with its plain prompt as chat messages, which invalidates sampled token ids.

    An empty prompt is not changed.
    """
    if isinstance(example.prompt, Chat) or not example.prompt:
        return example
    chat = example.as_chat()
    return chat if chat.tokens is None else dataclasses.replace(chat, tokens=chat.tokens._replace(tokenizer=""))


def describe(option: str, dataset: Dataset, tokenizer: Any) -> str:
    """Describe the chat template and the end of a completion in a line."""
    if not any(isinstance(example.prompt, Chat) for example in dataset.examples):
        return f"chat template: not used, texts are read as they are; a completion ends with {tokenizer.eos_token!r}"
    if not has_template(tokenizer):
        return "chat template: none, and the data have chat messages"
    name = "the tokenizer's" if option in MODES else option
    try:
        end = stop_id(tokenizer)
    except DataError as error:
        return f"chat template: {name}; {error}"
    if end is None:
        return f"chat template: {name}; it ends no turn with a token, so a completion ends with {tokenizer.eos_token!r}"
    return f"chat template: {name}; a turn ends with {tokenizer.convert_ids_to_tokens(end)!r}"
