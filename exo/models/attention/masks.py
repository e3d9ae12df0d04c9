"""Who sees whom in a row of several texts: what a batch becomes as the arguments of a model's forward.

A row of one text needs nothing but its padding. Otherwise a mask says it, made of positions, so that a sliding window
reaches as far as in a text that stands alone: one mask for each kind of layer. On a GPU it is FlexAttention's, whose
blocks that nobody sees cost nothing; elsewhere it is dense. Left out: layers that no mask governs (state spaces,
linear attention), whose models are refused.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo.data.collate import Batch, SegmentIds
from exo.models.lm_head import LMHead

FLEX = "exo_flex"  # the name of our FlexAttention among transformers' implementations
FLASH = "flash_attention_2"  # takes lengths for a mask: for one row of texts that share nothing. Never tried on a GPU
SEGMENTS = "exo_segments"  # that of exo.models.attention.shared_prompt
KINDS = ("full_attention", "sliding_attention")


def unsupported_reason(config: Any) -> str:
    """Why a model cannot have several texts in a row, or ""."""
    kinds = set(getattr(config, "layer_types", None) or KINDS[:1])
    return f"it has layers of the kind {min(kinds - set(KINDS))}" if kinds - set(KINDS) else ""


def inputs(batch: Batch, config: Any) -> dict[str, Any]:
    """Arguments of the forward of a model with this config."""
    if batch.segment_ids is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if config._attn_implementation == FLASH:
        return _for_flash(batch.input_ids, batch.segment_ids)
    if config._attn_implementation == SEGMENTS:
        found = SharedPromptIndex.of(batch)
        return {"input_ids": batch.input_ids, "position_ids": batch.segment_ids.position_ids, "use_cache": False,
                "exo_segments": found}  # fmt: skip
    masks = {kind: _mask(batch.segment_ids, window, config) for kind, window in _windows(config).items()}
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    return {
        "input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.segment_ids.position_ids,
        "use_cache": False,
    }  # fmt: skip


class SharedPromptIndex(NamedTuple):
    """Where the U prompts and the N completions of a batch stand among its flattened tokens.

    Of one that is shorter than the longest, the places beyond its end are its last.
    """

    prompts: Tensor  # (U, P)
    in_prompt: Tensor  # (U, P) bool
    own: Tensor  # (N, R)
    in_own: Tensor  # (N, R) bool
    unit: Tensor  # (N,)
    inverse: Tensor  # (B T,) for each token its place among those of prompts and completions, one after the other
    masks: dict[Any, Tensor | None]  # made when first asked for, once a batch

    @classmethod
    def of(cls, batch: Batch) -> "SharedPromptIndex":
        device = batch.input_ids.device
        prompts, prompt_sizes, own, sizes, unit = [], [], [], [], []
        for i, span in enumerate(batch.spans):
            prompts.append(span.start)
            prompt_sizes.append(span.prompt)
            start = span.start + span.prompt
            for size in span.completions:
                own.append(start)
                sizes.append(size)
                unit.append(i)
                start += size

        def places(starts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
            begin, length = torch.tensor(starts), torch.tensor(lengths)
            at = torch.arange(max(lengths))
            found = begin[:, None] + torch.minimum(at, length[:, None] - 1)
            return found.to(device), (at < length[:, None]).to(device)

        prompt_places, in_prompt = places(prompts, prompt_sizes)
        own_places, in_own = places(own, sizes)
        there = torch.cat([in_prompt.flatten(), in_own.flatten()])
        inverse = torch.full((batch.input_ids.numel(),), len(there), device=device)  # beyond the last: there is none
        inverse[torch.cat([prompt_places.flatten(), own_places.flatten()])[there]] = there.nonzero()[:, 0]
        unit_of = torch.tensor(unit, device=device)
        return cls(prompt_places, in_prompt, own_places, in_own, unit_of, inverse, {})

    def prompt_mask(self, window: int | None) -> Tensor | None:  # (P, P); None: causal
        if window is None or window >= self.prompts.shape[1]:
            return None
        return self._once(
            ("prompt", window), lambda window: causal_band(self.prompts.shape[1], window, self.prompts.device)
        )

    def own_mask(self, window: int | None) -> Tensor:  # (N, 1, R, P + R)
        found = self._once(("own", window), self._own)
        assert found is not None
        return found

    def _once(self, key: tuple[str, int | None], make: Callable[[int | None], Tensor]) -> Tensor | None:
        if key not in self.masks:
            self.masks[key] = make(key[1])
        return self.masks[key]

    def _own(self, window: int | None) -> Tensor:
        at = torch.arange(self.own.shape[1], device=self.own.device)
        before = self.in_prompt[self.unit]  # (N, P)
        sizes = before.sum(1)[:, None, None]
        ago = sizes + at[:, None] - torch.arange(before.shape[1], device=at.device)  # (N, R, P)
        seen = before[:, None, :].expand(-1, len(at), -1)
        own = (at[:, None] >= at).expand(len(before), -1, -1)
        if window is not None:
            seen, own = seen & (ago < window), own & (at[:, None] - at < window)
        return torch.cat([seen, own], 2)[:, None]


def causal_band(length: int, window: int | None, device: torch.device) -> Tensor:  # (T, T)
    """Causal attention that looks back so far."""
    at = torch.arange(length, device=device)
    ago = at[:, None] - at
    return (ago >= 0) & (ago < (length if window is None else window))


def _for_flash(input_ids: Tensor, segment_ids: SegmentIds) -> dict[str, Any]:
    """Where the texts of one row begin and end; a window is told to the kernel by the model."""
    begins = (segment_ids.segment[0].diff(prepend=segment_ids.segment[0, :1] - 1) != 0).nonzero()[:, 0]
    ends = torch.cat([begins, begins.new_tensor([input_ids.shape[1]])]).int()
    longest = int(ends.diff().max())
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": input_ids, "position_ids": segment_ids.position_ids, "use_cache": False, **lengths}


def completion_hidden(head: LMHead, batch: Batch) -> Tensor:  # (n, D)
    """Hidden states of the rows that make the completions' tokens."""
    hidden = head.hidden(**inputs(batch, head.model.config))
    return hidden.flatten(0, 1)[batch.rows]


