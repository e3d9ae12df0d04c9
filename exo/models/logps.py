"""Log-probs of completions under a policy and its reference, for the KL and the density ratio.

Left out: what is made of them (estimates, density).
"""

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

Tokens = list[list[Tensor]]  # a row a prompt, a tensor (tokens,) in float64 a completion


class ScoringModels(NamedTuple):
    """Policy and reference, and how both read completions: after as much of a prompt as was sampled after."""

    policy: Any
    reference: Any
    tokenizer: Any
    accelerator: Accelerator
    max_tokens: int  # per batch
    limits: Limits
    temperature: float

    def logps(self, examples: Sequence[Example], path: str = "samples") -> tuple[Tokens, Tokens]:
        """Log-probs of each token under the policy and under the reference. `path` is named in errors."""
        encoded, _ = tokenize.encode(examples, self.tokenizer, self.limits, path)
        collator = Collator(self.tokenizer.pad_token_id, self.max_tokens)
        ours, theirs = (
            shared_token_logps(model, encoded, self.accelerator, collator, self.temperature)
            for model in (self.policy, self.reference)
        )
        return ours, theirs

    def log_ratios(self, examples: Sequence[Example]) -> Tokens:
        """log pi - log ref of each token."""
        return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*self.logps(examples), strict=True)]

    def density(self, examples: Sequence[Example], path: str) -> list[dict[str, Any]]:
        """A row for each prompt of the reference's samples: log-probs of its completions under both, and rewards."""
        ours, theirs = ([[float(row.sum()) for row in rows] for rows in of] for of in self.logps(examples, path))
        return [
            {"prompt": example.prompt, "logps": logps, "ref_logps": ref_logps, "rewards": example.rewards}
            for example, logps, ref_logps in zip(examples, ours, theirs, strict=True)
        ]


# rms error of one token's log-prob by compute dtype: what the first loss may be off by without a mistake
TOKEN_NOISE = {"no": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2}


@contextmanager
def logps_function(
    model: nn.Module, accelerator: Accelerator, collator: Collator, temperature: float
) -> Iterator[Callable[[Sequence[TokenizedExample]], list[list[Tensor]]]]:
    """A function of a micro-batch: for each group the log-probs of each completion's tokens, fp64, (its tokens,).

    The model is left as it was; no random state moves.
    """
    head = LMHead(model)

    @torch.no_grad()
    def of(part: Sequence[TokenizedExample]) -> list[list[Tensor]]:
        batch = collator.collate(part).to(accelerator.device)
        with accelerator.autocast():
            scores = fsdp.run_unsharded_root(model, partial(_logps, head, batch, temperature))
        found = list(split_completions(part, scores.double().cpu()))
        for example, rows in zip(part, found, strict=True):
            if not all(bool(row.isfinite().all()) for row in rows):
                name = getattr(model, "name_or_path", "") or type(model).__name__
                raise RunError(f"model {name}: expected finite log-probs; got others in row {example.line}")
        return found

    with eval_mode(model):
        yield of


def _logps(head: LMHead, batch: Batch, temperature: float) -> Tensor:  # (n,)
    rows = masks.completion_hidden(head, batch)
    return linear_token_logps(rows, head.weight, temperature=temperature, **masks.loss_inputs(batch), **head.options)


def token_logps(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    collator: Collator,
    temperature: float,
) -> list[list[Tensor]]:
    """What `scoring` gives, for each group in their order; all of it by this process."""
    with logps_function(model, accelerator, collator, temperature) as of:
        return collator.each(examples, of)


def shared_token_logps(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    collator: Collator,
    temperature: float,
) -> list[list[Tensor]]:
    """The same, each micro-batch by one of the processes."""
    with logps_function(model, accelerator, collator, temperature) as of:

        def listed(part: Sequence[TokenizedExample]) -> list[list[list[float]]]:
            return [[row.tolist() for row in rows] for rows in of(part)]

        found = map_micro_batches(examples, listed, collator, accelerator, together=fsdp.is_sharded(model))
    return [[torch.tensor(row, dtype=torch.float64) for row in rows] for rows in found]


def map_micro_batches(
    examples: Sequence[G],
    of: Callable[[list[G]], Sequence[R]],
    collator: Collator,
    accelerator: Accelerator,
    **how: bool,
) -> list[R]:
    """What `of` gives for each group, in JSON, asked a micro-batch at a time; in the order of the groups."""
    parts = collator.micro_batches(examples)
    found: dict[int, R] = {}
    for part, rows in zip(parts, map_over_ranks(parts, of, accelerator, **how), strict=True):
        found |= zip(map(id, part), rows, strict=True)
    return [found[id(example)] for example in examples]
