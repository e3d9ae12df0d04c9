"""Which shape a row has: the one that most of its columns fit; and what to say if there is none."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from exo.data.errors import Malformed, names
from exo.data.formats.columns import ALIASES, REFERENCE, fields_of, joined_with
from exo.data.formats.common import (
    ANSWERS,
    LABELLED,
    LAST_TURNS,
    OPENINGS,
    PARTED,
    PREFERENCES,
    PROMPTS,
    RANKED,
    RATED,
    SAMPLES,
    SCORED,
    TEXT,
    UNCHOSEN,
    UNPAIRED,
    WITHOUT_REWARDS,
    Purpose,
    Shape,
)
from exo.data.formats.messages import decoded
from exo.data.formats.prompts import BESIDE, append_input
from exo.data.formats.public import COMPARED
from exo.data.formats.reading import TOKENS
from exo.data.formats.trees import KEYS

Row = dict[str, Any]

_COMPARED = (PREFERENCES, SCORED, *PARTED, RATED, RANKED, *COMPARED)
SHAPES: dict[Purpose, tuple[Shape, ...]] = {
    "comparisons": (*_COMPARED, UNPAIRED, WITHOUT_REWARDS),
    "samples": (SAMPLES, SCORED),
    "texts": (*ANSWERS, *_COMPARED, *LAST_TURNS, TEXT, UNPAIRED, UNCHOSEN),
    "prompts": (PROMPTS, *ANSWERS, SAMPLES, *_COMPARED, *OPENINGS),
    "labels": (LABELLED,),
}
_OF_NO_USE = (UNPAIRED, WITHOUT_REWARDS, UNCHOSEN, TEXT)
_TAKEN_BY: dict[Purpose, str] = {
    "comparisons": "align and reward take",
    "texts": "sft takes",
    "labels": "reward --labels takes",
}
# What --columns may give to a column.
NAMES = {key for shapes in SHAPES.values() for shape in shapes for key in shape.keys}
NAMES |= {name for key, others in ALIASES.items() for name in (key, *others)} | {*BESIDE, *REFERENCE, *TOKENS, *KEYS}
NAMES |= {"keep", "temperature", "max_new_tokens", "top_p"}
_DECODED = ("prompt", "chosen", "rejected", "completion")


class Plan(NamedTuple):
    """What the columns of a row can mean. Rows of the same columns share one."""

    fields: Mapping[str, str]  # columns that are read under another name
    more: tuple[str, ...]  # columns that follow the prompt
    beside: bool  # whether there is a system prompt, a history or tools
    shapes: tuple[Shape, ...]  # whose columns are there, those with most first
    named: tuple[Shape, ...]  # the same in the names of the columns

    def normalized(self, row: Row) -> Row:
        """Return the row with its columns under the names that shapes have, and messages that are JSON as lists."""
        whole = row
        if self.fields:
            whole = row | {name: row[column] for name, column in self.fields.items()}
        for name in _DECODED:
            value = whole.get(name)
            if isinstance(value, str) and value[:1] in "[ \n\t\r" and (messages := decoded(name, value)) is not value:
                whole = whole | {name: messages}
        for name in self.more:
            whole = whole | {"prompt": append_input(whole["prompt"], name, row[name])}
        return whole


def plan(columns: tuple[str, ...], purpose: Purpose) -> Plan:
    fields = fields_of(columns)
    present = {*columns, *fields}
    shapes = [shape for shape in SHAPES[purpose] if present.issuperset(shape.keys)]
    shapes.sort(key=lambda shape: -len(shape.keys))
    named = tuple(shape.named(fields) for shape in shapes)
    beside = not present.isdisjoint(BESIDE)
    return Plan(fields, tuple(joined_with(fields, columns)), beside, tuple(shapes), named)


def match(row: Row, planned: Plan, expected: Shape | None, purpose: Purpose) -> Shape:
    """Return the shape of a row, in the names of its columns; it must be that of the rows before."""
    fitting: list[int] = []
    for i, shape in enumerate(planned.shapes):
        if fitting and len(shape.keys) < len(planned.shapes[fitting[0]].keys):
            break
        if shape.fits(row):
            fitting.append(i)
    if len(fitting) > 1:  # a column by its own name before one by another, and a prompt before none
        own = [i for i in fitting if planned.shapes[i].keys == planned.named[i].keys] or fitting
        fitting = [i for i in own if "prompt" in planned.shapes[i].keys] or own
    if len(fitting) > 1:
        keys = ["/".join(planned.named[i].keys) for i in fitting[:2]]
        raise Malformed(f"keys of two shapes, {' and '.join(keys)}; keep one")
    matched = planned.named[fitting[0]] if fitting else None
    if matched is not None and (expected is None or (matched.name, matched.keys) == (expected.name, expected.keys)):
        return matched
    if expected is None:
        raise Malformed(_unknown(row, planned, purpose))
    missing = [key for key in expected.keys if key not in row]
    what = f"missing {names(missing)}" if missing else "another shape"
    raise Malformed(f"{what}; the file began as {expected}")


def _unknown(row: Row, planned: Plan, purpose: Purpose) -> str:
    """Return what is wrong with a row of no shape: the nearest one, and what it lacks; or who takes such rows."""
    columns = tuple(name for name in row if name not in planned.fields)
    problem = f"unknown shape, keys found: {names(columns)}"
    present = {*columns, *planned.fields}
    shapes = [shape for shape in SHAPES[purpose] if shape not in _OF_NO_USE]
    nearest = max(shapes, key=lambda shape: (len(present & {*shape.keys}), -len(shape.keys)))
    missing = [key for key in nearest.keys if key not in present]
    if len(missing) > 1 or len(nearest.keys) < 3:
        for other, takes in _TAKEN_BY.items():
            elsewhere = plan(columns, other)
            fitting = [shape for shape in elsewhere.shapes if shape.fits(row) and shape not in _OF_NO_USE]
            if other != purpose and fitting:
                this = fitting[0].named(elsewhere.fields)
                return f"{problem}; this is {this}, which {takes}; expected {_wanted(purpose)}"
    if len(missing) == len(nearest.keys):
        nearest = shapes[0]
        missing = [*nearest.keys]
    given = ",".join(f"{key}=COLUMN" for key in missing)
    return f"{problem}; nearest is {nearest.named(planned.fields)}, missing {names(missing)}; set --columns {given}"


def _wanted(purpose: Purpose) -> str:
    return f"{SHAPES[purpose][0]} or another of docs/data.md"
