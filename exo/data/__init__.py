"""Preference and reward data: one strict reader for the files people bring.

`read` turns what a path or a hub name stands for (rows.py, tables.py) into groups, one prompt with its completions
each, whatever keys its rows have (shapes.py), and accounts for every row: used, skipped with a reason, or refused with
`file:line: what is wrong`. A prompt of chat messages is a `Chat` (messages.py), which exo.chat renders. `write_jsonl`
and `read_jsonl` carry rows between stages.

Errors name keys, types and places and never quote a row (errors.py): data is often private.

Left out: tokens, and mixing several files.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from exo.data import rows as containers
from exo.data.errors import DataError, Malformed, StrPath, show
from exo.data.messages import Chat, Message, Reply
from exo.data.reading import Reading, Tokens
from exo.data.shapes import SHAPES, Purpose, Shape, match

__all__ = [
    "Chat", "DataError", "Dataset", "Group", "Message", "Purpose", "Reply", "Tokens", "read", "read_jsonl",
    "read_rows", "write_jsonl",
]  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One prompt and its completions: those to be compared, samples of a model, the one to imitate, or none."""

    prompt: str  # a Chat where it is made of messages
    completions: tuple[str, ...]
    rewards: tuple[float, ...] | None  # None where no number was given: of a preference, completions[0] is the chosen
    line: int  # 1-based line, or 1-based row of what has no lines
    tokens: Tokens | None = None  # where the completions were sampled by us
    label: int | None = None  # of a text to be classified, which is the one completion
    ref_logps: tuple[float, ...] | None = None  # a reference's log-prob of each completion, where the data have it


@dataclass(frozen=True)
class Dataset:
    """The usable groups of one file, and what became of every other row."""

    groups: list[Group]
    format: str  # in words, to be announced
    rows: int
    skipped: dict[str, int]  # reason -> rows not used
    noted: dict[str, int]  # reason -> rows used but worth a remark
    path: str
    conversational: bool = False  # a data set of chats whose prompts are plain texts of a user's turn

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
        lines = [f"{show(self.path)}: {self.format}", _account(self.rows, self.skipped)]
        if self.noted:
            lines.append(f"used, but note: {_counts(self.noted)}")
        return "\n".join(lines)


def read(path: StrPath, *, purpose: Purpose = "comparisons", skip_invalid: bool = False) -> Dataset:
    """Read data. The first valid row sets the shape; a row of another shape is malformed.

    `path` is a file, a directory of files or a hub name. `purpose` says what is wanted of a row: completions to
    compare, a model's samples, one text to imitate, a prompt alone, or a text with its class. A malformed row raises
    `DataError`, or is counted under `skip_invalid`. Rows that do not serve the purpose (nothing to compare: an empty
    completion, a single one, all the same) are skipped and counted in any case. Data without a usable row raises, and
    so does what is damaged beyond telling its rows apart.
    """
    source = containers.open_source(path)
    groups: list[Group] = []
    skipped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    kind: _Kind | None = None
    first_malformed = ""
    rows = 0
    with closing(source.rows) as stream:
        for (number, place), row in stream:
            rows += 1
            try:
                kind, reading = _understand(row, kind, purpose)
            except Malformed as error:
                message = f"{place}: {error}"
                if not skip_invalid:
                    raise DataError(message) from None
                first_malformed = first_malformed or message
                skipped["malformed"] += 1
                continue
            if reason := reading.skip or _useless(reading, purpose):
                skipped[reason] += 1
                continue
            texts = reading.completions[:1] if purpose == "texts" else reading.completions
            groups.append(
                Group(reading.prompt, texts, reading.rewards, number, reading.tokens, reading.label, reading.ref_logps)
            )
            noted.update(_remarks(reading, purpose))
    if kind is None or not groups:
        found = f"no usable row: {_account(rows, skipped)}" if rows else "the file holds no rows"
        hint = f"; first malformed: {first_malformed}" if first_malformed else ""
        raise DataError(f"{show(path)}: {found}{hint}")
    chat = "chat messages" if kind.chat else ""
    words = ", ".join(filter(None, (str(kind.shape), chat, source.container)))
    return Dataset(groups, words, rows, dict(skipped), dict(noted), os.fspath(path))


@dataclass(frozen=True)
class _Kind:
    """What the rows of a file have in common."""

    shape: Shape
    chat: bool | None  # None until a row has told


def _understand(row: dict[str, Any] | Malformed, kind: _Kind | None, purpose: Purpose) -> tuple[_Kind, Reading]:
    """What a row says, and the kind of row that the file is now known to hold. Only a valid row decides that."""
    if isinstance(row, Malformed):
        raise row
    shape = match(row, kind.shape if kind else None, SHAPES[purpose])
    reading = shape.convert(row)
    before = kind.chat if kind else None
    chat = before if reading.skip else isinstance(reading.prompt, Chat)
    if before is not None and chat != before:
        raise Malformed(
            "chat messages, and the file began with texts" if chat else "texts, and the file began with chat messages"
        )
    return _Kind(shape, chat), reading


def read_jsonl(path: StrPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of any stage's file: as strict about JSON as `read`, but without its shapes."""
    for (number, place), row in containers.json_rows(path):
        if isinstance(row, Malformed):
            raise DataError(f"{place}: {row}")
        yield number, row


def read_rows(path: StrPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place to blame, row) of whatever `read` reads, but without its shapes."""
    with closing(containers.open_source(path).rows) as stream:
        for (_, place), row in stream:
            if isinstance(row, Malformed):
                raise DataError(f"{place}: {row}")
            yield place, row


def write_jsonl(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one object a line; return how many. A Chat is written as its messages and tools, a Reply as its message.

    Not atomic: an error leaves half a file behind.
    """
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            plain = {key: _plain(value) for key, value in row.items()}
            if isinstance(row.get("prompt"), Chat) and row["prompt"].tools:
                plain["tools"] = list(row["prompt"].tools)
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _plain(value: Any) -> Any:
    """Return a Chat as its messages and a Reply as its message; other values as they are."""
    if isinstance(value, Chat):
        return list(value.messages)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.message if isinstance(value, Reply) else value


def _useless(reading: Reading, purpose: Purpose) -> str:
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


def _remarks(reading: Reading, purpose: Purpose) -> list[str]:
    compared = purpose == "comparisons"
    found = {
        "later turns dropped": reading.later_turns and purpose in ("comparisons", "texts"),
        "all rewards equal": compared and reading.rewards is not None and len(set(reading.rewards)) == 1,
        "some completions repeated": compared and len(set(reading.completions)) < len(reading.completions),
        "empty prompt": purpose in ("comparisons", "prompts") and not reading.prompt,
    }
    return [reason for reason, true in found.items() if true]


def _account(rows: int, skipped: Mapping[str, int]) -> str:
    lost = sum(skipped.values())
    reasons = f" ({_counts(skipped)})" if lost else ""
    return f"{rows} rows = {rows - lost} used + {lost} skipped{reasons}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
