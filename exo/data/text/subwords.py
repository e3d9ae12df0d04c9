"""Tokens of texts that continue one another, for every kind of tokenizer.

A tokenizer sees one text at a time, and what it makes of a text can depend on where the text stands: SentencePiece ones
begin every text with a blank (Llama 2, Mistral), others only the first word, WordPiece joins letters to the word before
them. So a completion is never tokenized alone. `continued` gives the tokens that a completion has after its prompt, and
the prompt's own tokens stay as sampling sees them:

    decode(ids of the prompt + ids of the completion) == decode(ids of the two texts as one)

Left out: special tokens at the beginning of a text (exo.data.text.tokenize).
"""

import re
from collections.abc import Iterator
from typing import Any

# Noncharacters: Unicode keeps them out of texts. They stand around a control token that is to be tokenized as text.
LEFT, RIGHT = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{LEFT}([^{LEFT}{RIGHT}]*){RIGHT}")
# Texts after which a tokenizer adds no blank of its own; tried in this order.
NEUTRAL = "."
TAIL = 128  # characters of a long prompt that a completion is tokenized with, at least
_CONTEXTS = (NEUTRAL, "\n", ":", "a", "a ")


class BoundaryError(ValueError):
    """A completion whose tokens depend on its prompt in a way that no boundary between the two can express."""


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text, without special tokens added; marked control tokens in it become plain text."""
    if LEFT not in text:
        return _ids(text, tokenizer)
    first, rest = text[: text.index(LEFT)], text[text.index(LEFT) :]
    ids = _ids(first, tokenizer)
    return ids + _continued_pieces(first or NEUTRAL, rest, tokenizer)


def continued(prompt_ids: list[int], prompt: str, text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of `text` where it follows `prompt`, whose tokens are `prompt_ids`.

    BoundaryError if no tokens make the two texts one, such as letters that WordPiece joins to the prompt's last word.
    """
    if LEFT in text or LEFT in prompt:
        return _continued_pieces(prompt.rpartition(RIGHT)[2] or NEUTRAL, text, tokenizer)
    tail = _tail(prompt)
    if text and tail != prompt:
        before, joint = _ids(tail, tokenizer), _ids(tail + text, tokenizer)
        if joint[: len(before)] == before:
            return joint[len(before) :]
    return _after(prompt_ids, prompt, text, tokenizer)


def _tail(prompt: str) -> str:
    """Return the end of a prompt, from a blank or a line break on. Tokens of what follows depend on no more of it."""
    if len(prompt) <= 2 * TAIL:
        return prompt
    start = max(prompt.rfind("\n", 0, len(prompt) - TAIL), prompt.rfind(" ", 0, len(prompt) - TAIL))
    return prompt[start:] if len(prompt) - start <= 2 * TAIL else prompt


def _continued_pieces(before: str, text: str, tokenizer: Any) -> list[int]:
    """`continued` for a text with marked control tokens, each of which is cut after its first character: no tokenizer
    then takes it for the token."""
    ids: list[int] = []
    for i, piece in enumerate(_MARKED.split(text)):
        for part in (piece,) if i % 2 == 0 else (piece[:1], piece[1:]):
            ids += _after(_ids(before, tokenizer), before, part, tokenizer)
            before = NEUTRAL if i % 2 else part or before
    return ids


def _after(before_ids: list[int], before: str, text: str, tokenizer: Any) -> list[int]:
    if not text:
        return []
    joint = _ids(before + text, tokenizer)
    if joint[: len(before_ids)] == before_ids:
        return joint[len(before_ids) :]
    # the joint text has a token across the boundary, so the completion needs tokens that begin where it begins
    wanted = decode(joint, tokenizer)
    for candidate in _candidates(text, tokenizer):
        if decode(before_ids + candidate, tokenizer) == wanted:
            return candidate
    raise BoundaryError(
        "the tokenizer makes one token of the prompt's end and the completion's beginning; end the prompt with a blank "
        "or a line break, or begin the completion with one"
    )


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def check(prompt_ids: list[int], prompt: str, ids: list[int], text: str, tokenizer: Any) -> None:
    """BoundaryError unless prompt and completion decode to what their joint text decodes to."""
    joint = decode(text_ids(prompt + text, tokenizer), tokenizer)
    if decode(prompt_ids + ids, tokenizer) != joint:
        raise BoundaryError("the tokens of prompt and completion do not decode to the two texts joined")


def decode(ids: list[int], tokenizer: Any) -> str:
    """Return the text of tokens, special ones included, with every blank as it is."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decoded_after(prompt_ids: list[int], ids: list[int], tokenizer: Any, *, special: bool = False) -> str:
    """Return the text that `ids` add to a prompt: its first blank too, which a decoder drops at the start of a text.

    `special` keeps special tokens in the text.
    """

    def decoded(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    before, whole = decoded(prompt_ids), decoded([*prompt_ids, *ids])
    return whole[len(before) :] if whole.startswith(before) else decoded(ids)


def _candidates(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Yield the tokens that a text may have where it does not begin: alone, and after each of a few contexts."""
    yield _ids(text, tokenizer)
    for context in _CONTEXTS:
        before, both = _ids(context, tokenizer), _ids(context + text, tokenizer)
        if both[: len(before)] == before:
            yield both[len(before) :]
