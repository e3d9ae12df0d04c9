"""Attention of texts that share a prompt, without a mask over all pairs of tokens: prompts on their own, then each
completion over its prompt and itself. As exact as a dense mask, and as cheap as if the prompt were shared for nothing.

For devices without FlexAttention's kernels. Left out: softcaps, whose models take a mask.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from exo.models.attention.masks import SharedPromptIndex, causal_band


def attend(
    module: Any,
    query: Tensor,  # (B, H, T, d)
    key: Tensor,  # (B, G, T, d)
    value: Tensor,  # (B, G, T, d)
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    exo_segments: SharedPromptIndex | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:  # (B, T, H, d)
    if softcap is not None:
        raise ValueError("a softcap in its attention")
    if exo_segments is None:  # rows of one text; a model that does not hand arguments on to its attention shows here
        mask = None if sliding_window is None else causal_band(query.shape[2], sliding_window, query.device)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    s, (n, heads, length, width) = exo_segments, query.shape
    how: dict[str, Any] = {"scale": scaling, "dropout_p": dropout if module.training else 0.0}

    def parted(x: Tensor) -> tuple[Tensor, Tensor]:  # (U, H, P, d), (N, H, R, d)
        x = x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] < heads else x
        of_prompts, of_own = _Split.apply(x.transpose(1, 2).reshape(n * length, heads, width), s)
        return (
            of_prompts.view(*s.prompts.shape, heads, width).transpose(1, 2),
            of_own.view(*s.own.shape, heads, width).transpose(1, 2),
        )

    (q, own_q), (k, own_k), (v, own_v) = map(parted, (query, key, value))
    mask = s.prompt_mask(sliding_window)
    of_prompts = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **how)
    k, v = (torch.cat([a.index_select(0, s.unit), b], 2) for a, b in ((k, own_k), (v, own_v)))  # (N, H, P + R, d)
    of_own = scaled_dot_product_attention(own_q, k, v, s.own_mask(sliding_window), **how)
    out = _Join.apply(*(x.transpose(1, 2).reshape(-1, heads, width) for x in (of_prompts, of_own)), s)
    return out.view(n, length, heads, width), None


class _Split(torch.autograd.Function):
    """Rows of tokens to rows of prompts and of completions, which are all different: so the gradient is picked too, and
    nothing is added up one row after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: SharedPromptIndex) -> tuple[Tensor, Tensor]:
        ctx.s = s
        return x.index_select(0, s.prompts.flatten()), x.index_select(0, s.own.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_prompts, of_own = gradients
        return _picked(of_prompts, of_own, ctx.s), None


class _Join(torch.autograd.Function):
    """And back. What stands beyond an end came from nowhere and goes nowhere."""

    @staticmethod
    def forward(ctx: Any, of_prompts: Tensor, of_own: Tensor, s: SharedPromptIndex) -> Tensor:
        ctx.s = s
        return _picked(of_prompts, of_own, s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,), s = gradients, ctx.s
        parts = ((s.prompts, s.in_prompt), (s.own, s.in_own))
        of_prompts, of_own = (g.index_select(0, at.flatten()) * there.flatten()[:, None, None] for at, there in parts)
        return of_prompts, of_own, None


def _picked(of_prompts: Tensor, of_own: Tensor, s: SharedPromptIndex) -> Tensor:
    """For each token its row; zeros where there is none, in padding."""
    return torch.cat([of_prompts, of_own, of_own.new_zeros(1, *of_own.shape[1:])]).index_select(0, s.inverse)
