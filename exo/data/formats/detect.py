"""Detect the format of a row from its columns, or explain why it has none."""

from collections.abc import Mapping
from typing import NamedTuple

from exo.data.errors import Malformed, Row, names
from exo.data.formats import public_datasets
from exo.data.formats.columns import ALIASES, REFERENCE, aliased_columns, input_columns
from exo.data.formats.generic import FORMATS, Purpose, RowFormat
from exo.data.formats.messages import decoded
from exo.data.formats.multi_row import KEYS
from exo.data.formats.parsed_row import SETTINGS, TOKENS
from exo.data.formats.prompts import BESIDE, append_input

_FORMATS = (*FORMATS, *public_datasets.FORMATS)
_TAKEN_BY: dict[Purpose, str] = {
    "comparisons": "align and reward take",
    "texts": "sft takes",
    "labels": "reward --labels takes",
}
# Names that --columns may give to a column.
NAMES = {key for format in _FORMATS for key in format.keys}
NAMES |= {name for key, aliases in ALIASES.items() for name in (key, *aliases)}
NAMES |= {"keep", *BESIDE, *REFERENCE, *TOKENS, *SETTINGS, *KEYS}
_TEXT = ("text",)  # a format that no error suggests, because such a column may hold anything
_DECODED = ("prompt", "chosen", "rejected", "completion")


class Schema(NamedTuple):
    """The formats that rows with a set of columns may have."""

    fields: Mapping[str, str]  # columns read under another name: {name of the format: column}
    inputs: tuple[str, ...]  # columns that are appended to the prompt
    has_context: bool  # there is a system prompt, a history or tools
    formats: tuple[RowFormat, ...]  # formats whose columns are present, those with most columns first

    def normalize(self, row: Row) -> Row:
        """Return the row with its columns under the names of the formats, and messages written as JSON as lists."""
        row = row | {name: row[column] for name, column in self.fields.items()} if self.fields else row
        for name in _DECODED:
            value = row.get(name)
            if isinstance(value, str) and value[:1] in "[ \n\t\r" and (messages := decoded(name, value)) is not value:
                row = row | {name: messages}
        for name in self.inputs:
            row = row | {"prompt": append_input(row["prompt"], name, row[name])}
        return row


def schema_of(columns: tuple[str, ...], purpose: Purpose) -> Schema:
    fields = aliased_columns(columns)
    present = {*columns, *fields}
    formats = [f for f in _FORMATS if purpose in (*f.purposes, *f.refused) and present.issuperset(f.keys)]
    formats.sort(key=lambda format: -len(format.keys))
    inputs = tuple(input_columns(fields, columns))
    return Schema(fields, inputs, not present.isdisjoint(BESIDE), tuple(formats))


def detect_format(row: Row, schema: Schema, expected: RowFormat | None, purpose: Purpose) -> RowFormat:
    """Return the format of a row, with its columns' names.

    Malformed if it is not `expected`, the format of earlier rows, or if no format or several formats fit.
    """
    fitting: list[RowFormat] = []
    for format in schema.formats:
        if fitting and len(format.keys) < len(fitting[0].keys):
            break
        if format.fits(row):
            fitting.append(format)
    if len(fitting) > 1:  # prefer columns read by their own names, and then formats with a prompt
        direct = [format for format in fitting if not {*format.keys} & schema.fields.keys()] or fitting
        fitting = [format for format in direct if "prompt" in format.keys] or direct
    candidates = [format.with_columns(schema.fields) for format in fitting]
    if len(candidates) > 1:
        keys = ["/".join(format.keys) for format in candidates[:2]]
        raise Malformed(f"keys of two formats, {' and '.join(keys)}; keep one")
    if candidates and (expected is None or (candidates[0].name, candidates[0].keys) == (expected.name, expected.keys)):
        if purpose in candidates[0].refused:
            raise Malformed(candidates[0].refused[purpose])
        return candidates[0]
    if expected is None:
        raise Malformed(_explain_unknown(row, schema, purpose))
    missing = [key for key in expected.keys if key not in row]
    problem = f"missing {names(missing)}" if missing else "another format"
    raise Malformed(f"{problem}; the file began as {expected}")


def _explain_unknown(row: Row, schema: Schema, purpose: Purpose) -> str:
    """Return the error for a row of no format: the nearest format, or the stage that takes such rows."""
    columns = tuple(name for name in row if name not in schema.fields)
    problem = f"unknown format, keys found: {names(columns)}"
    present = {*columns, *schema.fields}
    formats = [format for format in _FORMATS if purpose in format.purposes and format.keys != _TEXT]
    nearest = max(formats, key=lambda format: (len(present & {*format.keys}), -len(format.keys)))
    missing = [key for key in nearest.keys if key not in present]
    if len(missing) > 1 or len(nearest.keys) < 3:
        for possible, takes in _TAKEN_BY.items():
            schema_for = schema_of(columns, possible)
            fitting = [f for f in schema_for.formats if possible in f.purposes and f.keys != _TEXT and f.fits(row)]
            if possible != purpose and fitting:
                actual = fitting[0].with_columns(schema_for.fields)
                return f"{problem}; this is {actual}, which {takes}; expected {formats[0]} or another of docs/data.md"
    if len(missing) == len(nearest.keys):
        nearest = formats[0]
        missing = [*nearest.keys]
    nearest = nearest.with_columns(schema.fields)
    columns_option = ",".join(f"{key}=COLUMN" for key in missing)
    return f"{problem}; nearest is {nearest}, missing {names(missing)}; set --columns {columns_option}"
