"""The content of a row of any format, and the token ids that `exo.sample` adds to it."""

from typing import NamedTuple

from exo.data.errors import Malformed, Row, names, number, string

TOKENS = ("tokenizer", "token_ids", "logprobs", "finish")  # columns
SETTINGS = ("temperature", "max_new_tokens", "top_p")  # optional columns that `exo.sample` adds


class Tokens(NamedTuple):
    """The token ids of sampled completions, so that they are not tokenized again."""

    tokenizer: str  # tokenize.tokenizer_hash of the one that the ids belong to
    ids: tuple[tuple[int, ...], ...]  # a tuple per completion; one of finish "length" has no end of sequence
    logprobs: tuple[float, ...]  # sums, at the temperature of the sampling
    finish: tuple[str, ...]  # "eos" or "length"
    temperature: float | None = None  # None if the row does not have it
    max_new_tokens: int | None = None
    top_p: float | None = None


class ParsedRow(NamedTuple):
    """The content of a valid row, or the reason to skip it."""

    prompt: str = ""
    completions: tuple[str, ...] = ()
    rewards: tuple[float, ...] | None = None
    later_turns: bool = False  # turns after the answer were dropped
    skip: str = ""
    tokens: Tokens | None = None
    label: int | None = None
    ref_logps: tuple[float, ...] | None = None


def parse_tokens(row: Row, k: int) -> Tokens | None:
    """Return the token ids of the `k` completions of a row; None if it has none."""
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
    if not all(reason in ("eos", "length") for reason in row["finish"]):
        raise Malformed("finish must hold 'eos' or 'length'")
    max_new_tokens = row.get("max_new_tokens")
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise Malformed("max_new_tokens must be an integer of at least 1")
    settings = {name: None if row.get(name) is None else number(name, row[name]) for name in ("temperature", "top_p")}
    for name, value in settings.items():
        if value is not None and value <= 0:
            raise Malformed(f"{name} must be above 0")
    return Tokens(
        string("tokenizer", row["tokenizer"]),
        tuple(map(tuple, ids)),
        tuple(number(f"logprobs[{i}]", value) for i, value in enumerate(row["logprobs"])),
        tuple(row["finish"]),
        max_new_tokens=max_new_tokens,
        **settings,
    )
