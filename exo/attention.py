"""Who sees whom in a row of several texts: what a batch becomes as the arguments of a model's forward.

A row of one text needs nothing but its padding. Otherwise a mask says it, made of positions, so that a sliding window
reaches as far as in a text that stands alone: one mask for each kind of layer. On a GPU it is FlexAttention's, whose
blocks that nobody sees cost nothing; elsewhere it is dense. Left out: layers that no mask governs (state spaces,
linear attention), whose models are refused.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exo import profiling
from exo.head import CausalHead
from exo.packing import Batch, Sight

FLEX = "exo_flex"  # the name of our FlexAttention among transformers' implementations
FLASH = "flash_attention_2"  # takes lengths for a mask: for one row of texts that share nothing. Never tried on a GPU
KINDS = ("full_attention", "sliding_attention")


def refusal(config: Any) -> str:
    """Why a model cannot have several texts in a row, or ""."""
    kinds = set(getattr(config, "layer_types", None) or KINDS[:1])
    return f"it has layers of the kind {min(kinds - set(KINDS))}" if kinds - set(KINDS) else ""


def inputs(batch: Batch, config: Any) -> dict[str, Any]:
    """Arguments of the forward of a model with this config."""
    if batch.sight is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if config._attn_implementation == FLASH:
        return _for_flash(batch.input_ids, batch.sight)
    masks = {kind: _mask(batch.sight, window, config) for kind, window in _windows(config).items()}
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    return {
        "input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.sight.position_ids,
        "use_cache": False,
    }  # fmt: skip


def _for_flash(input_ids: Tensor, sight: Sight) -> dict[str, Any]:
    """Where the texts of one row begin and end; a window is told to the kernel by the model."""
    begins = (sight.unit[0].diff(prepend=sight.unit[0, :1] - 1) != 0).nonzero()[:, 0]
    ends = torch.cat([begins, begins.new_tensor([input_ids.shape[1]])]).int()
    longest = int(ends.diff().max())
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": input_ids, "position_ids": sight.position_ids, "use_cache": False, **lengths}


def rows(head: CausalHead, batch: Batch) -> Tensor:  # (n, D)
    """Hidden states of the rows that make the completions' tokens."""
    with profiling.section("body"):
        hidden = head.hidden(**inputs(batch, head.model.config))
    profiling.border(hidden, len(batch.rows), head.model, head.weight)
    return hidden.flatten(0, 1)[batch.rows]


def scored(batch: Batch) -> dict[str, Any]:
    """Arguments of the functions on hidden states that say what these rows are."""
    return {"labels": batch.targets, "cu_seqlens": batch.offsets, "shift": False}


def _windows(config: Any) -> dict[str, int | None]:
    """Kinds of layers, and how far each looks back."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:  # one kind for all, told by the window alone
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def _sees(query: Sight, key: Sight, window: int | None) -> Tensor:
    """Whether tokens see others that do not come after them in their row."""
    seen = (key.unit == query.unit) & ((key.part == 0) | (key.part == query.part))
    return seen if window is None else seen & (query.position_ids - key.position_ids < window)


def _mask(sight: Sight, window: int | None, config: Any) -> Any:
    return _blocks(sight, window) if config._attn_implementation == FLEX else _dense(sight, window, config)


def _dense(sight: Sight, window: int | None, config: Any) -> Tensor:  # (B, 1, T, T)
    length = sight.unit.shape[1]
    query, key = (Sight(*(tensor.unsqueeze(dim) for tensor in sight)) for dim in (2, 1))
    seen = (_sees(query, key, window) & torch.ones(length, length, dtype=torch.bool, device=sight.unit.device).tril())[
        :, None
    ]
    if config._attn_implementation != "eager":
        return seen
    # eager attention adds its mask to the scores; every token sees itself at least, so no row is -inf throughout
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)


def _blocks(sight: Sight, window: int | None) -> Any:
    def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, other = (Sight(*(tensor[b, index] for tensor in sight)) for index in (query, key))
        return _sees(at, other, window) & (key <= query)

    n, length = sight.unit.shape
    return block_mask(sees, n, length, length, sight.unit.device)


def block_mask(sees: Callable[..., Tensor], n: int, queries: int, keys: int, device: Any) -> Any:
    """FlexAttention's mask, of blocks that are skipped where nobody sees anybody."""
    from torch.nn.attention.flex_attention import create_block_mask

    compiled = torch.device(device).type == "cuda"  # uncompiled, all pairs of tokens are held at once
    return create_block_mask(sees, n, None, queries, keys, device=str(device), _compile=compiled)
