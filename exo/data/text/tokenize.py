"""Tokenize prompts and completions within the limits on their lengths, for every stage.

A prompt has the tokens that sampling uses, and a completion its tokens after the prompt (subwords). The chat template
renders chat messages and ends their completions (chat_template); a plain completion ends with the end of sequence.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from exo.data import Chat, DataError, Dataset, Example
from exo.data.text import chat_template, subwords
from exo.data.text.limits import STUMP, Limits, fit, is_stump, last_of
from exo.data.text.subwords import BoundaryError

NUM_CHECKED = 8  # first rows, whose tokens are compared with those of prompt and completion as one text
_ENDS = re.compile(r"end|eot|eos|eom|^</s>$", re.IGNORECASE)
REFUSED = "rows dropped: the tokenizer or its chat template refuses them"
MAX_STUMPS = 0.05  # share of the rows


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and its completions as token ids; `line` is that of its file."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...] | None
    line: int
    ref_logps: tuple[float, ...] | None = None  # fp64 sums; None before the reference scores them
    label: int | None = None  # of a text, which is `prompt`; the one completion is the end of sequence

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(map(len, self.completions), default=0)


def factor_prefix(example: TokenizedExample) -> TokenizedExample:
    """Move the common prefix of the completions to the prompt; each completion keeps at least one token.

    Shared tokens cancel in the loss and in its gradient, but change sums of log-probs, so an example with reference
    log-probs is returned unchanged.
    """
    answers = example.completions
    longest = max(0, min(map(len, answers)) - 1)
    same = next((i for i in range(longest) if len({answer[i] for answer in answers}) > 1), longest)
    if len(answers) < 2 or not same or example.ref_logps is not None:
        return example
    return replace(example, prompt=example.prompt + answers[0][:same], completions=tuple(a[same:] for a in answers))


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of the vocabulary and the end of sequence, 16 hex digits.

    Hashing a large vocabulary takes most of a second, so the tokenizer caches it until tokens are added.
    """
    version = len(tokenizer), tokenizer.eos_token_id
    cached = getattr(tokenizer, "vocabulary_hash", None)
    if cached is None or cached[0] != version:
        meaning = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
        cached = tokenizer.vocabulary_hash = version, hashlib.sha256(meaning.encode()).hexdigest()[:16]
    return cached[1]


def encode(
    examples: Iterable[Example],
    tokenizer: Any,
    limits: Limits,
    path: str,
    *,
    retokenize: bool = False,
    skip_invalid: bool = False,
    strict: bool = True,
) -> tuple[list[TokenizedExample], Counter[str]]:
    """Return the examples as tokens within the limits, and counts by reason of rows that were cut, skipped or noted.

    Sampled completions keep the token ids that they were sampled as, and samples of another tokenizer are refused. If
    `retokenize`, for a reward model, those are tokenized from their text, and every sample that ended gets the end that
    training gives a completion. DataError names `path` and the line of a row that cannot be encoded; with
    `skip_invalid` such rows are counted. If `strict`, DataError if more than 5% of the rows keep only a stump of their
    prompt.
    """
    counts: Counter[str] = Counter()
    encoder = _Encoder(tokenizer, retokenize, counts)
    encoded = []
    rows = 0
    stumps = f"rows that keep fewer than {STUMP} tokens or a quarter of their prompt"
    for example, row in encoder.rows(examples, path, skip_invalid):
        rows += 1
        if row is None:
            continue
        prompt, completions = row
        if example.tokens is None and len(completions) > 1 and all(ids == completions[0] for ids in completions):
            counts["rows dropped: completions identical as tokens"] += 1
            continue
        fitted = fit(prompt, completions, _bos_length(prompt, tokenizer), limits, example.place(path), counts)
        if fitted is None:
            continue
        if limits.max_prompt_length is None and is_stump(len(fitted[0]), len(prompt)):
            counts[stumps] += 1
        ref_logps = example.ref_logps
        if ref_logps is not None and fitted != (tuple(prompt), tuple(map(tuple, completions))):
            counts["rows cut, so that their log-probs of a reference are of other tokens and not used"] += 1
            ref_logps = None
        encoded.append(TokenizedExample(*fitted, example.rewards, example.line, ref_logps, example.label))
    if strict and counts[stumps] > MAX_STUMPS * rows:
        raise DataError(
            f"{path}: {counts[stumps]:,} of {rows:,} rows, more than {MAX_STUMPS:.0%}, keep fewer than {STUMP} "
            "tokens or a quarter of their prompt; raise --max_length, or set --max_prompt_length"
        )
    return encoded, +counts


