"""Preference and reward data: one strict reader for the files people bring.

`read` turns a `.jsonl` file, a `.json` array or a `.gz` of either into groups, one prompt with its
completions each, and accounts for every row: used, skipped with a reason, or refused with
`file:line: what is wrong`. Three shapes are told apart by their keys: prompt/chosen/rejected,
prompt/completions/rewards (the number of completions may differ by row), and raw Anthropic HH
dialogues. `write_jsonl` and `read_jsonl` carry rows between stages.

Python's `json` takes NaN, 1e999, repeated keys and lone surrogates without a word; here such a row
is malformed. Errors name keys, types and places and never quote a row: data is often private.

Left out: parquet and hub names, chat messages, ShareGPT files, TRL's implicit prompt, tokens.
"""

import gzip
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Purpose = Literal["comparisons", "samples", "texts", "prompts", "labels"]
StrPath = str | os.PathLike[str]
Row = dict[str, Any]
Place = tuple[int, str]  # number of a row, and the file:line to blame

_ACCEPTED = "accepted: a local .jsonl file, a .json array of objects, .gz of either"
_TYPES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
_TYPES |= {int: "a number", float: "a number", type(None): "null"}
# A whole string, or one character that opens, closes or parts; a lone quote opens a string that
# never ends, and stopping there keeps hostile input linear. Bytes will do: no byte of a longer
# UTF-8 character looks like one of these.
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
_TURN = re.compile(r"\n\n(Human|Assistant):")


class DataError(ValueError):
    """Data that cannot be used. One line, `file:line: what is wrong`, that quotes no row."""


class _Malformed(Exception):
    """What is wrong with a row, raised where its place in the file is not known."""


@dataclass(frozen=True)
class Group:
    """One prompt and its completions: those to be compared, samples of a model, the one to imitate, or none."""

    prompt: str
    completions: tuple[str, ...]
    rewards: tuple[float, ...] | None  # None where no number was given: of a preference, completions[0] is the chosen
    line: int  # 1-based line, or 1-based row of a .json array
    tokens: "Tokens | None" = None  # where the completions were sampled by us
    label: int | None = None  # of a text to be classified, which is the one completion


class Tokens(NamedTuple):
    """The completions as the model made them, so that nobody tokenises again."""

    tokenizer: str  # packing.tokenizer_hash of the one that the numbers belong to
    ids: tuple[tuple[int, ...], ...]  # a row a completion; without an end of sequence where it ended for its length
    logprobs: tuple[float, ...]  # sums, at the temperature of the sampling
    finish: tuple[str, ...]  # "eos" or "length"


@dataclass(frozen=True)
class Dataset:
    """The usable groups of one file, and what became of every other row."""

    groups: list[Group]
    format: str  # in words, to be announced
    rows: int
    skipped: dict[str, int]  # reason -> rows not used
    noted: dict[str, int]  # reason -> rows used but worth a remark
    sha256: str  # of the file as it lies on disk: for a .gz, of the compressed bytes
    path: str

    def __post_init__(self) -> None:
        assert self.rows == len(self.groups) + sum(self.skipped.values()), "rows unaccounted for"

    def texts(self) -> Iterator[str]:
        return (text for group in self.groups for text in (group.prompt, *group.completions))

    def account(self, later: Mapping[str, int] | None = None) -> dict[str, Any]:
        """What became of the rows, for run.json; `later` counts what happened to those that were used."""
        return {"format": self.format, "rows": self.rows, "skipped": self.skipped, "noted": self.noted} | (
            {"later": dict(later)} if later else {}
        )

    def summary(self) -> str:
        lines = [f"{_show(self.path)}: {self.format}", _account(self.rows, self.skipped)]
        if self.noted:
            lines.append(f"used, but note: {_counts(self.noted)}")
        return "\n".join(lines)


class _Reading(NamedTuple):
    """What a well-formed row says; where there is a reason to skip it, only that."""

    prompt: str = ""
    completions: tuple[str, ...] = ()
    rewards: tuple[float, ...] | None = None
    later_turns: bool = False
    skip: str = ""
    tokens: Tokens | None = None
    label: int | None = None


class _Shape(NamedTuple):
    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], _Reading]

    def __str__(self) -> str:
        return f"{self.name} ({'/'.join(self.keys)})"


