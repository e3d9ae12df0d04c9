"""Cut or drop rows that are longer than the limits on prompts and completions."""

from collections import Counter
from dataclasses import dataclass

from exo.data import DataError

STUMP = 32  # tokens; a shorter rest of a prompt has lost its meaning


@dataclass(frozen=True)
class Limits:
    """Limits in tokens, and the treatment of longer rows.

    Completions are cut at the end and prompts at the beginning. The prompt keeps `max_prompt_length` tokens, or half of
    `max_length` if that is None; a completion gets the rest.
    """

    max_length: int
    max_completion_length: int | None
    truncate: str  # "prompt-left" | "drop" | "error"
    max_prompt_length: int | None = None


def fit(
    prompt: list[int],
    completions: list[list[int]],
    start: int,  # tokens at the beginning to keep
    limits: Limits,
    place: str,
    counts: Counter[str],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    """Return the prompt and its completions within the limits; None for a dropped row; update `counts`.

    The longest completion determines the cut of the prompt. DataError for a long row if `limits.truncate` is "error".
    """
    if limits.max_prompt_length is not None and len(prompt) > limits.max_prompt_length:
        counts["rows with the prompt cut on the left to --max_prompt_length"] += 1
        prompt = last_of(prompt, start, limits.max_prompt_length)
    share = (limits.max_length + 1) // 2 if limits.max_prompt_length is None else limits.max_length - 1
    room = limits.max_length - min(len(prompt), share)
    if limits.max_completion_length is not None:
        room = min(room, limits.max_completion_length)
    longest = max(map(len, completions))
    too_long = longest > room or len(prompt) + longest > limits.max_length
    if too_long and limits.truncate == "error":
        raise DataError(f"{place}: longer than the limits allow; raise them or choose another --truncate")
    if too_long and limits.truncate == "drop":
        counts["rows dropped: over-long"] += 1
        return None
    if longest > room:
        num_distinct = len(set(map(tuple, completions)))
        completions = [completion[:room] for completion in completions]
        if num_distinct > 1 == len(set(map(tuple, completions))):
            counts["rows dropped: completions identical once cut"] += 1
            return None
        counts["rows with a completion cut on the right (its end of sequence goes too)"] += 1
    room = limits.max_length - max(map(len, completions))
    if len(prompt) > room:
        counts["rows with the prompt cut on the left"] += 1
        prompt = last_of(prompt, start, room)
    return tuple(prompt), tuple(map(tuple, completions))


def last_of(prompt: list[int], start: int, room: int) -> list[int]:
    """Return `room` tokens: the first `start` of the prompt and the last others."""
    if len(prompt) <= room:
        return prompt
    start = start if start < room else 0
    return prompt[:start] + prompt[len(prompt) - (room - start) :]


def is_stump(remaining: int, length: int) -> bool:
    """Return whether a prompt was cut to fewer than STUMP tokens or a quarter of its length."""
    return remaining < length and (remaining < STUMP or remaining < length / 4)