def refused(
    examples: Sequence[Example], tokenizer: Any, path: str, *, skip_invalid: bool
) -> tuple[frozenset[int], Counter[str]]:
    """Return the indices of rows that the tokenizer or its chat template refuses, and their count.

    DataError names the first one, unless `skip_invalid`. For stages that need the rows before they start.
    """
    rows = _Encoder(tokenizer, True, Counter()).rows(examples, path, skip_invalid)
    indices = frozenset(i for i, (_, row) in enumerate(rows) if row is None)
    return indices, Counter({REFUSED: len(indices)} if indices else {})


def usable_prompts(dataset: Dataset, tokenizer: Any, *, skip_invalid: bool) -> tuple[list[Example], Counter[str]]:
    """Return the rows whose prompts can be rendered, and the count of the others; DataError without any."""
    prompts = [replace(example, completions=(), tokens=None) for example in dataset.examples]
    indices, counts = refused(prompts, tokenizer, dataset.path, skip_invalid=skip_invalid)
    usable = [example for i, example in enumerate(dataset.examples) if i not in indices]
    if not usable:
        raise DataError(f"{dataset.path}: no prompt is left")
    return usable, counts


def sampled_prompts(prompts: Iterable[str], tokenizer: Any, max_length: int) -> tuple[list[list[int]], Counter[str]]:
    """Return at most `max_length` tokens of each prompt, and counts of the prompts that were cut on the left."""
    counts: Counter[str] = Counter()
    renderer = chat_template.Renderer(tokenizer)
    cut = []
    for number, prompt in enumerate(prompts, 1):
        try:
            text = _prompt(prompt, tokenizer, renderer)
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from None
        ids = text.start + text.ids
        rest = last_of(ids, _bos_length(ids, tokenizer), max_length)
        counts["prompts cut on the left"] += len(rest) < len(ids)
        counts[f"prompts that keep fewer than {STUMP} tokens or a quarter of their length"] += is_stump(
            len(rest), len(ids)
        )
        cut.append(rest)
    return cut, +counts


class _Prompt(NamedTuple):
    text: str  # as rendered, without a BOS that the tokenizer adds
    start: list[int]  # BOS, or the token before the completion of an empty prompt
    ids: list[int]  # of the text


def _prompt(prompt: str, tokenizer: Any, renderer: chat_template.Renderer) -> _Prompt:
    """Render and tokenize a prompt. A chat template writes a BOS itself."""
    if isinstance(prompt, Chat):
        text = renderer.prompt(prompt)
        return _Prompt(text, [], subwords.text_ids(text, tokenizer))
    bos, text = tokenizer.bos_token_id, str.__str__(prompt)
    spelled = bos is not None and bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    while spelled and text.startswith(tokenizer.bos_token):  # a rendered text has its BOS
        text = text.removeprefix(tokenizer.bos_token)
    start = [bos] if spelled or tokenizer("a")["input_ids"][:1] == [bos] else []
    ids = subwords.text_ids(text, tokenizer)
    # the first token of a completion needs a token before it
    return _Prompt(text, start if start or ids else [tokenizer.eos_token_id if bos is None else bos], ids)


def _bos_length(prompt: list[int], tokenizer: Any) -> int:
    """Return 1 if a prompt starts with a BOS, which cutting keeps, else 0."""
    return int(prompt[:1] == [tokenizer.bos_token_id])


