"""Reading one file, directory or hub name: every row is used, skipped with a reason, or refused with its place."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from exo.cli.errors import ConfigError
from exo.cli.paths import split_paths
from exo.cli.spelling import suggestion
from exo.data import mixing
from exo.data.dataset import Dataset, Example, row_account
from exo.data.errors import DataError, Malformed, StrPath, names, show
from exo.data.formats.columns import REFERENCE, Choice, LeftOver, choice, texts_of
from exo.data.formats.common import Purpose, Shape, referenced
from exo.data.formats.matching import NAMES, Plan, match, plan
from exo.data.formats.messages import Chat
from exo.data.formats.prompts import BESIDE, with_context
from exo.data.formats.reading import SETTINGS, TOKENS, Reading
from exo.data.formats.transcripts import answers_to
from exo.data.formats.trees import group_rows
from exo.data.sources import files


def read(
    path: StrPath,
    *,
    purpose: Purpose = "comparisons",
    skip_invalid: bool = False,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    system_column: str | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    columns_required: bool = True,
) -> Dataset:
    """Read data. The first valid row sets the shape; a row of another shape is malformed.

    `path` is a file, a directory of files, a hub name, or several of these joined by commas. `purpose` says what is
    wanted of a row: completions to compare, a model's samples, one text to imitate, a prompt alone, or a text with its
    class. A malformed row raises `DataError`, or is counted under `skip_invalid`. Rows that do not serve the purpose
    (nothing to compare: an empty completion, a single one, all the same) are skipped and counted in any case. Data
    without a usable row raises, and so does what is damaged beyond telling its rows apart.

    `columns` gives columns other names, {"prompt": "question"}; a name that no shape reads raises ValueError. A column
    that no file has is an error, unless `columns_required` is False: then the file has its own names. `system_column`
    is that of the system prompt; `ignore_columns` are left out ("all": all that no format reads). A column that is not
    read and could belong to the prompt, or change what is learned, raises unless it is ignored. `weights` are the
    shares of several paths in an epoch, drawn by `seed`: see mixing.
    """
    try:
        parts = split_paths(path)
    except ConfigError as error:
        raise DataError(str(error)) from None
    if weights is not None and len(weights) != len(parts):
        raise DataError(
            f"{show(path)}: expected one weight for each of the {len(parts)} data files; got {len(weights)}"
        )
    for name in columns or ():
        if name not in NAMES:
            near = suggestion(name, NAMES, otherwise="docs/data.md lists them")
            raise ValueError(f"--columns {name}=...: expected a name that is read{near}")
    chosen = choice(columns, ignore_columns, system_column)
    missing = set(chosen.renamed.values())
    datasets = []
    for part in parts:
        reader = _Reader(part, purpose, chosen, skip_invalid)
        datasets.append(reader.read())
        missing -= reader.met
    if missing and columns_required:
        raise DataError(f"{show(path)}: no column {names(sorted(missing))}, which --columns or --system_column names")
    return datasets[0] if len(datasets) == 1 else mixing.mixed(datasets, os.fspath(path), weights, seed)


@dataclass
class _Reader:
    """What is known of a path while its rows are read."""

    path: StrPath
    purpose: Purpose
    chosen: Choice
    skip_invalid: bool
    met: set[str] = field(default_factory=set)  # columns that --columns names, once they are met
    nulls: list[str] = field(default_factory=list)  # columns of the last row that are null
    shape: Shape | None = None  # of the file, in the names of its columns
    chat: bool | None = None  # whether its prompts are messages; None until a row has told
    origin: str = ""  # what the rows were put together from
    made: bool = False  # some were made messages of a question and what stands beside it
    plans: dict[tuple[str, ...], Plan] = field(default_factory=dict)
    doubtful: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    def read(self) -> Dataset:
        source = files.open_source(self.path)
        self.left_over = LeftOver(self.chosen, self.purpose)
        examples: list[Example] = []
        skipped: Counter[str] = Counter()
        noted: Counter[str] = Counter()
        first_malformed = place = ""
        own = f"{show(self.path)}:"
        rows = merged = 0
        with closing(source.rows) as stream:
            together, self.origin = group_rows(self._renamed(stream), self.purpose)
            for (number, place), (row, count) in together:
                rows += count
                try:
                    reading = Reading(skip=row) if isinstance(row, str) else self._understood(row, place)
                except (Malformed, RecursionError) as error:
                    what = error if isinstance(error, Malformed) else "nested too deeply"
                    message = f"{place}: {what}"
                    if nulls := [name for name in self.nulls if repr(name) in message]:
                        message += f" (null: {names(nulls)})"
                    if unknown := set(self.chosen.renamed.values()) - self.met:
                        message += f"; no column {names(sorted(unknown))}, which --columns or --system_column names"
                    if not self.skip_invalid:
                        raise DataError(message) from None
                    first_malformed = first_malformed or message
                    skipped["malformed"] += count
                    continue
                if reason := reading.skip or _useless(reading, self.purpose):
                    skipped[reason] += count
                    continue
                merged += count - 1
                examples.append(_group(reading, number, "" if place == f"{own}{number}" else place))
                noted.update(_remarks(reading, self.purpose))
        if self.shape is None or not examples:
            problem = f"no usable row: {row_account(rows, skipped)}" if rows else "the file holds no rows"
            hint = f"; first malformed: {first_malformed}" if first_malformed else ""
            raise DataError(f"{show(self.path)}: {problem}{hint}")
        self.left_over.end(place, self.shape)
        if self.made:
            examples = mixing.as_chats(examples)
        chat = "chat messages" if self.chat or self.made else ""
        words = ", ".join(
            filter(None, (str(self.shape), chat, self.origin and f"from {self.origin}", source.container))
        )
        turns = not chat and (self.shape.chat or bool(self.origin))
        unread = tuple(self.left_over.unread)
        path = os.fspath(self.path)
        return Dataset(examples, words, rows, dict(skipped), dict(noted), path, turns, unread, merged=merged)

    def _renamed(self, stream: files.Rows) -> Iterator[tuple[files.Place, dict[str, Any] | Malformed]]:
        wanted = set(self.chosen.renamed.values())
        for place, row in stream:
            if isinstance(row, Malformed):
                yield place, row
                continue
            self.nulls = [name for name, value in row.items() if value is None] if None in row.values() else []
            if wanted - self.met:
                self.met |= wanted & row.keys()
            if self.chosen.ignored:
                self.left_over.unread |= dict.fromkeys(self.chosen.ignored & row.keys())
            yield place, self.chosen.applied(row)

    def _understood(self, row: dict[str, Any] | Malformed, place: str) -> Reading:
        """Return what a row says. Only a valid row decides what the file is known to hold."""
        if isinstance(row, Malformed):
            raise row
        if self.chosen.renamed.get("keep") and not _is_kept(row.pop("keep", None), self.chosen.renamed["keep"]):
            return Reading(skip=f"{self.chosen.renamed['keep']} is false")
        present = tuple(row)
        planned = self.plans.get(present)
        if planned is None:
            planned = self.plans[present] = plan(present, self.purpose)
        whole = planned.normalized(row)
        shape = match(whole, planned, self.shape, self.purpose)
        reading = shape.convert(whole)
        if not reading.skip:
            reading = self._completed(reading, whole, shape, planned.beside)
        self.shape = shape
        self._check_columns(place, row, whole, present, planned, shape, reading)
        return reading

    def _completed(self, reading: Reading, row: dict[str, Any], shape: Shape, beside: bool) -> Reading:
        """Return the reading with what stands beside its prompt and completions; note whether it is of messages."""
        if shape.reference and self.purpose in ("comparisons", "samples"):
            reading = referenced(reading, row)
        if self.purpose == "texts":
            reading = _to_imitate(reading)
        chat = isinstance(reading.prompt, Chat)
        prompt = reading.prompt
        if beside:
            prompt = with_context(prompt, row, own=shape.keys, turn=shape.turn)
        if shape.chat or self.origin:  # a question, or with earlier turns a chat: the same file has both
            self.made = self.made or isinstance(prompt, Chat)
            return _with_prompt(reading, prompt)
        if self.chat is not None and chat != self.chat:
            raise Malformed(
                "chat messages, and the file began with texts"
                if chat
                else "texts, and the file began with chat messages"
            )
        self.chat = chat
        self.made = self.made or (not chat and isinstance(prompt, Chat))
        return _with_prompt(reading, prompt)

    def _check_columns(
        self, place: str, row: dict[str, Any], whole: dict[str, Any], present: tuple[str, ...], planned: Plan,
        shape: Shape, reading: Reading,
    ) -> None:  # fmt: skip
        doubtful = self.doubtful.get(present)
        if doubtful is None:
            taken = {*shape.keys, *shape.unused, *planned.more}
            taken |= {planned.fields.get(name, name) for name in self._beside(shape)}
            left = [name for name in present if name not in taken]
            doubtful = self.doubtful[present] = self.left_over.doubtful(left)
            self.left_over.unread |= dict.fromkeys(name for name in shape.unused if name in whole)
        if reading.skip:  # nothing was read that a column could repeat
            return
        named, others = doubtful
        self.left_over.rows += 1
        if named or others:
            texts = texts_of(reading.prompt, reading.completions)
            self.left_over.check_names(place, row, named, texts, shape)
            self.left_over.check(place, row, others, texts, shape)

    def _beside(self, shape: Shape) -> Iterable[str]:
        """Columns that are read beside those of the shape."""
        if shape.reference and self.purpose in ("comparisons", "samples"):
            return (*BESIDE, *REFERENCE, *TOKENS, *SETTINGS)
        return (*BESIDE, *REFERENCE) if self.purpose not in ("comparisons", "samples") else BESIDE


def _with_prompt(reading: Reading, prompt: str) -> Reading:
    """Return the reading with another prompt; if that makes a transcript a chat, its completions become messages."""
    if not isinstance(prompt, Chat):
        return reading
    return reading._replace(prompt=prompt, completions=answers_to(reading.prompt, reading.completions))


def _to_imitate(reading: Reading) -> Reading:
    """Return a reading with the one completion to imitate: of several the chosen, or the one of the highest reward."""
    rewards = reading.rewards or (0.0,)
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return reading._replace(completions=(reading.completions[best],), rewards=None, tokens=None)


def _is_kept(value: Any, column: str) -> bool:
    if value not in (0, 1):
        raise Malformed(f"{column} must be true or false")
    return bool(value)


def _group(reading: Reading, number: int, source: str) -> Example:
    return Example(
        reading.prompt, reading.completions, reading.rewards, number, reading.tokens, reading.label, reading.ref_logps,
        source,
    )  # fmt: skip


def _useless(reading: Reading, purpose: Purpose) -> str:
    """Return why a row does not serve its purpose, or ""."""
    if purpose == "comparisons":
        return _degenerate(reading.completions if reading.tokens is None else tuple(map(str, reading.tokens.ids)))
    if purpose in ("texts", "labels") and not reading.completions[0].strip():
        return "empty text"
    return ""


def _degenerate(completions: tuple[str, ...]) -> str:
    """Return why there is nothing to compare, or "". White space counts as a difference: code needs it."""
    if not all(text.strip() for text in completions):
        return "empty completion"
    if len(completions) == 1:
        return "single completion"
    return "identical completions" if len(set(completions)) == 1 else ""


def _remarks(reading: Reading, purpose: Purpose) -> list[str]:
    """Return what is worth a remark about a row that is used."""
    prompt, texts = reading.prompt, reading.completions
    remarks = []
    if reading.later_turns and purpose in ("comparisons", "texts"):
        remarks.append("later turns dropped")
    if purpose == "comparisons":
        if reading.rewards is not None and len(set(reading.rewards)) == 1:
            remarks.append("all rewards equal")
        if len(set(texts)) < len(texts):
            remarks.append("some completions repeated")
    if not prompt and purpose in ("comparisons", "prompts"):
        remarks.append("empty prompt")
    if len(prompt) > 8 and texts and texts[0].startswith(prompt) and all(text.startswith(prompt) for text in texts):
        remarks.append("every completion begins with its prompt")
    return remarks
