"""What a row says, once its shape is known; and the tokens that our own `sample` adds to it."""

from typing import Any, NamedTuple

from exo.data.errors import Malformed, names, number, string

TOKENS = ("tokenizer", "token_ids", "logprobs", "finish")  # columns
SETTINGS = ("temperature", "max_new_tokens", "top_p")  # columns that our `sample` adds and others need not


class Tokens(NamedTuple):
    """The completions as the model made them, so that nobody tokenises again."""

    tokenizer: str  # encoding.tokenizer_hash of the one that the numbers belong to
    ids: tuple[tuple[int, ...], ...]  # a row a completion; without an end of sequence where it ended for its length
    logprobs: tuple[float, ...]  # sums, at the temperature of the sampling
    finish: tuple[str, ...]  # "eos" or "length"
    temperature: float | None = None  # how they were drawn; None if the row does not say
    max_new_tokens: int | None = None
    top_p: float | None = None


class Reading(NamedTuple):
    """What a well-formed row says; where there is a reason to skip it, only that."""

    prompt: str = ""
    completions: tuple[str, ...] = ()
    rewards: tuple[float, ...] | None = None
    later_turns: bool = False
    skip: str = ""
    tokens: Tokens | None = None
    label: int | None = None
    ref_logps: tuple[float, ...] | None = None


def tokens_of(row: dict[str, Any], k: int) -> Tokens | None:
    """What our own `sample` adds; a file of someone else's has none of it, and half of it is a mistake."""
    if not {"tokenizer", "token_ids"} & row.keys():
        return None
    if missing := [key for key in TOKENS if key not in row]:
        raise Malformed(f"token ids without {names(missing)}")
    for key in TOKENS[1:]:
        if not isinstance(row[key], list) or len(row[key]) != k:
            raise Malformed(f"{key} must be an array of {k}, one for each completion")
    ids = row["token_ids"]
    if not all(isinstance(row, list) and row and all(type(i) is int and i >= 0 for i in row) for row in ids):
        raise Malformed("token_ids must hold arrays of token numbers, none empty")
    if not all(how in ("eos", "length") for how in row["finish"]):
        raise Malformed("finish must hold 'eos' or 'length'")
    most = row.get("max_new_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise Malformed("max_new_tokens must be an integer of at least 1")
    return Tokens(
        string("tokenizer", row["tokenizer"]),
        tuple(map(tuple, ids)),
        tuple(number(f"logprobs[{i}]", value) for i, value in enumerate(row["logprobs"])),
        tuple(row["finish"]),
        _positive("temperature", row),
        most,
        _positive("top_p", row),
    )


def _positive(name: str, row: dict[str, Any]) -> float | None:
    if row.get(name) is None:
        return None
    value = number(name, row[name])
    if value <= 0:
        raise Malformed(f"{name} must be above 0")
    return value
