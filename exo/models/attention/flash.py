"""Build the inputs of flash-attn's varlen attention: one row of packed texts. Not tested on a GPU yet."""

from typing import Any

import torch
from torch import Tensor

from exo.data.collate import SegmentIds

FLASH = "flash_attention_2"  # transformers' name


def inputs(input_ids: Tensor, segment_ids: SegmentIds) -> dict[str, Any]:
    """Return the forward arguments of a batch of one row. The model passes its sliding window to the kernel."""
    segment = segment_ids.segment[0]  # (T,)
    starts = (segment.diff(prepend=segment[:1] - 1) != 0).nonzero()[:, 0]
    offsets = torch.cat([starts, starts.new_tensor([input_ids.shape[1]])]).int()  # (texts + 1,) int32
    longest = int(offsets.diff().max())
    lengths = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": input_ids, "position_ids": segment_ids.position_ids, "use_cache": False, **lengths}
