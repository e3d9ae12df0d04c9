"""Limits on the lengths of prompts and completions, and what becomes of rows that are longer."""

from collections import Counter
from dataclasses import dataclass

from exo.data import DataError

STUMP = 32  # tokens; a cut prompt that keeps fewer is another prompt


@dataclass(frozen=True)
class Limits:
    """How long a row may be, and what happens to one that is longer.

    A completion over its limit loses its end, and a prompt its beginning. The prompt keeps `max_prompt_length` tokens,
    or half of `max_length` if that is None; a completion gets the rest.
    """

    max_length: int
    max_completion_length: int | None
    truncate: str  # "prompt-left" | "drop" | "error"
    max_prompt_length: int | None = None


def fit(
    prompt: list[int],
    completions: list[list[int]],
    start: int,  # tokens at the beginning that are kept
    limits: Limits,
    place: str,
    counts: Counter[str],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    """Apply the limits. One prompt serves all its completions, so the longest of them decides."""
    if limits.max_prompt_length is not None and len(prompt) > limits.max_prompt_length:
        counts["rows with the prompt cut on the left to --max_prompt_length"] += 1
        prompt = last_of(prompt, start, limits.max_prompt_length)
    share = (limits.max_length + 1) // 2 if limits.max_prompt_length is None else limits.max_length - 1
    most = limits.max_length - min(len(prompt), share)
    if limits.max_completion_length is not None:
        most = min(most, limits.max_completion_length)
    long_completion = max(map(len, completions)) > most
    too_long = long_completion or len(prompt) + max(map(len, completions)) > limits.max_length
    if too_long and limits.truncate == "error":
        raise DataError(f"{place}: longer than the limits allow; raise them or choose another --truncate")
    if too_long and limits.truncate == "drop":
        counts["rows dropped: over-long"] += 1
        return None
    if long_completion:
        different = len(set(map(tuple, completions)))
        completions = [completion[:most] for completion in completions]
        if different > 1 == len(set(map(tuple, completions))):
            counts["rows dropped: completions identical once cut"] += 1
            return None
        counts["rows with a completion cut on the right (its end of sequence goes too)"] += 1
    room = limits.max_length - max(map(len, completions))
    if len(prompt) > room:
        counts["rows with the prompt cut on the left"] += 1
        prompt = last_of(prompt, start, room)
    return tuple(prompt), tuple(map(tuple, completions))


def last_of(prompt: list[int], start: int, room: int) -> list[int]:
    """Return the last `room` tokens, with the first `start` of the prompt among them."""
    if len(prompt) <= room:
        return prompt
    kept = start if start < room else 0
    return prompt[:kept] + prompt[len(prompt) - (room - kept) :]


def is_stump(kept: int, length: int) -> bool:
    """Whether a prompt that was cut keeps so little that the row is another one."""
    return kept < length and (kept < STUMP or kept < length / 4)
