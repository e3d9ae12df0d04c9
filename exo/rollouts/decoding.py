"""Compute next-token logits of a batch of growing sequences, with the model's key-value cache or without a cache.

The cache is used if the logits are the same with and without it. `supports_cache` measures that, because some models
keep another kind of state (Mamba, RWKV, xLSTM), no state (GPT), or a state that left padding or reordering breaks
(MiniMax). For these models every step runs the sequences from their beginning, padded on the right. That is exact for
every causal model, but slow.
"""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PROBE = 12  # tokens of a prompt in the comparison of the two decoders
# Largest difference, in standard deviations of the logits, with weights in fp32 and in 16 bits.
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1


class Decoder(Protocol):
    """A batch of sequences that grow by one token at a time."""

    logits: Tensor  # (B, V) of the next token

    def advance(self, tokens: Tensor, rows: Tensor) -> None:
        """Append a token to each of `rows`, both of shape (rows,), and drop the other rows."""


class CachedDecoder:
    """Run the model with its cache. Prompts are padded on the left."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], owners: Sequence[int]) -> None:
        self.model = model
        self.cache: Any = None
        self.parameters = inspect.signature(model.forward).parameters
        device = next(model.parameters()).device
        unique = list(dict.fromkeys(owners))
        width = max(len(prompts[i]) for i in unique)
        # Padding on the left, with any id, makes the last column the last token of every row.
        ids = [[0] * (width - len(prompts[i])) + list(prompts[i]) for i in unique]
        self.mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in unique], device=device
        )
        self.positions = self.mask.sum(1)  # of the next token
        self._forward(torch.tensor(ids, device=device), (self.mask.cumsum(1) - 1).clamp(min=0))
        # Each prompt goes through the model once, for all of its completions.
        place = {owner: row for row, owner in enumerate(unique)}
        self._select(torch.tensor([place[owner] for owner in owners], device=device))

    def advance(self, tokens: Tensor, rows: Tensor) -> None:
        if len(rows) < len(self.mask):
            self._select(rows)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self._forward(tokens[:, None], self.positions[:, None])
        self.positions = self.positions + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask}
        arguments |= {"past_key_values": self.cache, "use_cache": True}
        # Models with relative positions (BLOOM, MPT) derive them from the mask and refuse the argument. Only the last
        # token's logits are needed, but not every model can skip the others.
        optional = {"position_ids": positions, "logits_to_keep": 1}
        arguments |= {key: value for key, value in optional.items() if key in self.parameters}
        output = self.model(**arguments)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def _select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.logits = self.logits[rows]


class UncachedDecoder:
    """Run the model without a cache: every step runs the sequences from their beginning, padded on the right."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], owners: Sequence[int]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.rows = [list(prompts[owner]) for owner in owners]
        self._forward()

    def advance(self, tokens: Tensor, rows: Tensor) -> None:
        self.rows = [[*self.rows[i], token] for i, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        self._forward()

    def _forward(self) -> None:
        width = max(map(len, self.rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in self.rows], device=self.device)
        lengths = torch.tensor([len(row) for row in self.rows], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        self.logits = logits[torch.arange(len(lengths), device=self.device), lengths - 1]


@torch.no_grad()
def supports_cache(model: nn.Module, prompts: Sequence[Sequence[int]]) -> bool:
    """Return whether the model gives the same logits with its cache, on a part of the longest prompt.

    One of two parts must agree: in a mixture of experts, rounding may route a token to another expert.
    """
    longest: Sequence[int] = max(prompts, key=len)
    ids = list(longest[-2 * PROBE :])
    if len(ids) < 4:
        ids = (ids * 4)[:4]
    middle = (len(ids) + 1) // 2
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return _decoders_agree(model, ids[:middle]) or _decoders_agree(model, ids[middle:])


def _decoders_agree(model: nn.Module, ids: Sequence[int]) -> bool:
    """Compare the decoders on two prompts of different lengths: reorder, add a token, drop a row, add a token."""
    prompts, tokens = [ids, ids[-1:]], torch.tensor([ids[0], ids[-1], ids[0]])
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    expected = _run_two_steps(UncachedDecoder(model, prompts, [1, 0, 1]), tokens)
    with suppress(Exception):  # a model without a suitable cache may raise anything
        logits = _run_two_steps(CachedDecoder(model, prompts, [1, 0, 1]), tokens)
        return bool((logits - expected).abs().max() <= (TOLERANCE if exact else TOLERANCE_16_BITS) * expected.std())
    return False


def _run_two_steps(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Return the logits before and after two steps, concatenated."""
    tokens = tokens.to(decoder.logits.device)
    logits = [decoder.logits.float()]
    for rows in (torch.tensor([0, 1, 2]), torch.tensor([1, 2])):
        decoder.advance(tokens[: len(rows)], rows.to(tokens.device))
        logits.append(decoder.logits.float())
    return torch.cat(logits)