class _Encoder:
    """Tokenizes prompts and completions for one call of `encode`."""

    def __init__(self, tokenizer: Any, retokenize: bool, counts: Counter[str]) -> None:
        self.tokenizer, self.retokenize, self.counts = tokenizer, retokenize, counts
        self.renderer = chat_template.Renderer(tokenizer)
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.pop(tokenizer.unk_token_id, None)
        # tokens named like an end (<|eot_id|>, <|im_end|>), because a rendered text ends with the token of its template
        ends = {i for i, text in special.items() if _ENDS.search(text) and i != tokenizer.bos_token_id}
        self.special, self.ends = set(special), ends | {tokenizer.eos_token_id}  # in texts, and those that end them
        self.end_texts = tuple(tokenizer.convert_ids_to_tokens(sorted(self.ends)))
        self.last: tuple[str | None, _Prompt] = None, _Prompt("", [], [])  # consecutive rows may share a prompt

    def rows(
        self, examples: Iterable[Example], path: str, skip_invalid: bool
    ) -> Iterator[tuple[Example, tuple[list[int], list[list[int]]] | None]]:
        """Yield each example with its tokens, or with None if it is refused; DataError unless `skip_invalid`."""
        for i, example in enumerate(examples):
            try:
                yield example, self.encode(example, check=i < NUM_CHECKED)
            except (DataError, BoundaryError) as error:
                if not skip_invalid:
                    raise DataError(f"{example.place(path)}: {error}") from None
                self.counts[REFUSED] += 1
                yield example, None

    def encode(self, example: Example, *, check: bool) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of a prompt and of its completions with their ends.

        A text with a label becomes the prompt, so that it is cut on the left; its completion is only the end.
        """
        if example.label is not None:
            example = replace(example, prompt=example.completions[0], completions=("",), label=None)
        if self.last[0] is not example.prompt:
            self.last = example.prompt, _prompt(example.prompt, self.tokenizer, self.renderer)
        prompt = self.last[1]
        plain = not isinstance(example.prompt, Chat)
        if plain and self.special & {*prompt.ids}:
            self.counts["prompts with special tokens in their text, which are read as such"] += 1
        tokens = example.tokens
        if tokens is None:
            completions = [
                self._completion_ids(example.prompt, prompt, answer, check) for answer in example.completions
            ]
        elif not self.retokenize:
            if tokens.tokenizer != tokenizer_hash(self.tokenizer):
                raise DataError(
                    f"token ids of another tokenizer ({tokens.tokenizer}, the model's is "
                    f"{tokenizer_hash(self.tokenizer)}); python -m exo.sample with this model makes others"
                )
            completions = [list(ids) for ids in tokens.ids]
        else:
            completions = [self._sampled_ids(example, prompt, i) for i in range(len(example.completions))]
        return prompt.start + prompt.ids, completions

    def _completion_ids(self, prompt: str, rendered: _Prompt, answer: str, check: bool) -> list[int]:
        """Return the tokens of a completion with its end: the template's end of turn, or the end of sequence."""
        if isinstance(prompt, Chat):
            text, end, needs_eos = self.renderer.answer(prompt, rendered.text, answer)
            if not chat_template.is_written(answer, text):
                self.counts["completions with text or calls that the chat template does not write"] += 1
            ids = self._continuation_ids(rendered, text + end, check)
            return [*ids, self.tokenizer.eos_token_id] if needs_eos else ids
        text = answer.rstrip()
        ids = self._continuation_ids(rendered, text if text.endswith(self.end_texts) else answer, check)
        end_at = len(ids)
        while end_at and ids[end_at - 1] in self.ends:
            end_at -= 1
        if self.special & {*ids[:end_at]}:
            self.counts["completions with special tokens within their text, which are read as such"] += 1
        if end_at == len(ids):
            return [*ids, self.tokenizer.eos_token_id]
        if ids[end_at] != self.tokenizer.eos_token_id:
            self.counts["completions that end with another special token instead of the end of sequence"] += 1
        return ids[: end_at + 1]

    def _sampled_ids(self, example: Example, prompt: _Prompt, i: int) -> list[int]:
        """Return the tokens of a sampled completion for a reward model, with the same end as in training."""
        tokens, text = example.tokens, example.completions[i]
        assert tokens is not None
        finished, end = tokens.finish[i] == "eos", self.tokenizer.eos_token_id
        if isinstance(example.prompt, Chat):
            end = end if self.renderer.end_id is None else self.renderer.end_id
            text = self.renderer.answer(example.prompt, prompt.text, text).text
        if tokens.tokenizer == tokenizer_hash(self.tokenizer):
            ids = list(tokens.ids[i][: len(tokens.ids[i]) - finished])
        else:
            ids = self._continuation_ids(prompt, text, False)
        return [*ids, end] if finished or not ids else ids

    def _continuation_ids(self, prompt: _Prompt, text: str, check: bool) -> list[int]:
        ids = subwords.continued(prompt.ids, prompt.text, text, self.tokenizer)
        if check:
            subwords.check(prompt.ids, prompt.text, ids, text, self.tokenizer)
        return ids
