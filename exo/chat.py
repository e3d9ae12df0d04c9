"""Chat messages as the text that a model reads: the tokenizer's chat template, with the border before the answer kept.

The prompt is the rendering of its messages with the template's opening of an answer. The completion is what the
template adds to that once the answer is given; a template that changes the prompt when it is answered is refused,
because then nobody can tell where the completion begins. The template alone says whether a BOS comes first.

A completion ends where the model is to stop:
- the template ends a turn with the tokenizer's eos: right after it. Line breaks that follow separate turns; a sample
  that stops at eos has none.
- it ends a turn with something else (Gemma's <end_of_turn>): right after that. No eos is added, because the template
  never writes one there. The caller is told, because sampling stops at eos alone.
- it writes nothing after the answer: the caller adds eos, as after plain text.

Left out: tools, templates by name, answers that continue a message of the assistant.
"""

from typing import Any, Literal

from jinja2 import TemplateError

from exo.data import Chat, DataError, Message


def prompt_text(chat: Chat, tokenizer: Any) -> str:
    return _render(chat.messages, tokenizer, opened=True)


def answer_text(chat: Chat, answer: str, tokenizer: Any) -> tuple[str, Literal["eos", "template", "none"]]:
    """The text of the completion, and who ends it."""
    prompt = prompt_text(chat, tokenizer)
    whole = _render((*chat.messages, Message("assistant", answer)), tokenizer, opened=False)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders the prompt otherwise once it is answered; expected a template whose "
            "generation prompt begins the answer, so set another chat_template in the tokenizer's directory"
        )
    rest = whole[len(prompt) :]
    turn = rest.rstrip()
    if turn.endswith(tokenizer.eos_token):
        return turn, "eos"
    if turn.endswith(answer.strip()):  # stripped, because templates strip too
        return rest if rest.endswith(answer) else turn, "none"
    return turn, "template"


def _render(messages: tuple[Message, ...], tokenizer: Any, *, opened: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "chat messages, but the tokenizer has no chat template; take the model's instruct version, or put a "
            "chat_template.jinja beside the tokenizer"
        )
    try:
        rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=opened, tokenize=False)
    except TemplateError as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the chat template refuses these messages: {what}") from None
    return str(rendered)
