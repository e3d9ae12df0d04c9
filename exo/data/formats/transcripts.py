"""Parse Anthropic HH transcripts: texts whose turns start with \\n\\nHuman: and \\n\\nAssistant:."""

import re
from collections.abc import Sequence

from exo.data.formats.messages import Chat, Message, Reply

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_turns(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text before the first marker, and (Human or Assistant, text) of each turn, blanks included."""
    preamble, *pieces = _MARKER.split(text)
    return preamble, list(zip(pieces[::2], pieces[1::2], strict=True))


def is_transcript(prompt: str) -> bool:
    """Return whether a prompt is a transcript that ends with the marker of the assistant's next turn."""
    if isinstance(prompt, Chat) or not prompt.rstrip().endswith("\n\nAssistant:"):
        return False
    return any(role == "Human" for role, _ in split_turns(prompt)[1])


def as_chat(prompt: str) -> Chat:
    """Return a prompt as messages: the turns of a transcript, one turn of the user, or the same Chat.

    Text before a transcript's first marker becomes a system turn.
    """
    if isinstance(prompt, Chat):
        return prompt
    if not is_transcript(prompt):
        return Chat([Message("user", str.__str__(prompt))])
    preamble, turns = split_turns(prompt)
    system = [Message("system", preamble.strip())] if preamble.strip() else []
    return Chat([*system, *(Message(_ROLES[role], text.strip()) for role, text in turns[:-1])])


def as_answers(prompt: str, completions: Sequence[str]) -> tuple[str, ...]:
    """Return the completions for the chat of `as_chat`, which has no blanks around the texts of a transcript."""
    if not is_transcript(prompt):
        return tuple(completions)
    return tuple(text if isinstance(text, Reply) else text.strip() for text in completions)
