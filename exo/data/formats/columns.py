"""The columns of a row: which are read, under which names, and what is left over.

A column that no format reads is harmless (an id, a score, a model's name), or it could belong to the prompt or change
what is learned (a question, tools, a margin). The second kind is refused once, unless --ignore_columns names it. Names
decide where they are known (SUSPECT, _HARMLESS, _ABOUT), else the content does: a text of several words that is not the
same in every row could be a prompt, unless it repeats what was read. If the shape has no column for the prompt, one
word is enough. A harmless name does not excuse a long text. A column whose name --columns gives to another one is left
over like any other.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from exo.data.errors import DataError, names
from exo.data.formats.messages import Chat

if TYPE_CHECKING:
    from exo.data.formats.common import Shape

Row = dict[str, Any]

# Other names of a column, the likeliest first. A format that has one of them among its own keys reads it by that name.
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
CHAT_NAMES = ("instruction", "question", "query", "problem", "user_prompt", "input")  # name a turn of the user
JOINED = ("input", "context")  # follow an instruction or a question
REFERENCE = (
    "ref_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
)
_ANSWERS = frozenset(
    "chosen rejected chosen_response rejected_response completion completions response responses output outputs answer "
    "answers solution target summary reference label labels".split()
)
_NOT_READ = set(
    "images image videos video audio audios margin margins weight weights sample_weight loss_mask mask chat_template "
    "chat_template_kwargs template functions documents".split()
)
_RENDERED = {"text", "full_text", "formatted_text", "formatted_prompt", "formatted_chat"}
_OF_THE_LOSS = {"margin", "margins", "weight", "weights", "sample_weight", "loss_mask", "mask"}
_COULD_BE_PROMPT = set(
    "completions text messages history tools document passage passages article background story premise instructions "
    "prefix suffix choices options candidates hint hints persona scenario concepts".split()
)
SUSPECT = {name for key, others in ALIASES.items() for name in (key, *others)} | _NOT_READ | _COULD_BE_PROMPT
SUSPECT |= {*REFERENCE}
_HARMLESS = set(
    "id ids idx index uuid key hash source sources dataset dataset_name data_source origin model models generator "
    "annotator annotators worker author tags tag category categories domain subset split batch task task_type "
    "task_name type kind difficulty quality intent knowledge lang language languages locale license licence url urls "
    "link date day time timestamp created created_at updated_at version views title_id score scores rating ratings "
    "reward rewards rank ranks votes upvotes toxicity toxic tokenizer token_ids logprobs finish finish_reason "
    "temperature top_p top_k seed log_ratios line sample raw_scores turn turns num_turns meta metadata info misc extra "
    "extra_info annotations max_new_tokens".split()
)
# What makers of data leave about how they were made, however long it is.
_ABOUT = set(
    "labelling_model labelling_prompt raw_labelling_response "
    "generation_model generation_models generations generation_prompt raw_generation_responses new_generations "
    "raw_generation_response original_response original_chosen original_rejected gen_input_configs llama_guard_2 "
    "instruct_reward min_neighbor_distance repeat_count min_similar_uuid quality_explanation token_ids".split()
)
REPLACED = " (replaced)"
# Dates, links and names have several words without being a text.
_NAMED = re.compile(r"date|time|created|updated|url|link|licen[cs]e|model|author|annotator|worker|version|generator")
_FLAG = re.compile(r"^(is|has|num|n)_")
# What may say which completions are good, beside one completion and beside a pair.
_VERDICT = re.compile(r"good|bad|desir|feedback|label|like|thumb|prefer|accept|reject|correct|vote|score|rating|reward")
_WINNER = re.compile(r"^(winner|better|best|preferred|preference|label|labels|chosen_index|choice|is_chosen.*)$")
_SENTENCE = 12  # words: a name or a date is shorter, a text that calls itself a source is not
# Thai, Lao, Tibetan, Burmese, Khmer, Tai, Chinese, Japanese
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\U0010ffff]")
_HARMLESS_NAME = re.compile(
    r"(^|.*_)(id|ids|idx|index|uuid|hash|sha256|md5|model|models|model_name|source|url|score|scores|rating|ratings|"
    r"reward|rewards|rank|date|time|timestamp|lang|language|category|version|length|len|count|tokens|logprob|logprobs)$"
    r"|^(is|has|num|n)_|^in_gsm8k_train$|^__index|^Unnamed|^$"
)


class Choice(NamedTuple):
    """What the options say about columns: --columns, --ignore_columns, --system_column."""

    renamed: Mapping[str, str]  # name as it is read -> name in the data
    ignored: frozenset[str]
    ignore_all: bool

    def applied(self, row: Row) -> Row:
        """Return the row without nulls and ignored columns, with the others under the names they are read by.

        A column that has the name of a renamed one gets the suffix REPLACED.
        """
        if not self.renamed and not self.ignored:
            return {name: value for name, value in row.items() if value is not None} if None in row.values() else row
        moved = {name: column for name, column in self.renamed.items() if column in row}  # or of another file
        gone = self.ignored.union(moved, moved.values())
        kept = {name: value for name, value in row.items() if value is not None and name not in gone}
        for name in moved.keys() & row.keys() - self.ignored - {*moved.values()}:
            if row[name] is not None:
                kept[name + REPLACED] = row[name]
        return kept | {name: row[column] for name, column in moved.items() if row[column] is not None}


def choice(columns: Mapping[str, str] | None, ignored: Iterable[str], system_column: str | None) -> Choice:
    renamed = dict(columns or {})
    if system_column is not None:
        if "system" in renamed:
            raise ValueError("--system_column: expected none beside --columns system=...; keep one")
        renamed["system"] = system_column
    ignored = set(ignored)
    return Choice(renamed, frozenset(ignored - {"all"}), "all" in ignored)


def fields_of(columns: Iterable[str]) -> dict[str, str]:
    """Return the columns that are read under another name: {name as it is read: name in the data}."""
    present = set(columns)
    return {
        name: alias
        for name, others in ALIASES.items()
        if name not in present and (alias := next((other for other in others if other in present), None))
    }


def joined_with(fields: Mapping[str, str], columns: Iterable[str]) -> list[str]:
    """Return the columns that follow the prompt: input and context beside an instruction or a question."""
    if fields.get("prompt") not in CHAT_NAMES:
        return []
    return [name for name in JOINED if name in columns and name != fields["prompt"]]


class LeftOver:
    """The columns of a file that are not read, and what their content says of them."""

    def __init__(self, chosen: Choice, purpose: str) -> None:
        self.chosen, self.purpose = chosen, purpose
        self.unread: dict[str, None] = {}  # in order
        self._same: dict[str, Any] = {}  # a text of several words, the same in every row so far
        self._verdicts: dict[str, Any] = {}  # a number or a name, the same in every row so far
        self.rows = 0

    def doubtful(self, columns: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return those of the left-over columns that are harmless by name, and those that only content can clear."""
        named: list[str] = []
        others: list[str] = []
        for name in columns:
            known = name.removesuffix(REPLACED)
            self.unread[known] = None
            if self.chosen.ignore_all or self._is_harmless(known):
                continue
            by_name = known not in SUSPECT and (known in _HARMLESS or _HARMLESS_NAME.match(known))
            (named if by_name else others).append(name)
        return tuple(named), tuple(others)

    def _is_harmless(self, name: str) -> bool:
        if self.purpose in ("prompts", "samples") and (name in _ANSWERS or name in _OF_THE_LOSS):
            return True
        return name in _ABOUT

    def check_names(
        self, place: str, row: Row, columns: tuple[str, ...], texts: tuple[str, ...], shape: "Shape"
    ) -> None:
        """DataError for a column whose name is harmless and whose content is a text, or a verdict on what is learned.

        Without a prompt, and in a column of flags, three words that vary are a text.
        """
        no_prompt = not isinstance(texts[0], Chat) and self._has_no_prompt(texts, shape)
        for name in columns:
            value = row[name]
            self._check_verdict(place, name, value, shape)
            if not isinstance(value, str) or _words(value) < 3 or _repeats(value, texts):
                continue
            short = (no_prompt and not _NAMED.search(name)) or _FLAG.match(name)
            if _words(value) > _SENTENCE or (short and self._same.setdefault(name, value) != value):
                raise self._refused(place, name, shape)

    def _check_verdict(self, place: str, name: str, value: Any, shape: "Shape") -> None:
        """DataError for a column that may say which completions are good, if its values differ."""
        single = self.purpose == "texts" and "completion" in shape.keys and _VERDICT.search(name)
        pair = {"chosen", "rejected"} <= {*shape.keys} and _WINNER.match(name)
        if not (single and value in (-1, 0, 1) or pair):
            return
        if self._verdicts.setdefault(name, value) != value:
            fix = f"--columns keep={name} learns the true ones, " if single else "sort each pair first, or "
            raise DataError(
                f"{place}: column {names([name])} of {shape} may say which completions are good, and is not read; {fix}"
                f"--ignore_columns {name} leaves it out"
            )

    def _has_no_prompt(self, texts: tuple[str, ...], shape: "Shape") -> bool:
        return not shape.prompt_column or (self.purpose == "comparisons" and not texts[0])

    def check(self, place: str, row: Row, columns: tuple[str, ...], texts: tuple[str, ...], shape: "Shape") -> None:
        """DataError for a column that could belong to the prompt or change what is learned; once for the file.

        `texts` are those that were read, the prompt first. Without a prompt any word could be it.
        """
        no_prompt = self._has_no_prompt(texts, shape)
        for name in columns:
            value = row[name]
            self._check_verdict(place, name, value, shape)
            if value in ("", [], {}) or _repeats(value, texts) or (name in _RENDERED and _renders(value, texts)):
                continue
            if name.removesuffix(REPLACED) in SUSPECT:
                raise self._refused(place, name, shape)
            word = no_prompt and isinstance(value, str)
            if (word or _is_text(value)) and self._same.setdefault(name, value) != value:
                raise self._refused(place, name, shape)

    def end(self, place: str, shape: "Shape") -> None:
        """The same for a text that stands in the only row, where nothing tells it from a constant."""
        if self.rows == 1 and self._same:
            raise self._refused(place, next(iter(self._same)), shape)

    def _refused(self, place: str, name: str, shape: "Shape") -> DataError:
        known = name.removesuffix(REPLACED)
        if known == name:
            what = f"of {shape} {_reason(name, shape)}"
        else:
            what = f"is not read, because {names([self.chosen.renamed[known]])} takes its place"
        return DataError(f"{place}: column {names([known])} {what}; --ignore_columns {known} leaves it out")


