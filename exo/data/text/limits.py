"""Cut or drop rows that are longer than the limits on prompts and completions."""

from collections import Counter
from dataclasses import dataclass

from exo.data import DataError

STUMP = 32  # tokens; a cut prompt that keeps fewer has lost its meaning


@dataclass(frozen=True)
class Limits:
    """Limits in tokens, and the treatment of rows that exceed them.

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
    start: int,  # tokens at the beginning that stay
    limits: Limits,
    place: str,
    counts: Counter[str],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    """Return the prompt and its completions within the limits; None for a row to drop, which `counts` counts.

    One prompt serves all its completions, so the longest of them decides. DataError if `limits.truncate` is "error".
    """
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
    start = start if start < room else 0
    return prompt[:start] + prompt[len(prompt) - (room - start) :]


def is_stump(remaining: int, length: int) -> bool:
    """Return whether a prompt was cut to fewer than STUMP tokens or a quarter of its length."""
    return remaining < length and (remaining < STUMP or remaining < length / 4)
