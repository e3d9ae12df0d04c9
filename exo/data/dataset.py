"""What `read` returns, and how rows are written between stages."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from exo.data.errors import StrPath, show
from exo.data.formats.messages import Chat, Reply
from exo.data.formats.reading import Tokens


@dataclass(frozen=True)
class Example:
    """One prompt and its completions: those to be compared, samples of a model, the one to imitate, or none."""

    prompt: str  # a Chat if it is made of messages
    completions: tuple[str, ...]  # a Reply if it is a message with more than a role and a text
    rewards: tuple[float, ...] | None  # None if no number was given: of a preference, completions[0] is the chosen
    line: int  # 1-based line, or 1-based row of what has no lines; counted through if there are several files
    tokens: Tokens | None = None  # if the completions were sampled by us
    label: int | None = None  # of a text to be classified, which is the one completion
    ref_logps: tuple[float, ...] | None = None  # a reference's log-prob of each completion, if the data have it
    source: str = field(
        default="", compare=False
    )  # file:line to name in messages; "" if that is the path of the data and `line`

    def place(self, path: StrPath) -> str:
        """Return the file and line to name in messages; `path` is that of the data."""
        return self.source or f"{show(path)}:{self.line}"


@dataclass(frozen=True)
class Dataset:
    """The usable groups of the data, and what became of every other row."""

    examples: list[Example]
    format: str  # in words, to be announced
    rows: int
    skipped: dict[str, int]  # reason -> rows not used
    noted: dict[str, int]  # reason -> rows used but worth a remark
    path: str
    conversational: bool = False  # the prompts are texts, each a user's turn that is meant for a chat template
    unread: tuple[str, ...] = ()  # columns that are not used
    repeated: int = 0  # groups beyond the rows: those that --data_weights takes once more
    merged: int = 0  # rows beyond the groups: further answers to the prompt of one

    def __post_init__(self) -> None:
        counted = len(self.examples) + self.merged + sum(self.skipped.values())
        assert self.rows + self.repeated == counted, "rows unaccounted for"

    def texts(self) -> Iterator[str]:
        return (text for example in self.examples for text in (example.prompt, *example.completions))

    def account(self, later: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return what became of the rows, for run.json; `later` counts what happened to those that were used."""
        facts = {"format": self.format, "rows": self.rows, "skipped": self.skipped, "noted": self.noted}
        facts |= {"repeated": self.repeated} if self.repeated else {}
        facts |= {"merged": self.merged} if self.merged else {}
        facts |= {"columns_not_used": list(self.unread)} if self.unread else {}
        return facts | ({"later": dict(later)} if later else {})

    def summary(self) -> str:
        lines = [f"{show(self.path)}: {self.format}", row_account(self.rows, self.skipped, self.repeated, self.merged)]
        if self.unread:
            lines.append(f"columns not used: {', '.join(show(name) or '(no name)' for name in self.unread)}")
        if self.noted:
            lines.append(f"used, but note: {counts(self.noted)}")
        return "\n".join(lines)


def row_account(rows: int, skipped: Mapping[str, int], repeated: int = 0, merged: int = 0) -> str:
    lost = sum(skipped.values())
    reasons = f" ({counts(skipped)})" if lost else ""
    again = f" + {repeated} used once more, as their weight asks" if repeated else ""
    together = f" (in {rows + repeated - lost - merged} groups)" if merged else ""
    return f"{rows} rows = {rows - lost} used{together} + {lost} skipped{reasons}{again}"


def counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


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
