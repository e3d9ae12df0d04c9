"""Read files, directories or hub names; every row is used, skipped with a reason, or refused with its place."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from exo.cli.errors import ConfigError
from exo.cli.paths import StrPath, split_paths
from exo.cli.spelling import suggestion
from exo.data import mixing
from exo.data.dataset import Dataset, Example, row_account
from exo.data.errors import DataError, Malformed, Row, names, show
from exo.data.formats.columns import REFERENCE, ColumnOptions, column_options
from exo.data.formats.detect import NAMES, Schema, detect_format, schema_of
from exo.data.formats.generic import Purpose, RowFormat, parse_ref_logps
from exo.data.formats.messages import Chat
from exo.data.formats.multi_row import join_rows
from exo.data.formats.parsed_row import SETTINGS, TOKENS, ParsedRow
from exo.data.formats.prompts import BESIDE, add_context
from exo.data.formats.transcripts import as_answers
from exo.data.formats.unused_columns import Unused, UnusedColumns
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
    """Read data. The first valid row sets the format; a row of another format is malformed.

    `path` is a file, a directory of files, a hub name, or several of these joined by commas. `purpose` selects the
    content of a row: completions to compare, a model's samples, one text to imitate, a prompt, or a text with a label.
    A malformed row raises `DataError`, or is counted if `skip_invalid`. Rows that do not serve the purpose (an empty
    completion, a single one, equal completions) are skipped and counted. Data without a usable row raise, and so does a
    file whose rows cannot be separated.

    `columns` renames columns, {"prompt": "question"}; a name that no format reads raises ValueError. A column that no
    file has is an error, unless `columns_required` is False. `system_column` has the system prompt; `ignore_columns`
    are not read ("all": all that no format reads). Another unused column that could belong to the prompt or change
    what is learned raises. `weights` are the shares of several paths in an epoch, drawn by `seed` (mixing).
    """
    try:
        paths = split_paths(path)
    except ConfigError as error:
        raise DataError(str(error)) from None
    if weights is not None and len(weights) != len(paths):
        raise DataError(
            f"{show(path)}: expected one weight for each of the {len(paths)} data files; got {len(weights)}"
        )
    for name in columns or ():
        if name not in NAMES:
            hint = suggestion(name, NAMES, otherwise="docs/data.md lists them")
            raise ValueError(f"--columns {name}=...: expected a name that is read{hint}")
    options = column_options(columns, ignore_columns, system_column)
    missing = set(options.renamed.values())
    datasets = []
    for part in paths:
        reader = _Reader(part, purpose, options, skip_invalid)
        datasets.append(reader.read())
        missing &= reader.missing
    if missing and columns_required:
        raise DataError(f"{show(path)}: no column {names(sorted(missing))}, which --columns or --system_column names")
    return datasets[0] if len(datasets) == 1 else mixing.mixed(datasets, os.fspath(path), weights, seed)


@dataclass
class _Reader:
    """Reads one path; the fields are set by its rows."""

    path: StrPath
    purpose: Purpose
    options: ColumnOptions
    skip_invalid: bool
    missing: set[str] = field(default_factory=set)  # columns of --columns that no row has so far
    nulls: list[str] = field(default_factory=list)  # columns of the last row that are null
    format: RowFormat | None = None  # of the file, with the names of its columns
    has_messages: bool | None = None  # whether its prompts are messages; None before the first valid row
    joined_format: str = ""  # of joined rows
    made_chats: bool = False  # questions with a context were converted to messages
    schemas: dict[tuple[str, ...], Schema] = field(default_factory=dict)
    unused_columns: dict[tuple[str, ...], Unused] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.missing = set(self.options.renamed.values())
        self.unused = UnusedColumns(self.options, self.purpose)
        self.has_samples = self.purpose in ("comparisons", "samples")

    def read(self) -> Dataset:
        """Read all rows; DataError at the first that is malformed, unless `skip_invalid`."""
        opened = files.open_source(self.path)
        examples: list[Example] = []
        skipped: Counter[str] = Counter()
        noted: Counter[str] = Counter()
        first_malformed = place = ""
        rows = merged = 0
        with closing(opened.rows) as stream:
            joined, self.joined_format = join_rows(self._renamed(stream), self.purpose)
            for (number, place), (row, count) in joined:
                rows += count
                try:
                    parsed = ParsedRow(skip=row) if isinstance(row, str) else self._parse(row, place)
                except (Malformed, RecursionError) as error:
                    message = self._message(error, place)
                    if not self.skip_invalid:
                        raise DataError(message) from None
                    first_malformed = first_malformed or message
                    skipped["malformed"] += count
                    continue
                if reason := parsed.skip or _skip_reason(parsed, self.purpose):
                    skipped[reason] += count
                    continue
                merged += count - 1
                source = "" if place == f"{show(self.path)}:{number}" else place
                examples.append(_example(parsed, number, source))
                noted.update(_notes(parsed, self.purpose))
        if self.format is None or not examples:
            problem = f"no usable row: {row_account(rows, skipped)}" if rows else "the file holds no rows"
            hint = f"; first malformed: {first_malformed}" if first_malformed else ""
            raise DataError(f"{show(self.path)}: {problem}{hint}")
        self.unused.end(place, self.format)
        is_chat = bool(self.has_messages or self.made_chats)
        joined_format = f"from {self.joined_format}" if self.joined_format else ""
        parts = (str(self.format), "chat messages" if is_chat else "", joined_format, opened.container)
        return Dataset(
            [example.as_chat() for example in examples] if self.made_chats else examples,
            ", ".join(filter(None, parts)),
            rows,
            dict(skipped),
            dict(noted),
            os.fspath(self.path),
            conversational=not is_chat and (self.format.is_chat or bool(self.joined_format)),
            unread=tuple(self.unused.names),
            merged=merged,
        )

    def _renamed(self, stream: files.Rows) -> Iterator[tuple[files.Place, Row | Malformed]]:
        """Yield the rows with columns renamed and ignored by the options."""
        for place, row in stream:
            if isinstance(row, Malformed):
                yield place, row
                continue
            self.nulls = [name for name, value in row.items() if value is None] if None in row.values() else []
            if self.missing:
                self.missing -= row.keys()
            if self.options.ignored:
                self.unused.names |= dict.fromkeys(name for name in row if name in self.options.ignored)
            yield place, self.options.apply(row)

    def _message(self, error: Exception, place: str) -> str:
        """Return the message of an error, with the nulls or options that may be its cause."""
        message = f"{place}: {error if isinstance(error, Malformed) else 'nested too deeply'}"
        if nulls := [name for name in self.nulls if repr(name) in message]:
            message += f" (null: {names(nulls)})"
        if self.missing:
            message += f"; no column {names(sorted(self.missing))}, which --columns or --system_column names"
        return message

    def _parse(self, row: Row | Malformed, place: str) -> ParsedRow:
        """Return the content of a row. Only a valid row sets the format of the file."""
        if isinstance(row, Malformed):
            raise row
        if column := self.options.renamed.get("keep"):
            value = row.pop("keep", None)
            if value not in (0, 1):
                raise Malformed(f"{column} must be true or false")
            if not value:
                return ParsedRow(skip=f"{column} is false")
        columns = tuple(row)
        schema = self.schemas.get(columns)
        if schema is None:
            schema = self.schemas[columns] = schema_of(columns, self.purpose)
        normalized = schema.normalize(row)
        format = detect_format(normalized, schema, self.format, self.purpose)
        parse = format.parse_opening if self.purpose == "prompts" and format.parse_opening else format.parse
        parsed = parse(normalized)
        if not parsed.skip:
            parsed = self._add_context(parsed, normalized, format, schema.has_context)
        self.format = format
        if columns not in self.unused_columns:
            self.unused_columns[columns] = self._classify_unused(columns, schema, format)
            self.unused.names |= dict.fromkeys(name for name in format.unused if name in normalized)
        if not parsed.skip:
            self.unused.check(place, row, self.unused_columns[columns], parsed, format)
        return parsed

    def _add_context(self, parsed: ParsedRow, row: Row, format: RowFormat, has_context: bool) -> ParsedRow:
        """Add the reference log-probs and the context of the prompt, and reduce the content to the purpose."""
        if format.has_ref_logps and self.has_samples:
            parsed = parse_ref_logps(parsed, row)
        if self.purpose == "texts":  # imitate one completion: the chosen, or the one of the highest reward
            rewards = parsed.rewards or (0.0,)
            best = max(range(len(rewards)), key=rewards.__getitem__)
            parsed = parsed._replace(completions=(parsed.completions[best],), rewards=None, tokens=None)
        prompt, is_chat = parsed.prompt, isinstance(parsed.prompt, Chat)
        if has_context:
            prompt = add_context(prompt, row, exclude=format.keys, is_turn=format.is_turn)
        if format.is_chat or self.joined_format:  # questions, or chats if there are earlier turns
            self.made_chats = self.made_chats or isinstance(prompt, Chat)
        elif self.has_messages is None or is_chat == self.has_messages:
            self.has_messages = is_chat
            self.made_chats = self.made_chats or (not is_chat and isinstance(prompt, Chat))
        elif is_chat:
            raise Malformed("chat messages, and the file began with texts")
        else:
            raise Malformed("texts, and the file began with chat messages")
        if not isinstance(prompt, Chat):
            return parsed
        return parsed._replace(prompt=prompt, completions=as_answers(parsed.prompt, parsed.completions))

    def _classify_unused(self, columns: tuple[str, ...], schema: Schema, format: RowFormat) -> Unused:
        context: tuple[str, ...] = BESIDE
        if format.has_ref_logps or not self.has_samples:
            context += (*REFERENCE, *TOKENS, *SETTINGS) if self.has_samples else REFERENCE
        read_columns = {*format.keys, *format.unused, *schema.inputs}
        read_columns |= {schema.fields.get(name, name) for name in context}
        return self.unused.classify(name for name in columns if name not in read_columns)


def _example(parsed: ParsedRow, line: int, source: str) -> Example:
    rewards, tokens, ref_logps = parsed.rewards, parsed.tokens, parsed.ref_logps
    return Example(parsed.prompt, parsed.completions, rewards, line, tokens, parsed.label, ref_logps, source)


def _skip_reason(parsed: ParsedRow, purpose: Purpose) -> str:
    """Return why a row does not serve the purpose, or "". White space is a difference, because code needs it."""
    if purpose in ("texts", "labels"):
        return "" if parsed.completions[0].strip() else "empty text"
    if purpose != "comparisons":
        return ""
    completions = parsed.completions if parsed.tokens is None else tuple(map(str, parsed.tokens.ids))
    if not all(text.strip() for text in completions):
        return "empty completion"
    if len(completions) == 1:
        return "single completion"
    return "identical completions" if len(set(completions)) == 1 else ""


def _notes(parsed: ParsedRow, purpose: Purpose) -> list[str]:
    """Return remarks about a row that is used."""
    prompt, texts = parsed.prompt, parsed.completions
    notes = {
        "later turns dropped": parsed.later_turns and purpose in ("comparisons", "texts"),
        "all rewards equal": purpose == "comparisons" and parsed.rewards and len(set(parsed.rewards)) == 1,
        "some completions repeated": purpose == "comparisons" and len(set(texts)) < len(texts),
        "empty prompt": not prompt and purpose in ("comparisons", "prompts"),
        "every completion begins with its prompt": texts
        and len(prompt) > 8
        and all(t.startswith(prompt) for t in texts),
    }
    return [note for note, applies in notes.items() if applies]