def _reason(name: str, shape: "Shape") -> str:
    """Return why a left-over column is refused, and what to do if it belongs to the prompt."""
    if name in _NOT_READ:
        return "would change what is learned, and is not read"
    if name in REFERENCE:
        return "holds log-probs that cannot be used here: they are of other tokens than this format's completions"
    if name in ALIASES["completion"]:
        return "could be what is to be learned"
    if name in ALIASES:
        return "is no part of this format, and could belong to the prompt or the answer"
    if shape.columns:
        return f"could be the prompt; --columns {shape.columns.format(name)} reads it as such"
    system = f", or read it with --system_column {name}" if shape.turn else ""
    place = "the prompt" if shape.prompt_column else names(shape.keys)
    return f"could belong to the prompt; move its text into {place}{system}"


def _is_text(value: Any) -> bool:
    """Return whether a value holds language, or a medium: not a number, an id, a word, a link."""
    if isinstance(value, str):
        return _words(value) > 2
    if isinstance(value, dict):
        return "bytes" in value or any(map(_is_text, value.values()))
    return isinstance(value, list) and any(map(_is_text, value))


def _words(text: str) -> int:
    """Return the number of words of a text; in a script without blanks between words, two characters count as one."""
    return len(text.split()) + (0 if text.isascii() else len(_UNSPACED.findall(text)) // 2)


def _repeats(value: Any, texts: tuple[str, ...]) -> bool:
    """Return whether a left-over value says again what was read: the prompt, a turn of it, an answer."""
    if isinstance(value, str):
        text = value.strip()
        if any(text == other.strip() for other in texts):
            return True
        if _words(text) < 3:
            return False
        return any(text in other for other in texts)
    if isinstance(value, list) and value:
        spoken = [item.get("content", item.get("value")) if isinstance(item, dict) else item for item in value]
        return all(isinstance(text, str) and _repeats(text, texts) for text in spoken)
    return False


def _renders(value: Any, texts: tuple[str, ...]) -> bool:
    """Return whether a text is the whole row once more, as Alpaca's `text` is: every line of it with words around."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return isinstance(value, str) and len(value) > sum(map(len, lines)) and all(line in value for line in lines)


def texts_of(prompt: str, completions: tuple[str, ...]) -> tuple[str, ...]:
    """Return what was read of a row, text by text, for `LeftOver.check`."""
    turns = [str(m.content) for m in prompt.messages] if isinstance(prompt, Chat) else []
    return (prompt, *turns, *completions)
