"""Sampling K completions per prompt from a causal LM: batched, cached, reproducible row by row.

Own loop instead of `model.generate`, for two things that it does not offer: every completion has
its own random stream, so that it does not change with the batch it happens to be in, and the
log-probability of what was drawn is summed on the way, at the temperature it was drawn at.
Leaves out top-k and beams. Top-p is there for evaluation as the paper does it; for training, the loss
assumes completions drawn from the policy itself.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from exo.cli import console, signals
from exo.cli.errors import RunError
from exo.models.lm_head import eval_mode
from exo.rollouts import decoding


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion: its tokens, with the one that ended it if one did; their log-probability; why it ended.

    The log-probability is that of the model at the temperature, before top-p and before tokens are masked.
    """

    token_ids: tuple[int, ...]
    logprob: float
    finish: Literal["eos", "length"]


Job = Callable[[], list[Sample]]  # draws one batch


def sample(
    model: nn.Module,
    stop_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    k: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    top_p: float = 1.0,
    absent_ids: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
    batch_size: int = 512,
    progress: Callable[[int], object] | None = None,
    run: Callable[[Sequence[Job]], list[list[Sample]]] | None = None,
) -> list[list[Sample]]:
    """Draw `k` completions of each prompt; those of prompt i are in row i.

    A completion ends at the first of `stop_ids`, which it includes, or after `max_new_tokens`. Tokens in `absent_ids`
    are never drawn: rows of the embedding that no token of the tokenizer uses. RunError if the model gives NaN.
    `batch_size` counts sequences; `progress` is called with the number of sequences just done. `run` does the batches
    (default: one after another) and gives what each of them drew. `numbers` names the prompts
    (default: their index), so that a part of the prompts gets what it would get among all of them.
    A completion depends on (seed, number of its prompt, its number among the k) alone. Rounding is
    the one exception: matrix products round differently at other batch sizes, and a draw within
    that error (about 1e-6 in fp32) of the border between two tokens goes either way.
    """
    _validate(model, prompts, k, temperature, top_p, max_new_tokens, batch_size)
    numbers = range(len(prompts)) if numbers is None else numbers
    # Longest first: a batch that does not fit in memory fails at once, and padding stays small.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = [(i, j) for i in order for j in range(k)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rules = _Rules(frozenset(stop_ids), tuple(absent_ids), temperature, top_p)

    def draw(batch: list[tuple[int, int]]) -> list[Sample]:
        signals.raise_if_stop_requested()
        uniforms = torch.stack([_stream(seed, numbers[i], j, max_new_tokens) for i, j in batch])
        drawn = _draw(decoder, model, rules, prompts, batch, uniforms)
        for (i, _), one in zip(batch, drawn, strict=True):
            if math.isnan(one.logprob):
                name = getattr(model, "name_or_path", "") or type(model).__name__
                raise RunError(f"model {name}: expected finite logits; got NaN after prompt {numbers[i] + 1}")
        if progress is not None:
            progress(len(batch))
        return drawn

    jobs = [partial(draw, batch) for batch in batches]
    with eval_mode(model), torch.no_grad():
        decoder = _decoder(model, prompts)
        found = [job() for job in jobs] if run is None else run(jobs)
    drawn = {row: one for batch, some in zip(batches, found, strict=True) for row, one in zip(batch, some, strict=True)}
    return [[drawn[i, j] for j in range(k)] for i in range(len(prompts))]


class _Rules(NamedTuple):
    """How a token is drawn, and which tokens end a completion."""

    stop_ids: frozenset[int]
    absent_ids: tuple[int, ...]
    temperature: float
    top_p: float


def _decoder(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Callable[..., decoding.Decoder]:
    if not prompts or decoding.supports_cache(model, prompts):
        return decoding.CachedDecoder
    console.warn(
        f"{type(model).__name__}: sampling without a key-value cache, because this model has none that keeps its "
        "logits; every token runs its whole sequence again"
    )
    return decoding.UncachedDecoder


def _draw(
    decoder_type: Callable[..., decoding.Decoder],
    model: nn.Module,
    rules: _Rules,
    prompts: Sequence[Sequence[int]],
    batch: list[tuple[int, int]],
    uniforms: Tensor,  # (B, max_new_tokens)
) -> list[Sample]:
    """The completions of one batch. Rows that have ended leave it; `alive` names the others."""
    device = next(model.parameters()).device
    size, steps = uniforms.shape
    uniforms = uniforms.to(device)
    tokens = torch.zeros((size, steps), dtype=torch.long, device=device)
    scores = torch.zeros((size, steps), device=device)
    alive = torch.arange(size, device=device)
    lengths = torch.full((size,), steps, device=device)
    stops = torch.tensor(sorted(rules.stop_ids), device=device)
    absent = torch.tensor(rules.absent_ids, dtype=torch.long, device=device)
    decoder = decoder_type(model, prompts, [i for i, _ in batch])
    for step in range(steps):
        signals.raise_if_stop_requested()
        logprobs = torch.log_softmax(decoder.logits.float() / rules.temperature, -1)  # (alive, V)
        allowed = logprobs.index_fill(1, absent, -torch.inf) if len(absent) else logprobs
        choice = _inverse_cdf(_nucleus(allowed, rules.top_p), uniforms[alive, step])
        tokens[alive, step] = choice
        scores[alive, step] = logprobs.gather(1, choice[:, None])[:, 0]
        going = ~torch.isin(choice, stops)
        going &= ~scores[alive, step].isnan()  # the caller refuses such a row
        lengths[alive[~going]] = step + 1
        alive, kept = alive[going], going.nonzero()[:, 0]
        if step + 1 == steps or not len(alive):
            break
        decoder.advance(choice[going], kept)
    return [
        Sample(tuple(row[:n]), sum(score[:n]), "eos" if row[n - 1] in rules.stop_ids else "length")
        for row, score, n in zip(tokens.tolist(), scores.tolist(), lengths.tolist(), strict=True)
    ]


def _nucleus(
    logprobs: Tensor,  # (B, V)
    top_p: float,
) -> Tensor:
    """The most probable tokens whose probabilities reach `top_p`; the others get none. One token always stays."""
    if top_p >= 1:
        return logprobs
    ordered, place = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    beyond = before >= top_p * ordered.exp().sum(-1, keepdim=True)  # masked tokens are missing from the sum
    return logprobs.masked_fill(torch.empty_like(place, dtype=torch.bool).scatter_(-1, place, beyond), -torch.inf)


def _inverse_cdf(
    logprobs: Tensor,  # (B, V)
    uniforms: Tensor,  # (B,)
) -> Tensor:
    cdf = logprobs.exp().cumsum(-1)
    # u < 1, so u * total < total in floating point too: a token of probability 0 is never reached.
    target = uniforms * cdf[:, -1]
    choice = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    # Only a row of NaN runs past its end, and its log-probability says so.
    return choice.clamp(max=logprobs.shape[1] - 1)


def stream_seed(seed: int, prompt: int, number: int) -> int:
    """In [0, 2^63): one for each completion, whoever draws it and beside whichever others."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _stream(seed: int, prompt: int, number: int, length: int) -> Tensor:
    return torch.rand(length, generator=torch.Generator().manual_seed(stream_seed(seed, prompt, number)))


def _validate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    k: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    for name, value in (("k", k), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts: expected at least one token in each, got none in prompt {i}")
    longest = max(map(len, prompts), default=0)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: expected at most {limit - longest} after a prompt of {longest} "
            f"tokens (the model has {limit} positions), got {max_new_tokens}"
        )