def read(path: StrPath, *, purpose: Purpose = "comparisons", skip_invalid: bool = False) -> Dataset:
    """Read a data file. Its first valid row sets the shape; a row of another shape is malformed.

    `purpose` says what is wanted of a row: completions to compare, a model's samples, one text to imitate, a prompt
    alone, or a text with its class. A malformed row raises `DataError`, or is counted under `skip_invalid`. Rows that
    do not serve the purpose (nothing to compare: an empty completion, a single one, all the same) are skipped and
    counted in any case. A file without a usable row raises, and so does one damaged beyond telling its rows apart.
    """
    groups: list[Group] = []
    skipped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    shape: _Shape | None = None
    first_malformed = ""
    rows = 0
    with _open(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for (number, place), raw in _rows(file, path):
            rows += 1
            try:
                row = _parse(raw)
                candidate = _match(row, shape, _SHAPES[purpose])
                reading = candidate.convert(row)
            except _Malformed as error:
                message = f"{place}: {error}"
                if not skip_invalid:
                    raise DataError(message) from None
                first_malformed = first_malformed or message
                skipped["malformed"] += 1
                continue
            shape = candidate  # only now: a malformed row must not decide for the file
            if reason := reading.skip or _useless(reading, purpose):
                skipped[reason] += 1
                continue
            texts = reading.completions[:1] if purpose == "texts" else reading.completions
            groups.append(Group(reading.prompt, texts, reading.rewards, number, reading.tokens, reading.label))
            noted.update(_remarks(reading) if purpose == "comparisons" else ())
    if shape is None or not groups:
        found = f"no usable row: {_account(rows, skipped)}" if rows else "the file holds no rows"
        hint = f"; first malformed: {first_malformed}" if first_malformed else ""
        raise DataError(f"{_show(path)}: {found}{hint}")
    return Dataset(groups, str(shape), rows, dict(skipped), dict(noted), sha256, os.fspath(path))


def read_jsonl(path: StrPath) -> Iterator[tuple[int, Row]]:
    """(line, row) of any stage's file: as strict about JSON as `read`, but without its shapes."""
    with _open(path) as file:
        for (number, place), raw in _rows(file, path):
            try:
                row = _parse(raw)
            except _Malformed as error:
                raise DataError(f"{place}: {error}") from None
            yield number, row


def write_jsonl(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one object a line; return how many. Not atomic: an error leaves half a file behind."""
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _open(path: StrPath) -> io.BufferedReader:
    try:
        if not Path(path).is_file():
            there = Path(path).exists()
            what = "not a regular file" if there else "no such file (hub names are not read yet)"
            raise DataError(f"{_show(path)}: {what}; {_ACCEPTED}")
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"{_show(path)}: {error.strerror}") from None
    if file.peek(4).startswith(b"PAR1"):
        file.close()
        raise DataError(f"{_show(path)}: parquet is not read yet; {_ACCEPTED}")
    return file


def _rows(file: io.BufferedReader, path: StrPath) -> Iterator[tuple[Place, bytes]]:
    """Place and raw bytes of every row, unparsed, so that a bad row costs no other.

    Lines end at \\n alone: `str.splitlines` would also cut at U+2028, which JSON strings may hold.
    Blank lines are no rows.
    """
    file.seek(0)
    packed = file.peek(2).startswith(b"\x1f\x8b")
    stream = gzip.GzipFile(fileobj=file) if packed else file
    line, started = 0, False
    try:
        for line, raw in enumerate(stream, 1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not started and raw.lstrip().startswith(b"["):
                yield from _elements(raw + stream.read(), line, _show(path))
                return
            if raw.strip():
                started = True
                yield (line, f"{_show(path)}:{line}"), raw
    except (EOFError, zlib.error, gzip.BadGzipFile):
        place = f"{_show(path)}:{line + 1}"
        raise DataError(f"{place}: the gzip data is cut off or damaged") from None


def _elements(body: bytes, line: int, shown: str) -> Iterator[tuple[Place, bytes]]:
    """The elements of a top-level array that begins on `line`, cut apart without parsing them."""
    depth = number = counted = 0
    start = body.index(b"[") + 1
    for token in _STRUCTURE.finditer(body):
        begin, end = token.span()
        char = body[begin : begin + 1]
        if char == b'"' and end - begin == 1:
            break
        depth += (char in b"[{") - (char in b"]}")
        if depth == 0 or (depth == 1 and char == b","):
            raw = body[start:begin].lstrip()
            # "[]" holds no row, but a comma promises one on either side.
            if raw or number or char == b",":
                number += 1
                line += body.count(b"\n", counted, begin - len(raw))
                counted = begin - len(raw)
                yield (number, f"{shown}:{line}: row {number}"), raw
            start = end
        if depth == 0:
            if char == b"]" and not body[end:].strip():
                return
            line += body.count(b"\n", counted, end)
            raise DataError(f"{shown}:{line}: the array ends here, the file does not")
    line += body.count(b"\n", counted)
    raise DataError(f"{shown}:{line}: the array is never closed; is the file cut off?")


def _parse(raw: bytes) -> Row:
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")  # or a cut-off row blames its line break
        row = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _Malformed(f"not UTF-8 (byte {error.start + 1} of the row)") from None
    except UnicodeEncodeError:
        raise _Malformed("a lone surrogate (half a character) in a string") from None
    except json.JSONDecodeError as error:
        raise _Malformed(f"bad JSON: {error.msg} (character {error.pos + 1} of the row)") from None
    except RecursionError:
        raise _Malformed("nested too deeply") from None
    except ValueError:  # CPython does not convert integers of several thousand digits
        raise _Malformed("a number with too many digits") from None
    if not isinstance(row, dict):
        raise _Malformed(f"a row must be an object, not {_TYPES[type(row)]}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _Malformed(f"key {_names([key])} appears twice")
    return row


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Malformed("a number that is not finite (NaN, Infinity or too large)")
    return value


def _match(row: Row, expected: _Shape | None, known: tuple[_Shape, ...]) -> _Shape:
    """The shape that a row's keys tell; it must be that of the rows before. More keys are fine."""
    prompted = "prompt" in row
    fitting = [s for s in known if set(s.keys) <= row.keys() and prompted == ("prompt" in s.keys)]
    most = max((len(s.keys) for s in fitting), default=0)
    fitting = [s for s in fitting if len(s.keys) == most]
    if len(fitting) > 1:
        raise _Malformed("keys of two shapes, chosen/rejected and completions/rewards; keep one")
    if fitting and expected in (None, fitting[0]):
        return fitting[0]
    if expected is None:
        shapes = ", ".join(map(str, known))
        raise _Malformed(f"unknown shape, keys found: {_names(row)}; shapes read: {shapes}")
    missing = [key for key in expected.keys if key not in row]
    what = f"missing {_names(missing)}" if missing else "another shape"
    raise _Malformed(f"{what}; the file began as {expected}")


def _preference(row: Row) -> _Reading:
    prompt, *both = (_string(key, row[key]) for key in ("prompt", "chosen", "rejected"))
    return _Reading(prompt, tuple(both))


def _scored(row: Row) -> _Reading:
    prompt = _string("prompt", row["prompt"])
    completions, rewards = row["completions"], row["rewards"]
    if not (isinstance(completions, list) and isinstance(rewards, list) and completions):
        raise _Malformed("completions and rewards must be arrays, and not empty")
    if len(completions) != len(rewards):
        raise _Malformed(f"{len(completions)} completions but {len(rewards)} rewards")
    return _Reading(
        prompt,
        tuple(_string(f"completions[{i}]", value) for i, value in enumerate(completions)),
        tuple(_number(f"rewards[{i}]", value) for i, value in enumerate(rewards)),
        tokens=_tokens(row, len(completions)),
    )


def _samples(row: Row) -> _Reading:
    if not (isinstance(row["completions"], list) and row["completions"]):
        raise _Malformed("completions must be an array, and not empty")
    texts = tuple(_string(f"completions[{i}]", value) for i, value in enumerate(row["completions"]))
    return _Reading(_string("prompt", row["prompt"]), texts, tokens=_tokens(row, len(texts)))


def _tokens(row: Row, k: int) -> Tokens | None:
    """What our own `sample` adds; a file of someone else's has none of it, and half of it is a mistake."""
    keys = ("tokenizer", "token_ids", "logprobs", "finish")
    if not {"tokenizer", "token_ids"} & row.keys():
        return None
    if missing := [key for key in keys if key not in row]:
        raise _Malformed(f"token ids without {_names(missing)}")
    for key in keys[1:]:
        if not isinstance(row[key], list) or len(row[key]) != k:
            raise _Malformed(f"{key} must be an array of {k}, one for each completion")
    ids = row["token_ids"]
    if not all(isinstance(row, list) and row and all(type(i) is int and i >= 0 for i in row) for row in ids):
        raise _Malformed("token_ids must hold arrays of token numbers, none empty")
    if not set(row["finish"]) <= {"eos", "length"}:
        raise _Malformed("finish must hold 'eos' or 'length'")
    return Tokens(
        _string("tokenizer", row["tokenizer"]),
        tuple(map(tuple, ids)),
        tuple(_number(f"logprobs[{i}]", value) for i, value in enumerate(row["logprobs"])),
        tuple(row["finish"]),
    )


def _text(row: Row) -> _Reading:
    key = "completion" if "completion" in row else "chosen"
    return _Reading(_string("prompt", row["prompt"]), (_string(key, row[key]),))


def _prompt(row: Row) -> _Reading:
    return _Reading(_string("prompt", row["prompt"]))


def _labelled(row: Row) -> _Reading:
    label = row["label"]
    if type(label) is not int or not 0 <= label <= 1:
        raise _Malformed("label must be 0 or 1")
    return _Reading(completions=(_string("text", row["text"]),), label=label)


def _dialogues(row: Row) -> _Reading:
    """Split two whole dialogues where they part: shared turns are the prompt, then the answers.

    Every marker opens a turn, even one that an answer spells out: nothing tells that from a change
    of speaker, and no model should learn to write markers.
    """
    chosen, rejected = _turns("chosen", row), _turns("rejected", row)
    parted = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = next(parted, None)
    if shared is None:
        same = len(chosen) == len(rejected)
        return _Reading(skip="identical dialogues" if same else "one dialogue continues the other")
    (role, good), (other_role, bad) = chosen[shared], rejected[shared]
    if not role == other_role == "Assistant":
        return _Reading(skip="first difference not in an assistant turn")
    prompt = "".join(f"\n\n{role}:{text}" if role else text for role, text in chosen[:shared])
    later_turns = max(len(chosen), len(rejected)) > shared + 1
    return _Reading(f"{prompt}\n\nAssistant:", (good, bad), later_turns=later_turns)


def _turns(key: str, row: Row) -> list[tuple[str, str]]:
    """(role, text) of each turn; text before the first marker, a system prompt say, has role ""."""
    before, *pieces = _TURN.split(_string(key, row[key]))
    roles, texts = pieces[::2], pieces[1::2]
    if "Assistant" not in roles:
        needed = "a row without 'prompt' must hold whole Anthropic HH dialogues"
        raise _Malformed(f"{key} has no turn that starts with \\n\\nAssistant:; {needed}")
    return [("", before)] * bool(before) + list(zip(roles, texts, strict=True))


_PREFERENCES = _Shape("preferences", ("prompt", "chosen", "rejected"), _preference)
_SCORED = _Shape("completions with rewards", ("prompt", "completions", "rewards"), _scored)
_HH = _Shape("Anthropic HH dialogues", ("chosen", "rejected"), _dialogues)
_SAMPLES = _Shape("samples", ("prompt", "completions"), _samples)
_TEXTS = (_Shape("texts", ("prompt", "completion"), _text), _Shape("texts", ("prompt", "chosen"), _text))
_SHAPES: dict[Purpose, tuple[_Shape, ...]] = {
    "comparisons": (_PREFERENCES, _SCORED, _HH),
    "samples": (_SAMPLES, _SCORED),
    "texts": (*_TEXTS, _PREFERENCES, _HH),
    "prompts": (_Shape("prompts", ("prompt",), _prompt), *_TEXTS, _PREFERENCES, _SAMPLES, _SCORED, _HH),
    "labels": (_Shape("labelled texts", ("text", "label"), _labelled),),
}


def _string(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    items = value if isinstance(value, list) else [value]
    chat = any(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)
    hint = "; chat messages are not read yet" if chat else ""
    raise _Malformed(f"{name} must be a string, not {_TYPES[type(value)]}{hint}")


def _number(name: str, value: Any) -> float:
    # To Python a bool is an int; here it is a label that nobody turned into a reward.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Malformed(f"{name} must be a number, not {_TYPES[type(value)]}")
    try:
        return float(value)
    except OverflowError:
        raise _Malformed(f"{name} is too large for a float") from None


def _useless(reading: _Reading, purpose: Purpose) -> str:
    """Why a row does not serve its purpose, or ""."""
    if purpose == "comparisons":
        return _degenerate(reading.completions if reading.tokens is None else tuple(map(str, reading.tokens.ids)))
    if purpose in ("texts", "labels") and not reading.completions[0].strip():
        return "empty text"
    return ""


def _degenerate(completions: tuple[str, ...]) -> str:
    """Why there is nothing to compare, or "". White space counts as a difference: code needs it."""
    if not all(text.strip() for text in completions):
        return "empty completion"
    if len(completions) == 1:
        return "single completion"
    return "identical completions" if len(set(completions)) == 1 else ""


def _remarks(reading: _Reading) -> list[str]:
    found = {
        "later turns dropped": reading.later_turns,
        "all rewards equal": reading.rewards is not None and len(set(reading.rewards)) == 1,
        "some completions repeated": len(set(reading.completions)) < len(reading.completions),
        "empty prompt": not reading.prompt,
    }
    return [reason for reason, true in found.items() if true]


def _account(rows: int, skipped: Mapping[str, int]) -> str:
    lost = sum(skipped.values())
    reasons = f" ({_counts(skipped)})" if lost else ""
    return f"{rows} rows = {rows - lost} used + {lost} skipped{reasons}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


def _names(keys: Iterable[str]) -> str:
    names = [repr(key[:40] + "..." * (len(key) > 40)) for key in keys]
    return ", ".join(names[:8] + [f"{len(names) - 8} more"] * (len(names) > 8)) or "none"


def _show(path: StrPath) -> str:
    shown = os.fspath(path)
    return shown if shown.isprintable() else ascii(shown)
