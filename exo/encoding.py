"""From texts to tokens: prompt and completions of each row, within the limits on their lengths.

Prompt and completion are tokenised apart, so that the border between them is right by construction. What chat messages
look like is for exo.chat. Left out: batches (packing).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from exo import chat
from exo.data import Chat, DataError, Group


@dataclass(frozen=True)
class Limits:
    """How long a row may be, and what happens to one that is longer."""

    max_length: int
    max_completion_length: int | None
    truncate: str  # "prompt-left" | "drop" | "error"
    max_prompt_length: int | None = None  # where the completions were sampled after no more of it


@dataclass(frozen=True)
class TokenGroup:
    """One prompt and its completions as tokens; `line` is where it stood in its file."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...] | None
    line: int
    ref_logps: tuple[float, ...] | None = None  # fp64 sums, once they are known

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(map(len, self.completions))


def factored(group: TokenGroup) -> TokenGroup:
    """The same with the tokens that all completions begin with in the prompt; each completion keeps one at least.

    No loss of theirs changes, nor its gradient: what all completions share cancels. Sums of log-probs do change.
    """
    answers = group.completions
    most = min(map(len, answers)) - 1
    same = next((i for i in range(most) if len({answer[i] for answer in answers}) > 1), max(0, most))
    if len(answers) < 2 or not same:
        return group
    return replace(group, prompt=group.prompt + answers[0][:same], completions=tuple(a[same:] for a in answers))


def tokenizer_hash(tokenizer: Any) -> str:
    """What a token id means, as 16 hex digits: equal for tokenizers that name all tokens alike."""
    meaning = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    return hashlib.sha256(meaning.encode()).hexdigest()[:16]


def encode(
    groups: Iterable[Group], tokenizer: Any, limits: Limits, path: str, *, foreign: Literal["refuse", "text"] = "refuse"
) -> tuple[list[TokenGroup], Counter[str]]:
    """Tokenise; also count, by reason, the rows cut or dropped for their length. `path` is named in errors.

    Sampled completions keep the tokens they were sampled as. `foreign` says what becomes of those of another tokenizer:
    a policy refuses them, and a reward model reads their text.
    """
    counts: Counter[str] = Counter()
    encoded = []
    own = ""  # a large vocabulary takes a while to hash: only where token ids are met
    prompt_text, known_prompt = None, list[int]()  # rows that follow each other may share one
    for group in groups:
        place = f"{path}:{group.line}"
        if group.tokens is not None:
            own = own or tokenizer_hash(tokenizer)
        if group.tokens is not None and group.tokens.tokenizer == own:
            completions = [list(ids) for ids in group.tokens.ids]
        elif group.tokens is not None and foreign == "refuse":
            raise DataError(
                f"{place}: token ids of another tokenizer ({group.tokens.tokenizer}, the model's is {own}); "
                "python -m exo.sample with this model makes others"
            )
        else:
            ended = ["eos"] * len(group.completions) if group.tokens is None else group.tokens.finish
            completions = [
                tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (how == "eos")
                for text, how in zip(group.completions, ended, strict=True)
            ]
        try:
            if group.prompt is not prompt_text:
                prompt_text, known_prompt = group.prompt, prompt_ids(group.prompt, tokenizer)
            if isinstance(group.prompt, Chat) and group.tokens is None:  # a sample was drawn as it stands
                completions = [_answer(group.prompt, text, tokenizer, counts) for text in group.completions]
                if len(completions) > 1 and all(ids == completions[0] for ids in completions):
                    counts["rows dropped: completions identical in the chat template"] += 1
                    continue
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        start = int(known_prompt[:1] == [tokenizer.bos_token_id])
        prompt = last_of(known_prompt, start, limits.max_prompt_length or len(known_prompt))
        if len(prompt) < len(known_prompt):
            counts["rows with the prompt cut on the left to --max_prompt_length"] += 1
        fitted = _fit(prompt, completions, start, limits, place, counts)
        if fitted is not None:
            known = group.ref_logps
            if known is not None and fitted != (tuple(known_prompt), tuple(map(tuple, completions))):
                counts["rows cut, so that their log-probs of a reference are of other tokens and not used"] += 1
                known = None
            encoded.append(TokenGroup(*fitted, group.rewards, group.line, known))
    return encoded, counts


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """A prompt as every stage has it: sampling, training and scoring must agree on it.

    A chat template says itself whether a BOS comes first; none is added to what it says.
    """
    if isinstance(prompt, Chat):
        return tokenizer(chat.prompt_text(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    ids = _beginning(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # the first token of a completion needs a token before it
    return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def sampled_prompts(prompts: Iterable[str], tokenizer: Any, most: int) -> tuple[list[list[int]], Counter[str]]:
    """The same of many, cut on the left where they are longer than `most`; and how many were."""
    counts: Counter[str] = Counter()
    cut = []
    for ids in (prompt_ids(prompt, tokenizer) for prompt in prompts):
        counts["prompts cut on the left"] += len(ids) > most
        cut.append(last_of(ids, int(ids[:1] == [tokenizer.bos_token_id]), most))
    return cut, +counts


def last_of(prompt: list[int], start: int, room: int) -> list[int]:
    """The last `room` tokens, the first `start` of the prompt among them: a BOS stays where it is."""
    if len(prompt) <= room:
        return prompt
    kept = start if start < room else 0
    return prompt[:kept] + prompt[len(prompt) - (room - kept) :]


def _answer(prompt: Chat, text: str, tokenizer: Any, counts: Counter[str]) -> list[int]:
    """A completion of chat messages, with its end."""
    rendered, end = chat.answer_text(prompt, text, tokenizer)
    if end == "template":
        counts["completions that end as the chat template says, which is not the tokenizer's end of sequence"] += 1
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids + [tokenizer.eos_token_id] * (end == "none")


def _beginning(tokenizer: Any) -> list[int]:
    """Where the tokenizer itself begins texts with BOS, prompts do; an EOS that it would append never ends a prompt."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    start: int,  # tokens at the beginning that are kept
    limits: Limits,
    place: str,
    counts: Counter[str],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None:
    """Apply the limits. One prompt serves all its completions, so the longest of them decides."""
    most = limits.max_length - 1  # one token of prompt always stays
    if limits.max_completion_length is not None:
        most = min(most, limits.max_completion_length)
    long_completion = max(map(len, completions)) > most
    too_long = long_completion or len(prompt) + max(map(len, completions)) > limits.max_length
    if too_long and limits.truncate == "error":
        raise DataError(f"{place}: longer than the limits allow; raise them or choose another --truncate")
    if too_long and limits.truncate == "drop":
        counts["rows dropped: over-long"] += 1
        return None
    if long_completion:
        different = len(set(map(tuple, completions)))
        completions = [completion[:most] for completion in completions]
        if different > 1 == len(set(map(tuple, completions))):
            counts["rows dropped: completions identical once cut"] += 1
            return None
        counts["rows with a completion cut on the right (its end of sequence goes too)"] += 1
    room = limits.max_length - max(map(len, completions))
    if len(prompt) > room:
        counts["rows with the prompt cut on the left"] += 1
        prompt = last_of(prompt, start, room)
    return tuple(prompt), tuple(map(tuple, completions))