def loss_inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the functions on hidden states that say what these rows are."""
    return {"labels": batch.targets, "cu_seqlens": batch.offsets, "shift": False}


def _windows(config: Any) -> dict[str, int | None]:
    """Kinds of layers, and how far each looks back."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:  # one kind for all, told by the window alone
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def _sees(query: SegmentIds, key: SegmentIds, window: int | None) -> Tensor:
    """Whether tokens see others that do not come after them in their row."""
    seen = (key.segment == query.segment) & ((key.completion == 0) | (key.completion == query.completion))
    return seen if window is None else seen & (query.position_ids - key.position_ids < window)


def _mask(segment_ids: SegmentIds, window: int | None, config: Any) -> Any:
    return _blocks(segment_ids, window) if config._attn_implementation == FLEX else _dense(segment_ids, window, config)


def _dense(segment_ids: SegmentIds, window: int | None, config: Any) -> Tensor:  # (B, 1, T, T)
    length = segment_ids.segment.shape[1]
    query, key = (SegmentIds(*(tensor.unsqueeze(dim) for tensor in segment_ids)) for dim in (2, 1))
    seen = (
        _sees(query, key, window)
        & torch.ones(length, length, dtype=torch.bool, device=segment_ids.segment.device).tril()
    )[:, None]
    if config._attn_implementation != "eager":
        return seen
    # eager attention adds its mask to the scores; every token sees itself at least, so no row is -inf throughout
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -math.inf)


def _blocks(segment_ids: SegmentIds, window: int | None) -> Any:
    def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, other = (SegmentIds(*(tensor[b, index] for tensor in segment_ids)) for index in (query, key))
        return _sees(at, other, window) & (key <= query)

    n, length = segment_ids.segment.shape
    return block_mask(sees, n, length, length, segment_ids.segment.device)


def block_mask(sees: Callable[..., Tensor], n: int, queries: int, keys: int, device: Any) -> Any:
    """FlexAttention's mask, of blocks that are skipped where nobody sees anybody."""
    from torch.nn.attention.flex_attention import create_block_mask

    compiled = torch.device(device).type == "cuda"  # uncompiled, all pairs of tokens are held at once
    return create_block_mask(sees, n, None, queries, keys, device=str(device), _compile=compiled)
