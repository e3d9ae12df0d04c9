"""FlexAttention as an attention implementation of transformers, compiled once for all lengths.

transformers' version recompiles for the first lengths it meets. On a CPU it runs uncompiled, for tests only. Dropout is
not supported by FlexAttention.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from exo.models.attention import shared_prompt
from exo.models.attention.masks import FLEX, SEGMENTS, block_mask


def attend(model: Any, implementation: str) -> None:
    """Set the attention implementation of a model: one of ours, or one of transformers."""
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
    """Return the mask that transformers asks for if it gets none of ours: rows with one text."""

    def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = mask_function(b, head, query + q_offset, key + kv_offset)
        return seen if attention_mask is None else seen & attention_mask[b, key + kv_offset]

    return block_mask(sees, batch_size, q_length, kv_length, device)


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

    out = _compiled(query.device.type)(
        query, key, value, score_mod=None if softcap is None else capped, block_mask=attention_mask, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None
