"""Next-token logits of a batch of growing sequences, with the model's key-value cache or without any cache.

The cache is used if it gives what the model gives without one, which is measured (`caches`), not looked up by name:
some models keep another kind of state (Mamba, RWKV, xLSTM), none at all (GPT), or one that left padding or reordering
breaks (MiniMax). For these every step runs the whole sequences, padded on the right, as scoring does. That is exact for
every causal model, and slow. Left out: drawing tokens (generation).
"""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PROBE = 12  # tokens of a prompt that the two ways are compared on
FIT, ROUGH_FIT = 1e-3, 0.1  # of the logits' standard deviation, with weights in fp32 and in 16 bits


class Decoder(Protocol):
    """Rows of a batch; `logits` (B, V) are those of the next token of each."""

    logits: Tensor

    def advance(self, tokens: Tensor, kept: Tensor) -> None:
        """Append one token to each row in `kept` and drop the other rows."""


class CachedDecoder:
    """The model with its cache. Prompts are padded on the left."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], owners: Sequence[int]) -> None:
        self.model = model
        self.cache: Any = None
        self.accepted = inspect.signature(model.forward).parameters
        device = next(model.parameters()).device
        unique = list(dict.fromkeys(owners))
        width = max(len(prompts[i]) for i in unique)
        # On the left, so that the last column is the last token of every row. Any id will do.
        ids = [[0] * (width - len(prompts[i])) + list(prompts[i]) for i in unique]
        self.mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in unique], device=device
        )
        self.positions = self.mask.sum(1)  # of the next token
        self._forward(torch.tensor(ids, device=device), (self.mask.cumsum(1) - 1).clamp(min=0))
        # A prompt goes through the model once, whatever the number of its completions.
        place = {owner: row for row, owner in enumerate(unique)}
        self._select(torch.tensor([place[owner] for owner in owners], device=device))

    def advance(self, tokens: Tensor, kept: Tensor) -> None:
        if len(kept) < len(self.mask):
            self._select(kept)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self._forward(tokens[:, None], self.positions[:, None])
        self.positions = self.positions + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask}
        arguments |= {"past_key_values": self.cache, "use_cache": True}
        # Models with relative positions (BLOOM, MPT) derive them from the mask and refuse the
        # argument; logits of a whole prompt are wanted nowhere, but not every model can skip them.
        optional = {"position_ids": positions, "logits_to_keep": 1}
        arguments |= {key: value for key, value in optional.items() if key in self.accepted}
        output = self.model(**arguments)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def _select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.logits = self.logits[rows]


class UncachedDecoder:
    """The model without a cache: every step runs the whole sequences again, padded on the right."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], owners: Sequence[int]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.rows = [list(prompts[owner]) for owner in owners]
        self._forward()

    def advance(self, tokens: Tensor, kept: Tensor) -> None:
        self.rows = [[*self.rows[i], token] for i, token in zip(kept.tolist(), tokens.tolist(), strict=True)]
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
    """Whether sampling may use the model's cache: on pieces of the longest prompt it must give the same logits.

    Two pieces are tried, since a mixture of experts may route a token otherwise that lies on a border.
    """
    longest: Sequence[int] = max(prompts, key=len)
    ids = list(longest[-2 * PROBE :])
    if len(ids) < 4:
        ids = (ids * 4)[:4]
    middle = (len(ids) + 1) // 2
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return any(_agree(model, piece) for piece in (ids[:middle], ids[middle:]))


def _agree(model: nn.Module, ids: Sequence[int]) -> bool:
    """With both ways: two prompts, one of which is padded; their order changed, a token more, a row less, a token more.

    A model that cannot do this with a cache raises whatever its authors thought of.
    """
    prompts, tokens = [ids, ids[-1:]], torch.tensor([ids[0], ids[-1], ids[0]])
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    expected = _path(UncachedDecoder(model, prompts, [1, 0, 1]), tokens)
    with suppress(Exception):
        logits = _path(CachedDecoder(model, prompts, [1, 0, 1]), tokens)
        return bool((logits - expected).abs().max() <= (FIT if exact else ROUGH_FIT) * expected.std())
    return False


def _path(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The logits on the way, one after the other."""
    tokens = tokens.to(decoder.logits.device)
    found = [decoder.logits.float()]
    for kept in (torch.tensor([0, 1, 2]), torch.tensor([1, 2])):
        kept = kept.to(tokens.device)
        decoder.advance(tokens[: len(kept)], kept)
        found.append(decoder.logits.float())
    return torch.cat(found)
