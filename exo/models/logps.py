"""Log-probs of completions under a model, or under a policy and its reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo.cli.errors import RunError
from exo.data import Example
from exo.data.collate import Batch, Collator, split_completions
from exo.data.text import tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import fsdp
from exo.distributed.gather import G, R, map_over_ranks
from exo.models.attention import masks
from exo.models.lm_head import LMHead, eval_mode
from exo_kernels import linear_token_logps

Tokens = list[list[Tensor]]  # per prompt, per completion: (tokens,) float64
# rms error of one token's log-prob by compute dtype: the tolerance of the first loss
TOKEN_NOISE = {"no": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2}


class ScoringModels(NamedTuple):
    """A policy and its reference, with the limits under which both read prompts and completions."""

    policy: Any
    reference: Any
    tokenizer: Any
    accelerator: Accelerator
    max_tokens: int  # per batch
    limits: Limits
    temperature: float

    def logps(self, examples: Sequence[Example], path: str = "samples") -> tuple[Tokens, Tokens]:
        """Return the log-probs of each token under the policy and the reference. Errors name `path`."""
        encoded, _ = tokenize.encode(examples, self.tokenizer, self.limits, path)
        collator = Collator(self.tokenizer.pad_token_id, self.max_tokens)
        policy, reference = (
            token_logps(model, encoded, self.accelerator, collator, self.temperature, shared=True)
            for model in (self.policy, self.reference)
        )
        return policy, reference

    def log_ratios(self, examples: Sequence[Example]) -> Tokens:
        """Return log pi - log ref of each token."""
        return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*self.logps(examples), strict=True)]

    def density(self, examples: Sequence[Example], path: str) -> list[dict[str, Any]]:
        """Return a row per prompt: log-probs of its completions under both models, and rewards."""
        policy, reference = (
            [[float(row.sum()) for row in rows] for rows in logps] for logps in self.logps(examples, path)
        )
        return [
            {"prompt": example.prompt, "logps": logps, "ref_logps": ref_logps, "rewards": example.rewards}
            for example, logps, ref_logps in zip(examples, policy, reference, strict=True)
        ]


@contextmanager
def logps_function(
    model: nn.Module, accelerator: Accelerator, collator: Collator, temperature: float
) -> Iterator[Callable[[Sequence[TokenizedExample]], Tokens]]:
    """Yield a function from a micro-batch to log-probs: per example, per completion (tokens,) fp64.

    The model is in eval mode inside the context. No random state changes.
    """
    head = LMHead(model)

    @torch.no_grad()
    def compute(part: Sequence[TokenizedExample]) -> Tokens:
        batch = collator.collate(part).to(accelerator.device)
        with accelerator.autocast():
            scores = fsdp.run_unsharded_root(model, partial(_logps, head, batch, temperature))
        logps = list(split_completions(part, scores.double().cpu()))
        for example, rows in zip(part, logps, strict=True):
            if not all(bool(row.isfinite().all()) for row in rows):
                name = getattr(model, "name_or_path", "") or type(model).__name__
                raise RunError(f"model {name}: expected finite log-probs; got NaN or inf in row {example.line}")
        return logps

    with eval_mode(model):
        yield compute


def completion_hidden(head: LMHead, batch: Batch) -> Tensor:  # (n, D)
    """Return the hidden states of the rows that predict the completions' tokens."""
    hidden = head.hidden(**masks.inputs(batch, head.model.config))
    return hidden.flatten(0, 1)[batch.rows]


def _logps(head: LMHead, batch: Batch, temperature: float) -> Tensor:  # (n,)
    hidden = completion_hidden(head, batch)
    return linear_token_logps(hidden, head.weight, temperature=temperature, **batch.loss_inputs(), **head.options)


def token_logps(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    collator: Collator,
    temperature: float,
    *,
    shared: bool = False,
) -> Tokens:
    """Return the log-probs of all examples in order: per example, per completion (tokens,) fp64.

    `shared`: the ranks, which have the same examples, share the micro-batches.
    """
    with logps_function(model, accelerator, collator, temperature) as logps_of:

        def as_lists(part: Sequence[TokenizedExample]) -> list[list[list[float]]]:
            return [[row.tolist() for row in rows] for rows in logps_of(part)]

        results = map_micro_batches(
            examples, as_lists, collator, accelerator if shared else None, together=fsdp.is_sharded(model)
        )
    return [[torch.tensor(row, dtype=torch.float64) for row in rows] for rows in results]


def map_micro_batches(
    examples: Sequence[G],
    function: Callable[[list[G]], Sequence[R]],
    collator: Collator,
    accelerator: Accelerator | None = None,
    *,
    together: bool = False,
) -> list[R]:
    """Map a function over micro-batches and return its result for each example, in order; see `map_over_ranks`."""
    parts = collator.micro_batches(examples)
    results: dict[int, R] = {}
    for part, values in zip(parts, map_over_ranks(parts, function, accelerator, together=together), strict=True):
        results |= zip(map(id, part), values, strict=True)
    return [results[id(example)] for example in examples]
