"""Tokenize texts that continue one another, with every kind of tokenizer.

Tokens depend on the preceding text: SentencePiece tokenizers begin every text with a blank (Llama 2, Mistral), others
only the first word, and WordPiece joins letters to the previous word. So a completion is never tokenized alone.
`continued` returns the tokens of a completion after its prompt, whose tokens are those of sampling:

    decode(ids of the prompt + ids of the completion) == decode(ids of the two texts as one)

exo.data.text.tokenize adds the special tokens at the beginning of a text.
"""

import re
from collections.abc import Iterator
from typing import Any

# Noncharacters, which no Unicode text contains. They mark a control token that is tokenized as text.
LEFT, RIGHT = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{LEFT}([^{LEFT}{RIGHT}]*){RIGHT}")
NEUTRAL = "."
TAIL = 128  # characters of a long prompt that a completion is tokenized with, at least
_CONTEXTS = (NEUTRAL, "\n", ":", "a", "a ")  # texts after which a tokenizer adds no blank; tried in this order


class BoundaryError(ValueError):
    """Raised for a completion that shares a token with its prompt, so that no boundary divides the two."""


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text, without adding special tokens; marked control tokens become plain text."""
    if LEFT not in text:
        return _ids(text, tokenizer)
    first, rest = text[: text.index(LEFT)], text[text.index(LEFT) :]
    ids = _ids(first, tokenizer)
    return ids + _continued_pieces(first or NEUTRAL, rest, tokenizer)


def continued(prompt_ids: list[int], prompt: str, text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of `text` after `prompt`, whose tokens are `prompt_ids`.

    BoundaryError if there are none, such as for letters that WordPiece joins to the prompt's last word.
    """
    if LEFT in text or LEFT in prompt:
        return _continued_pieces(prompt.rpartition(RIGHT)[2] or NEUTRAL, text, tokenizer)
    tail = _tail(prompt)
    if text and tail != prompt:
        tail_ids, joint = _ids(tail, tokenizer), _ids(tail + text, tokenizer)
        if joint[: len(tail_ids)] == tail_ids:
            return joint[len(tail_ids) :]
    return _after(prompt_ids, prompt, text, tokenizer)


def _tail(prompt: str) -> str:
    """Return the end of a prompt, from a blank or a line break; a completion's tokens depend only on it."""
    if len(prompt) <= 2 * TAIL:
        return prompt
    start = max(prompt.rfind("\n", 0, len(prompt) - TAIL), prompt.rfind(" ", 0, len(prompt) - TAIL))
    return prompt[start:] if len(prompt) - start <= 2 * TAIL else prompt


def _continued_pieces(context: str, text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text with marked control tokens, which are cut after their first character."""
    ids: list[int] = []
    for i, piece in enumerate(_MARKED.split(text)):
        for part in (piece,) if i % 2 == 0 else (piece[:1], piece[1:]):
            ids += _after(_ids(context, tokenizer), context, part, tokenizer)
            context = NEUTRAL if i % 2 else part or context
    return ids


def _after(context_ids: list[int], context: str, text: str, tokenizer: Any) -> list[int]:
    if not text:
        return []
    joint = _ids(context + text, tokenizer)
    if joint[: len(context_ids)] == context_ids:
        return joint[len(context_ids) :]
    # the joint text has a token across the boundary, so the completion needs tokens that begin where it begins
    expected = decode(joint, tokenizer)
    for candidate in _candidates(text, tokenizer):
        if decode(context_ids + candidate, tokenizer) == expected:
            return candidate
    raise BoundaryError(
        "the tokenizer makes one token of the prompt's end and the completion's beginning; end the prompt with a blank "
        "or a line break, or begin the completion with one"
    )


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def check(prompt_ids: list[int], prompt: str, ids: list[int], text: str, tokenizer: Any) -> None:
    """Raise BoundaryError unless the tokens of prompt and completion decode to the text of both as one."""
    joint = decode(text_ids(prompt + text, tokenizer), tokenizer)
    if decode(prompt_ids + ids, tokenizer) != joint:
        raise BoundaryError("the tokens of prompt and completion do not decode to the two texts joined")


def decode(ids: list[int], tokenizer: Any) -> str:
    """Return the text of tokens, with special tokens and every blank."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decoded_after(prompt_ids: list[int], ids: list[int], tokenizer: Any, *, special: bool = False) -> str:
    """Return the text that `ids` add to a prompt, with its first blank; `special` keeps special tokens."""
    prompt, both, alone = (
        tokenizer.decode(part, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        for part in (prompt_ids, [*prompt_ids, *ids], ids)
    )
    return both[len(prompt) :] if both.startswith(prompt) else alone


def _candidates(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Yield the tokens that a text can have after another one: its tokens alone, and after each of a few contexts."""
    yield _ids(text, tokenizer)
    for context in _CONTEXTS:
        context_ids, both = _ids(context, tokenizer), _ids(context + text, tokenizer)
        if both[: len(context_ids)] == context_ids:
            yield both[len(context_ids) :]
