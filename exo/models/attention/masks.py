"""Attention masks for packed and shared-prompt batches, as the arguments of a model's forward.

A row with one text needs only its padding mask. Otherwise a mask over positions separates the texts of a row, with the
same sliding window as in a row with one text: one mask per kind of layer. On a GPU it is a FlexAttention block mask,
which skips masked blocks; elsewhere it is dense. Models with layers that ignore masks (state spaces, linear attention)
are refused.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo.data.collate import Batch, SegmentIds
from exo.models.attention import flash

# our names among transformers' attention implementations
FLEX = "exo_flex"  # flex.py
SEGMENTS = "exo_segments"  # shared_prompt.py
KINDS = ("full_attention", "sliding_attention")


def unsupported_reason(config: Any) -> str:
    """Return why a model does not support several texts in a row, or ""."""
    unsupported = set(getattr(config, "layer_types", None) or ()) - set(KINDS)
    return f"it has layers of the kind {min(unsupported)}" if unsupported else ""


def inputs(batch: Batch, config: Any) -> dict[str, Any]:
    """Return the forward arguments of a model with this config."""
    segment_ids = batch.segment_ids
    if segment_ids is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if config._attn_implementation == flash.FLASH:
        return flash.inputs(batch.input_ids, segment_ids)
    arguments = {"input_ids": batch.input_ids, "position_ids": segment_ids.position_ids, "use_cache": False}
    if config._attn_implementation == SEGMENTS:
        return arguments | {"exo_segments": SharedPromptIndex.of(batch)}
    if config._attn_implementation == FLEX:
        masks = {kind: _flex_mask(segment_ids, window) for kind, window in _windows(config).items()}
    else:
        eager = config._attn_implementation == "eager"
        masks = {kind: _dense_mask(segment_ids, window, eager) for kind, window in _windows(config).items()}
    return arguments | {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


class SharedPromptIndex(NamedTuple):
    """Indices of the U prompts and N completions of a batch into its flattened tokens (B T,).

    Shorter prompts and completions repeat their last index up to the longest length.
    """

    prompts: Tensor  # (U, P)
    in_prompt: Tensor  # (U, P) bool
    completions: Tensor  # (N, R)
    in_completion: Tensor  # (N, R) bool
    prompt_of: Tensor  # (N,) the prompt of each completion
    inverse: Tensor  # (B T,) index of each token in all prompts, then all completions
    masks: dict[int | None, tuple[Tensor | None, Tensor]]  # cache by window

    @classmethod
    def of(cls, batch: Batch) -> "SharedPromptIndex":
        device = batch.input_ids.device
        starts, lengths, prompt_of = [], [], []
        for i, span in enumerate(batch.spans):
            start = span.start + span.prompt
            for length in span.completions:
                starts.append(start)
                lengths.append(length)
                prompt_of.append(i)
                start += length

        def indices(starts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
            start, length = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
            at = torch.arange(max(lengths))
            return (start + torch.minimum(at, length - 1)).to(device), (at < length).to(device)

        prompts, in_prompt = indices([span.start for span in batch.spans], [span.prompt for span in batch.spans])
        completions, in_completion = indices(starts, lengths)
        used = torch.cat([in_prompt.flatten(), in_completion.flatten()])
        inverse = torch.full((batch.input_ids.numel(),), len(used), device=device)  # padding: past the last index
        inverse[torch.cat([prompts.flatten(), completions.flatten()])[used]] = used.nonzero()[:, 0]
        return cls(prompts, in_prompt, completions, in_completion, torch.tensor(prompt_of, device=device), inverse, {})

    def masks_for(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """Return the masks of prompts, (P, P) or None if causal, and of completions, (N, 1, R, P + R)."""
        if window not in self.masks:
            length = self.prompts.shape[1]
            is_causal = window is None or window >= length
            prompt_mask = None if is_causal else causal_band(length, window, self.prompts.device)
            self.masks[window] = prompt_mask, self._completion_mask(window)
        return self.masks[window]

    def _completion_mask(self, window: int | None) -> Tensor:
        at = torch.arange(self.completions.shape[1], device=self.completions.device)  # (R,)
        in_prompt = self.in_prompt[self.prompt_of]  # (N, P)
        to_prompt = in_prompt[:, None, :].expand(-1, len(at), -1)  # (N, R, P)
        to_completion = (at[:, None] >= at).expand(len(in_prompt), -1, -1)  # (N, R, R)
        if window is not None:
            lengths = in_prompt.sum(1)[:, None, None]
            distance = lengths + at[:, None] - torch.arange(in_prompt.shape[1], device=at.device)
            to_prompt = to_prompt & (distance < window)
            to_completion = to_completion & (at[:, None] - at < window)
        return torch.cat([to_prompt, to_completion], 2)[:, None]


def causal_band(length: int, window: int | None, device: torch.device) -> Tensor:  # (T, T)
    """Return a causal mask with a sliding window."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at
    return (distance >= 0) & (distance < (length if window is None else window))


def _windows(config: Any) -> dict[str, int | None]:
    """Return the sliding window of each kind of layer; None for full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def _attends(query: SegmentIds, key: SegmentIds, window: int | None) -> Tensor:
    """Return which keys each query attends to, apart from causality within the row."""
    mask = (key.segment == query.segment) & ((key.completion == 0) | (key.completion == query.completion))
    return mask if window is None else mask & (query.position_ids - key.position_ids < window)


def _dense_mask(segment_ids: SegmentIds, window: int | None, eager: bool) -> Tensor:  # (B, 1, T, T)
    query, key = (SegmentIds(*(tensor.unsqueeze(dim) for tensor in segment_ids)) for dim in (2, 1))
    mask = _attends(query, key, window).tril()[:, None]
    # eager attention adds the mask to the scores; every token attends to itself, so no row is -inf throughout
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf) if eager else mask


def _flex_mask(segment_ids: SegmentIds, window: int | None) -> Any:
    def attends(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_ids, key_ids = (SegmentIds(*(tensor[b, index] for tensor in segment_ids)) for index in (query, key))
        return _attends(query_ids, key_ids, window) & (key <= query)

    n, length = segment_ids.segment.shape
    return block_mask(attends, n, length, length, segment_ids.segment.device)


def block_mask(attends: Callable[..., Tensor], n: int, queries: int, keys: int, device: Any) -> Any:
    """Return a FlexAttention mask, which skips blocks that are masked completely."""
    from torch.nn.attention.flex_attention import create_block_mask

    compiled = torch.device(device).type == "cuda"  # uncompiled, the full mask is materialized
    return create_block_mask(attends, n, None, queries, keys, device=str(device), _compile=compiled)
