"""Sample K completions per prompt from a causal LM, in batches and with a key-value cache.

In contrast to `model.generate`, every completion has its own random stream, so it does not depend on its batch, and the
log-probability of each completion, at the temperature of sampling, is summed while it is sampled.

Left out: top-k and beam search. Top-p is for evaluation; the training losses assume completions that are drawn from the
policy itself.
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
from exo.cli.fields import require
from exo.models.lm_head import eval_mode
from exo.rollouts import decoding
from exo.rollouts.decoding import Decoder


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion."""

    token_ids: tuple[int, ...]  # including the token that ended it, if one did
    logprob: float  # under the model at the temperature, before top-p and before tokens are masked
    finish: Literal["eos", "length"]


Job = Callable[[], list[Sample]]  # draws one batch


class _TokenOptions(NamedTuple):
    """Options for drawing a token."""

    stop_ids: frozenset[int]  # they end a completion
    absent_ids: tuple[int, ...]  # they are never drawn
    temperature: float
    top_p: float


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
    """Draw `k` completions of each prompt and return a row per prompt.

    A completion ends with the first of `stop_ids`, which it includes, or after `max_new_tokens`. Tokens in `absent_ids`
    are never drawn: rows of the embedding that no token of the tokenizer uses. `batch_size` counts sequences.
    `progress` is called with the number of sequences just drawn. `run` runs the batches and returns the samples of each
    (default: one batch after another). RunError if the model returns NaN.

    A completion depends only on the seed, the number of its prompt and its index among the k. `numbers` are the numbers
    of the prompts (default: their index), so that a part of the prompts gets the same completions as in a call with all
    of them. Rounding is an exception: matrix products round differently for other batch sizes, and a random number
    within that error (about 1e-6 in fp32) of the border between two tokens may then choose the other token.
    """
    for name, count in (("k", k), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        require(count >= 1, name, ">= 1", count)
    require(0 < temperature < math.inf, "temperature", "a finite number > 0", temperature)
    require(0 < top_p <= 1, "top_p", "in (0, 1]", top_p)
    _check_lengths(model, prompts, max_new_tokens)
    numbers = range(len(prompts)) if numbers is None else numbers
    # Longest first: a batch that does not fit in memory fails at once, and padding stays small.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = [(i, j) for i in order for j in range(k)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    options = _TokenOptions(frozenset(stop_ids), tuple(absent_ids), temperature, top_p)

    def draw(batch: list[tuple[int, int]]) -> list[Sample]:
        signals.raise_if_stop_requested()
        uniforms = torch.stack([_stream(seed, numbers[i], j, max_new_tokens) for i, j in batch])
        samples = _draw(decoder_type(model, prompts, [i for i, _ in batch]), options, uniforms)
        for (i, _), completion in zip(batch, samples, strict=True):
            if math.isnan(completion.logprob):
                name = getattr(model, "name_or_path", "") or type(model).__name__
                raise RunError(f"model {name}: expected finite logits; got NaN after prompt {numbers[i] + 1}")
        if progress is not None:
            progress(len(batch))
        return samples

    jobs = [partial(draw, batch) for batch in batches]
    with eval_mode(model), torch.no_grad():
        decoder_type = _choose_decoder(model, prompts)
        results = [job() for job in jobs] if run is None else run(jobs)
    drawn = dict(zip(rows, (completion for samples in results for completion in samples), strict=True))
    return [[drawn[i, j] for j in range(k)] for i in range(len(prompts))]


def _check_lengths(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"prompts: expected at least one token in each; got none in prompt {lengths.index(0)}")
    longest = max(lengths, default=0)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"--max_new_tokens: expected at most {limit - longest} after a prompt of {longest} tokens (the model has "
            f"{limit} positions); got {max_new_tokens}"
        )


def _choose_decoder(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Callable[..., Decoder]:
    if not prompts or decoding.supports_cache(model, prompts):
        return decoding.CachedDecoder
    console.warn(
        f"{type(model).__name__}: sampling without a key-value cache, which changes the logits of this model; every "
        "new token runs its sequence again from the beginning"
    )
    return decoding.UncachedDecoder


def _draw(
    decoder: Decoder,
    options: _TokenOptions,
    uniforms: Tensor,  # (B, max_new_tokens)
) -> list[Sample]:
    """Draw the completions of one batch. `alive` has the indices of the rows that have not ended."""
    device = decoder.logits.device
    size, steps = uniforms.shape
    uniforms = uniforms.to(device)
    tokens = torch.zeros((size, steps), dtype=torch.long, device=device)  # (B, max_new_tokens)
    scores = torch.zeros((size, steps), device=device)  # (B, max_new_tokens) log-probs
    alive = torch.arange(size, device=device)  # (alive,)
    lengths = torch.full((size,), steps, device=device)  # (B,)
    stops = torch.tensor(sorted(options.stop_ids), device=device)
    absent = torch.tensor(options.absent_ids, dtype=torch.long, device=device)
    for step in range(steps):
        signals.raise_if_stop_requested()
        logprobs = torch.log_softmax(decoder.logits.float() / options.temperature, -1)  # (alive, V)
        allowed = logprobs.index_fill(1, absent, -torch.inf) if len(absent) else logprobs
        choice = _inverse_cdf(_nucleus(allowed, options.top_p), uniforms[alive, step])  # (alive,)
        tokens[alive, step] = choice
        scores[alive, step] = logprobs.gather(1, choice[:, None])[:, 0]
        unfinished = ~torch.isin(choice, stops)
        unfinished &= ~scores[alive, step].isnan()  # `sample` raises for such a row
        lengths[alive[~unfinished]] = step + 1
        alive, rows = alive[unfinished], unfinished.nonzero()[:, 0]
        if step + 1 == steps or not len(alive):
            break
        decoder.advance(choice[unfinished], rows)
    return [
        Sample(tuple(row[:n]), sum(score[:n]), "eos" if row[n - 1] in options.stop_ids else "length")
        for row, score, n in zip(tokens.tolist(), scores.tolist(), lengths.tolist(), strict=True)
    ]


def _nucleus(
    logprobs: Tensor,  # (B, V)
    top_p: float,
) -> Tensor:  # (B, V)
    """Mask all but the most probable tokens whose probabilities sum to `top_p`. At least one token is left."""
    if top_p >= 1:
        return logprobs
    ordered, place = logprobs.sort(-1, descending=True)
    more_probable = ordered.exp().cumsum(-1) - ordered.exp()
    masked = more_probable >= top_p * ordered.exp().sum(-1, keepdim=True)  # absent tokens are missing from the sum
    return logprobs.masked_fill(torch.empty_like(place, dtype=torch.bool).scatter_(-1, place, masked), -torch.inf)


def _inverse_cdf(
    logprobs: Tensor,  # (B, V)
    uniforms: Tensor,  # (B,)
) -> Tensor:  # (B,)
    cdf = logprobs.exp().cumsum(-1)
    # u < 1, so u * total < total in floating point too: a token of probability 0 is never chosen.
    target = uniforms * cdf[:, -1]
    choice = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    # Only in a row of NaN is the index V, and its log-probability is NaN too.
    return choice.clamp(max=logprobs.shape[1] - 1)


def stream_seed(seed: int, prompt: int, number: int) -> int:
    """Return the seed, in [0, 2^63), of completion `number` of a prompt."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _stream(seed: int, prompt: int, number: int, length: int) -> Tensor:  # (length,)
    return torch.rand(length, generator=torch.Generator().manual_seed(stream_seed(seed, prompt, number)))
