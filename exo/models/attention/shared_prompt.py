"""Attention for shared prompts without a mask over all pairs of tokens, for devices without FlexAttention kernels.

Prompts attend to themselves, and each completion to its prompt and itself: as exact as a dense mask, and cheaper.
Softcaps are not supported; their models use a mask.
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
    if exo_segments is None:  # rows with one text, or a model that does not pass arguments to its attention
        mask = None if sliding_window is None else causal_band(query.shape[2], sliding_window, query.device)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    index, (n, heads, length, width) = exo_segments, query.shape
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout if module.training else 0.0}

    def split(x: Tensor) -> tuple[Tensor, Tensor]:  # (U, H, P, d), (N, H, R, d)
        x = x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] < heads else x
        prompts, completions = _Split.apply(x.transpose(1, 2).reshape(n * length, heads, width), index)
        return (
            prompts.view(*index.prompts.shape, heads, width).transpose(1, 2),
            completions.view(*index.completions.shape, heads, width).transpose(1, 2),
        )

    (prompt_q, q), (prompt_k, k), (prompt_v, v) = map(split, (query, key, value))
    prompt_mask, mask = index.masks_for(sliding_window)
    causal = prompt_mask is None
    prompts = scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, prompt_mask, is_causal=causal, **options)
    k = torch.cat([prompt_k.index_select(0, index.prompt_of), k], 2)  # (N, H, P + R, d)
    v = torch.cat([prompt_v.index_select(0, index.prompt_of), v], 2)
    completions = scaled_dot_product_attention(q, k, v, mask, **options)
    out = _Join.apply(*(x.transpose(1, 2).reshape(-1, heads, width) for x in (prompts, completions)), index)
    return out.view(n, length, heads, width), None


class _Split(torch.autograd.Function):
    """Select the rows of prompts and of completions. All rows differ, so the gradient is a selection too, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: SharedPromptIndex) -> tuple[Tensor, Tensor]:
        ctx.index = index
        return x.index_select(0, index.prompts.flatten()), x.index_select(0, index.completions.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        prompts, completions = gradients
        return _select_tokens(prompts, completions, ctx.index), None


class _Join(torch.autograd.Function):
    """Invert `_Split`. Rows past the end of a text are dropped, and their gradient is 0."""

    @staticmethod
    def forward(ctx: Any, prompts: Tensor, completions: Tensor, index: SharedPromptIndex) -> Tensor:
        ctx.index = index
        return _select_tokens(prompts, completions, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), index = gradients, ctx.index

        def select(indices: Tensor, used: Tensor) -> Tensor:
            return gradient.index_select(0, indices.flatten()) * used.flatten()[:, None, None]

        return select(index.prompts, index.in_prompt), select(index.completions, index.in_completion), None


def _select_tokens(prompts: Tensor, completions: Tensor, index: SharedPromptIndex) -> Tensor:
    """Return the row of each token; zeros for padding."""
    padding = completions.new_zeros(1, *completions.shape[1:])
    return torch.cat([prompts, completions, padding]).index_select(0, index.inverse)
