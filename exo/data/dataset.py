"""Examples, and the account of every row that was read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from exo.cli.paths import StrPath
from exo.data.errors import show
from exo.data.formats.parsed_row import Tokens
from exo.data.formats.transcripts import as_answers, as_chat


@dataclass(frozen=True)
class Example:
    """A prompt and its completions: several to compare, samples of a model, one to imitate, or none."""

    prompt: str  # a Chat if it is made of messages
    completions: tuple[str, ...]  # a Reply if it is a message with more than a role and a text
    rewards: tuple[float, ...] | None  # None for a preference: completions[0] is the chosen one
    line: int  # 1-based line, or row of a source without lines; counted through several files
    tokens: Tokens | None = None  # of completions that `exo.sample` sampled
    label: int | None = None  # of a text to classify, which is the one completion
    ref_logps: tuple[float, ...] | None = None  # a reference's log-prob of each completion, from the data
    source: str = field(default="", compare=False)  # file:line, if it differs from the path of the data and `line`

    def place(self, path: StrPath) -> str:
        """Return the file and line for messages; `path` is the path of the data."""
        return self.source or f"{show(path)}:{self.line}"

    def as_chat(self) -> "Example":
        """Return the example with messages as its prompt: one turn of the user, or the turns of a transcript."""
        return replace(self, prompt=as_chat(self.prompt), completions=as_answers(self.prompt, self.completions))


@dataclass(frozen=True)
class Dataset:
    """The usable examples of the data, and an account of all other rows."""

    examples: list[Example]
    format: str  # in words
    rows: int
    skipped: dict[str, int]  # reason -> rows not used
    noted: dict[str, int]  # remark -> rows used
    path: str
    conversational: bool = False  # the prompts are texts that are meant for a chat template
    unread: tuple[str, ...] = ()  # columns that are not used
    repeated: int = 0  # examples that --data_weights repeats
    merged: int = 0  # rows joined with another one of the same prompt

    def __post_init__(self) -> None:
        counted = len(self.examples) + self.merged + sum(self.skipped.values())
        assert self.rows + self.repeated == counted, "rows unaccounted for"

    def texts(self) -> Iterator[str]:
        """Yield every prompt and completion."""
        return (text for example in self.examples for text in (example.prompt, *example.completions))

    def account(self, later: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the counts of rows for run.json; `later` counts rows cut or dropped after reading."""
        facts = {
            "format": self.format,
            "rows": self.rows,
            "skipped": self.skipped,
            "noted": self.noted,
            "repeated": self.repeated,
            "merged": self.merged,
            "columns_not_used": list(self.unread),
            "later": dict(later or {}),
        }
        return {name: fact for name, fact in facts.items() if fact or name in ("format", "rows", "skipped", "noted")}

    def summary(self) -> str:
        """Return lines with the format and the account of the rows."""
        lines = [f"{show(self.path)}: {self.format}", row_account(self.rows, self.skipped, self.repeated, self.merged)]
        if self.unread:
            lines.append(f"columns not used: {', '.join(show(name) or '(no name)' for name in self.unread)}")
        if self.noted:
            lines.append(f"used, but note: {_counts(self.noted)}")
        return "\n".join(lines)


def row_account(rows: int, skipped: Mapping[str, int], repeated: int = 0, merged: int = 0) -> str:
    """Return the account of the rows as one line."""
    num_skipped = sum(skipped.values())
    reasons = f" ({_counts(skipped)})" if num_skipped else ""
    more = f" + {repeated} repeated by --data_weights" if repeated else ""
    joined = f" (in {rows + repeated - num_skipped - merged} examples)" if merged else ""
    return f"{rows} rows = {rows - num_skipped} used{joined} + {num_skipped} skipped{reasons}{more}"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
