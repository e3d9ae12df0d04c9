"""Select and rename the columns of a row, by their aliases and by the options."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from exo.data.errors import Row

# Other names of a column, the likeliest first. A format that has such a name among its keys reads it under that name.
ALIASES = {
    "prompt": ("instruction", "question", "query", "problem", "user_prompt", "input", "post", "context"),
    "chosen": ("chosen_response",),
    "rejected": ("rejected_response",),
    "completion": ("response", "output", "answer", "solution", "target", "summary"),
    "conversations": ("conversation", "dialog", "dialogue"),
    "system": ("system_prompt", "system_message"),
    "ref_chosen_logps": ("reference_chosen_logps",),
    "ref_rejected_logps": ("reference_rejected_logps",),
}
CHAT_NAMES = ("instruction", "question", "query", "problem", "user_prompt", "input")  # columns of user turns
_INPUTS = ("input", "context")  # columns appended to an instruction or a question
REFERENCE = tuple(
    "ref_logps ref_chosen_logps ref_rejected_logps reference_chosen_logps reference_rejected_logps".split()
)
REPLACED = " (replaced)"


class ColumnOptions(NamedTuple):
    """The options --columns (with --system_column) and --ignore_columns."""

    renamed: Mapping[str, str]  # {name of the format: column of the data}
    ignored: frozenset[str]
    ignore_all: bool

    def apply(self, row: Row) -> Row:
        """Return the row without nulls and ignored columns, and with renamed columns.

        A column whose name another column takes gets the suffix REPLACED.
        """
        if not self.renamed and not self.ignored:
            return {name: value for name, value in row.items() if value is not None} if None in row.values() else row
        present = {name: column for name, column in self.renamed.items() if column in row}  # other files may have more
        removed = self.ignored.union(present, present.values())
        columns = {name: value for name, value in row.items() if value is not None and name not in removed}
        for name in present.keys() & row.keys() - self.ignored - {*present.values()}:
            if row[name] is not None:
                columns[name + REPLACED] = row[name]
        return columns | {name: row[column] for name, column in present.items() if row[column] is not None}


def column_options(
    columns: Mapping[str, str] | None, ignored: Iterable[str], system_column: str | None
) -> ColumnOptions:
    """Join the options on columns; ValueError if they name the system prompt twice."""
    renamed = dict(columns or {})
    if system_column is not None:
        if "system" in renamed:
            raise ValueError("--system_column: expected none beside --columns system=...; keep one")
        renamed["system"] = system_column
    ignored = set(ignored)
    return ColumnOptions(renamed, frozenset(ignored - {"all"}), "all" in ignored)


def aliased_columns(columns: Iterable[str]) -> dict[str, str]:
    """Return the columns that are read by an alias: {name of the format: column of the data}."""
    present = set(columns)
    return {
        name: alias
        for name, aliases in ALIASES.items()
        if name not in present and (alias := next((alias for alias in aliases if alias in present), None))
    }


def input_columns(fields: Mapping[str, str], columns: Iterable[str]) -> list[str]:
    """Return the columns appended to the prompt: input and context beside an instruction or a question."""
    if fields.get("prompt") not in CHAT_NAMES:
        return []
    return [name for name in _INPUTS if name in columns and name != fields["prompt"]]
