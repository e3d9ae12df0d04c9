"""FlexAttention as an attention implementation of transformers, compiled once for all lengths.

transformers' version recompiles for the first lengths. On a CPU it runs uncompiled, for tests only. Dropout is not
supported.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from exo.models.attention import shared_prompt
from exo.models.attention.masks import FLEX, SEGMENTS, block_mask


def attend(model: Any, implementation: str) -> None:
    """Set the attention implementation of a model: FLEX, SEGMENTS, or one of transformers."""
    if implementation == FLEX:
        AttentionInterface.register(FLEX, _attention)
        AttentionMaskInterface.register(FLEX, _mask)
    if implementation == SEGMENTS:
        AttentionInterface.register(SEGMENTS, shared_prompt.attend)  # no mask function is registered, so none is built
    model.set_attn_implementation(implementation)


@cache
def _compiled(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,  # (B, T) bool
    device: Any = "cpu",
    **rest: Any,
) -> Any:
    """Return the mask that transformers builds for rows with one text."""

    def attends(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = mask_function(b, head, query + q_offset, key + kv_offset)
        return mask if attention_mask is None else mask & attention_mask[b, key + kv_offset]

    return block_mask(attends, batch_size, q_length, kv_length, device)


def _attention(
    module: Any,
    query: Tensor,  # (B, H, T, d)
    key: Tensor,  # (B, G, T, d)
    value: Tensor,  # (B, G, T, d)
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:  # (B, T, H, d)
    def capped(score: Tensor, *at: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attention = _compiled(query.device.type)
    score_mod, gqa = None if softcap is None else capped, query.shape[1] != key.shape[1]
    out = attention(query, key, value, score_mod, attention_mask, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous(), None
