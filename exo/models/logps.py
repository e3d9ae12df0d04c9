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
from exo.data import Group
from exo.data.collate import Batch, Packing, of_completions
from exo.data.text import tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenGroup
from exo.distributed import fsdp
from exo.distributed.gather import G, R, shared
from exo.models.attention import masks
from exo.models.lm_head import CausalHead, evaluating
from exo_kernels import linear_token_logps

Tokens = list[list[Tensor]]  # a row a prompt, a tensor (tokens,) in float64 a completion


class Models(NamedTuple):
    """Policy and reference, and how both read completions: after as much of a prompt as was sampled after."""

    policy: Any
    reference: Any
    tokenizer: Any
    accelerator: Accelerator
    max_tokens: int  # per batch
    limits: Limits
    temperature: float

    def logps(self, groups: Sequence[Group], path: str = "samples") -> tuple[Tokens, Tokens]:
        """Log-probs of each token under the policy and under the reference. `path` is named in errors."""
        encoded, _ = tokenize.encode(groups, self.tokenizer, self.limits, path)
        packing = Packing(self.tokenizer.pad_token_id, self.max_tokens)
        ours, theirs = (
            shared_token_logps(model, encoded, self.accelerator, packing, self.temperature)
            for model in (self.policy, self.reference)
        )
        return ours, theirs

    def log_ratios(self, groups: Sequence[Group]) -> Tokens:
        """log pi - log ref of each token."""
        return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*self.logps(groups), strict=True)]

    def density(self, groups: Sequence[Group], path: str) -> list[dict[str, Any]]:
        """A row for each prompt of the reference's samples: log-probs of its completions under both, and rewards."""
        ours, theirs = ([[float(row.sum()) for row in rows] for rows in of] for of in self.logps(groups, path))
        return [
            {"prompt": group.prompt, "logps": logps, "ref_logps": ref_logps, "rewards": group.rewards}
            for group, logps, ref_logps in zip(groups, ours, theirs, strict=True)
        ]


# rms error of one token's log-prob by compute dtype: what the first loss may be off by without a mistake
TOKEN_NOISE = {"no": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2}


@contextmanager
def scoring(
    model: nn.Module, accelerator: Accelerator, packing: Packing, temperature: float
) -> Iterator[Callable[[Sequence[TokenGroup]], list[list[Tensor]]]]:
    """A function of a micro-batch: for each group the log-probs of each completion's tokens, fp64, (its tokens,).

    The model is left as it was; no random state moves.
    """
    head = CausalHead(model)

    @torch.no_grad()
    def of(part: Sequence[TokenGroup]) -> list[list[Tensor]]:
        batch = packing.collate(part).to(accelerator.device)
        with accelerator.autocast():
            scores = fsdp.entered(model, partial(_logps, head, batch, temperature))
        found = list(of_completions(part, scores.double().cpu()))
        for group, rows in zip(part, found, strict=True):
            if not all(bool(row.isfinite().all()) for row in rows):
                name = getattr(model, "name_or_path", "") or type(model).__name__
                raise RunError(f"model {name}: expected finite log-probs; got others in row {group.line}")
        return found

    with evaluating(model):
        yield of


def _logps(head: CausalHead, batch: Batch, temperature: float) -> Tensor:  # (n,)
    rows = masks.rows(head, batch)
    return linear_token_logps(rows, head.weight, temperature=temperature, **masks.scored(batch), **head.options)


def token_logps(
    model: nn.Module, groups: Sequence[TokenGroup], accelerator: Accelerator, packing: Packing, temperature: float
) -> list[list[Tensor]]:
    """What `scoring` gives, for each group in their order; all of it by this process."""
    with scoring(model, accelerator, packing, temperature) as of:
        return packing.each(groups, of)


def shared_token_logps(
    model: nn.Module, groups: Sequence[TokenGroup], accelerator: Accelerator, packing: Packing, temperature: float
) -> list[list[Tensor]]:
    """The same, each micro-batch by one of the processes."""
    with scoring(model, accelerator, packing, temperature) as of:

        def listed(part: Sequence[TokenGroup]) -> list[list[list[float]]]:
            return [[row.tolist() for row in rows] for rows in of(part)]

        found = each(groups, listed, packing, accelerator, together=fsdp.is_sharded(model))
    return [[torch.tensor(row, dtype=torch.float64) for row in rows] for rows in found]


def each(
    groups: Sequence[G], of: Callable[[list[G]], Sequence[R]], packing: Packing, accelerator: Accelerator, **how: bool
) -> list[R]:
    """What `of` gives for each group, in JSON, asked a micro-batch at a time; in the order of the groups."""
    parts = packing.micro_batches(groups)
    found: dict[int, R] = {}
    for part, rows in zip(parts, shared(parts, of, accelerator, **how), strict=True):
        found |= zip(map(id, part), rows, strict=True)
    return [found[id(group)] for group in groups]
