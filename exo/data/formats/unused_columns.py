"""Check the columns of a file that no format reads.

An unused column is harmless (an id, a score, a model's name), or it could belong to the prompt or change what is
learned (a question, tools, a margin). The second kind is refused, unless --ignore_columns names it. Well-known names
decide first (SUSPECT, _HARMLESS, _PROVENANCE), then the content: a text of several words that differs between rows
could be a prompt, unless it repeats what was read. One word is enough if the format has no column for the prompt. A
long text is refused under harmless names too.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from exo.data.errors import DataError, Row, names
from exo.data.formats.columns import ALIASES, REFERENCE, REPLACED, ColumnOptions
from exo.data.formats.generic import RowFormat
from exo.data.formats.messages import Chat
from exo.data.formats.parsed_row import ParsedRow

_ANSWERS = frozenset(
    "chosen rejected chosen_response rejected_response completion completions response responses output outputs answer "
    "answers solution target summary reference label labels".split()
)
_LOSS_SETTINGS = {"margin", "margins", "weight", "weights", "sample_weight", "loss_mask", "mask"}
_CHANGES_LEARNING = _LOSS_SETTINGS | set(
    "images image videos video audio audios chat_template chat_template_kwargs template functions documents".split()
)
_RENDERED = {"text", "full_text", "formatted_text", "formatted_prompt", "formatted_chat"}
_COULD_BE_PROMPT = set(
    "completions text messages history tools document passage passages article background story premise instructions "
    "prefix suffix choices options candidates hint hints persona scenario concepts".split()
)
SUSPECT = {name for key, aliases in ALIASES.items() for name in (key, *aliases)}
SUSPECT |= {*REFERENCE} | _CHANGES_LEARNING | _COULD_BE_PROMPT
_HARMLESS = set(  # besides _HARMLESS_NAME
    "key sources dataset dataset_name origin generator annotator annotators worker author tags tag categories "
    "domain subset split batch task task_type task_name type kind difficulty quality intent knowledge languages "
    "locale license licence urls link day created created_at updated_at views ranks votes upvotes toxicity toxic "
    "tokenizer finish finish_reason temperature top_p top_k seed log_ratios line sample turn turns meta metadata "
    "info misc extra extra_info annotations".split()
)
# How the data set was made; harmless at any length.
_PROVENANCE = set(
    "labelling_model labelling_prompt raw_labelling_response "
    "generation_model generation_models generations generation_prompt raw_generation_responses new_generations "
    "raw_generation_response original_response original_chosen original_rejected gen_input_configs llama_guard_2 "
    "instruct_reward min_neighbor_distance repeat_count min_similar_uuid quality_explanation token_ids".split()
)
# Dates, links and names have several words without being a text.
_NAMED = re.compile(r"date|time|created|updated|url|link|licen[cs]e|model|author|annotator|worker|version|generator")
_FLAG = re.compile(r"^(is|has|num|n)_")
# Columns that may rate a single completion, and those that may rate a pair.
_VERDICT = re.compile(r"good|bad|desir|feedback|label|like|thumb|prefer|accept|reject|correct|vote|score|rating|reward")
_WINNER = re.compile(r"^(winner|better|best|preferred|preference|label|labels|chosen_index|choice|is_chosen.*)$")
_SENTENCE = 12  # words; names and dates are shorter
# Thai, Lao, Tibetan, Burmese, Khmer, Tai, Chinese, Japanese
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\U0010ffff]")
_HARMLESS_NAME = re.compile(
    r"(^|.*_)(id|ids|idx|index|uuid|hash|sha256|md5|model|models|model_name|source|url|score|scores|rating|ratings|"
    r"reward|rewards|rank|date|time|timestamp|lang|language|category|version|length|len|count|tokens|logprob|logprobs)$"
    r"|^(is|has|num|n)_|^in_gsm8k_train$|^__index|^Unnamed|^$"
)


class Unused(NamedTuple):
    """The unused columns of a row."""

    harmless: tuple[str, ...]  # by name; only their content can be suspect
    others: tuple[str, ...]


class UnusedColumns:
    """Collects the columns of a file that are not read, and checks what they hold."""

    def __init__(self, options: ColumnOptions, purpose: str) -> None:
        self.options, self.purpose = options, purpose
        self.names: dict[str, None] = {}  # an ordered set
        self._texts: dict[str, Any] = {}  # texts that were the same in every row so far
        self._verdicts: dict[str, Any] = {}  # numbers or names that were the same in every row so far
        self._rows = 0

    def classify(self, columns: Iterable[str]) -> Unused:
        """Collect unused columns, and return those that `check` must check."""
        harmless: list[str] = []
        others: list[str] = []
        for column in columns:
            name = column.removesuffix(REPLACED)
            self.names[name] = None
            if self.options.ignore_all or name in _PROVENANCE:
                continue
            if self.purpose in ("prompts", "samples") and (name in _ANSWERS or name in _LOSS_SETTINGS):
                continue
            by_name = name not in SUSPECT and (name in _HARMLESS or _HARMLESS_NAME.match(name))
            (harmless if by_name else others).append(column)
        return Unused(tuple(harmless), tuple(others))

    def check(self, place: str, row: Row, columns: Unused, parsed: ParsedRow, format: RowFormat) -> None:
        """Raise DataError for a column that could belong to the prompt or change what is learned.

        `parsed` is the content that was read. If it has no prompt, any word could be the prompt. A column with a
        harmless name is refused for a long text, or for a verdict on the completions.
        """
        self._rows += 1
        if not any(columns):
            return
        turns = [str(m.content) for m in parsed.prompt.messages] if isinstance(parsed.prompt, Chat) else []
        texts = (parsed.prompt, *turns, *parsed.completions)
        no_prompt = not format.has_prompt or (self.purpose == "comparisons" and not parsed.prompt)
        for kind, is_refused in ((columns.harmless, self._is_text_by_mistake), (columns.others, self._could_be_read)):
            for name in kind:
                self._check_verdict(place, name, row[name], format)
                if is_refused(name, row[name], texts, no_prompt):
                    raise self._refusal(place, name, format)

    def _is_text_by_mistake(self, name: str, value: Any, texts: tuple[str, ...], no_prompt: bool) -> bool:
        """Return whether a column with a harmless name holds a long text, or, without a prompt, a varying one."""
        if not isinstance(value, str) or _words(value) < 3 or _repeats(value, texts):
            return False
        could_be_prompt = no_prompt and not isinstance(texts[0], Chat) and not _NAMED.search(name)
        return _words(value) > _SENTENCE or bool(could_be_prompt or _FLAG.match(name)) and self._varies(name, value)

    def _could_be_read(self, name: str, value: Any, texts: tuple[str, ...], no_prompt: bool) -> bool:
        """Return whether a column could belong to the prompt or change what is learned."""
        if value in ("", [], {}) or _repeats(value, texts) or (name in _RENDERED and _renders(value, texts)):
            return False
        if name.removesuffix(REPLACED) in SUSPECT:
            return True
        return (_is_text(value) or (no_prompt and isinstance(value, str))) and self._varies(name, value)

    def _varies(self, name: str, text: Any) -> bool:
        """Return whether a text differs from that of an earlier row."""
        return self._texts.setdefault(name, text) != text

    def _check_verdict(self, place: str, name: str, value: Any, format: RowFormat) -> None:
        """Raise DataError for a column that may rate the completions, if its values differ."""
        single = self.purpose == "texts" and "completion" in format.keys and _VERDICT.search(name)
        pair = {"chosen", "rejected"} <= {*format.keys} and _WINNER.match(name)
        if not (single and value in (-1, 0, 1) or pair):
            return
        if self._verdicts.setdefault(name, value) != value:
            fix = f"--columns keep={name} learns the true ones, " if single else "sort each pair first, or "
            raise DataError(
                f"{place}: column {names([name])} of {format} may say which completions are good, and is not read; "
                f"{fix}--ignore_columns {name} leaves it out"
            )

    def end(self, place: str, format: RowFormat) -> None:
        """Raise DataError for a text in the only row of a file, because it may be a constant or not."""
        if self._rows == 1 and self._texts:
            raise self._refusal(place, next(iter(self._texts)), format)

    def _refusal(self, place: str, column: str, format: RowFormat) -> DataError:
        name = column.removesuffix(REPLACED)
        if name == column:
            reason = f"of {format} {_reason(name, format)}"
        else:
            reason = f"is not read, because {names([self.options.renamed[name]])} takes its place"
        return DataError(f"{place}: column {names([name])} {reason}; --ignore_columns {name} leaves it out")


def _reason(name: str, format: RowFormat) -> str:
    """Return why an unused column is refused, and what to do if it belongs to the prompt."""
    if name in _CHANGES_LEARNING:
        return "would change what is learned, and is not read"
    if name in REFERENCE:
        return "holds log-probs that cannot be used here: they are of other tokens than this format's completions"
    if name in ALIASES["completion"]:
        return "could be the completion"
    if name in ALIASES:
        return "is no part of this format, and could belong to the prompt or the answer"
    if format.columns_hint:
        return f"could be the prompt; --columns {format.columns_hint.format(name)} reads it as such"
    system = f", or read it with --system_column {name}" if format.is_turn else ""
    place = "the prompt" if format.has_prompt else names(format.keys)
    return f"could belong to the prompt; move its text into {place}{system}"


def _is_text(value: Any) -> bool:
    """Return whether a value holds a text or an image, not only numbers, ids, words or links."""
    if isinstance(value, str):
        return _words(value) > 2
    if isinstance(value, dict):
        return "bytes" in value or any(map(_is_text, value.values()))
    return isinstance(value, list) and any(map(_is_text, value))


def _words(text: str) -> int:
    """Return the number of words of a text; in a script without blanks between words, two characters count as one."""
    return len(text.split()) + (0 if text.isascii() else len(_UNSPACED.findall(text)) // 2)


def _repeats(value: Any, texts: tuple[str, ...]) -> bool:
    """Return whether an unused value repeats the prompt, a turn of it or an answer."""
    if isinstance(value, str):
        text = value.strip()
        return any(text == t.strip() or (text in t and _words(text) > 2) for t in texts)
    if isinstance(value, list) and value:
        items = [item.get("content", item.get("value")) if isinstance(item, dict) else item for item in value]
        return all(isinstance(text, str) and _repeats(text, texts) for text in items)
    return False


def _renders(value: Any, texts: tuple[str, ...]) -> bool:
    """Return whether a text contains every line of the row and more, as Alpaca's `text` does."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return isinstance(value, str) and len(value) > sum(map(len, lines)) and all(line in value for line in lines)
