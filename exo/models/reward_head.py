"""Compute the output of a sequence classifier for each completion of a batch.

transformers' decoder classifiers find a row's last token by comparing ids with the pad id, which is wrong if a
completion ends with the pad id. Here the lengths give the last token. The head runs in fp32, because 16 bits would make
ties. Classifiers that pool in another way (the first token, a mean, a pooler) are recognised by their output on a few
tokens, and run unchanged in fp32 on rows without padding; they cannot be trained here.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from exo.data.collate import Batch
from exo.distributed import fsdp
from exo.models.lm_head import eval_mode

NAMES = ("score", "classifier")  # of the head, in transformers' classifiers
FIT, ROUGH_FIT = 1e-4, 3e-2  # relative, with weights in fp32 and in 16 bits


class RewardHead:
    """A reward for each row of a batch: the one output, or the log-odds of class 1 of two.

    Runs the model once on three tokens, without gradients and without drawing random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        heads = [getattr(model, name) for name in NAMES if isinstance(getattr(model, name, None), nn.Linear)]
        self.head: Any = heads[0] if len(heads) == 1 and self._pools_last(heads[0]) else None

    def __call__(self, batch: Batch) -> Tensor:  # (N,) float32
        ids, mask = batch.input_ids, batch.attention_mask
        outputs = self._forward(ids, mask) if self.head is None else self._from_last_token(self.head, ids, mask)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs[:, 1] - outputs[:, 0]

    def _from_last_token(self, head: nn.Linear, ids: Tensor, mask: Tensor) -> Tensor:  # (N, outputs)
        hidden = self._run(self.model.base_model, ids, mask).last_hidden_state  # (N, T, D)
        rows = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        with torch.autocast(rows.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(rows.float(), head.weight.float(), bias)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # (N, outputs)
        """Return the model's output, computed on rows of equal length."""
        lengths = mask.sum(1)
        by_row: dict[int, Tensor] = {}
        with torch.autocast(ids.device.type, enabled=False):
            for length in lengths.unique().tolist():
                (places,) = (lengths == length).nonzero(as_tuple=True)
                outputs = self._run(self.model, ids[places, :length], mask[places, :length]).logits.float()
                by_row |= zip(places.tolist(), outputs, strict=True)
        return torch.stack([by_row[i] for i in range(len(ids))])

    @torch.no_grad()
    def _pools_last(self, head: nn.Linear) -> bool:
        """Return whether the model applies the head to the last token."""
        pad = getattr(self.model.config, "pad_token_id", None)
        ids = torch.tensor([[i for i in range(4) if i != pad][:3]], device=head.weight.device)
        mask = torch.ones_like(ids)

        def call() -> tuple[Tensor, Tensor, torch.dtype]:
            return self._forward(ids, mask), self._from_last_token(head, ids, mask), head.weight.dtype

        with eval_mode(self.model):
            expected, outputs, dtype = fsdp.run_unsharded_root(self.model, call)
        fit = FIT if dtype in (torch.float32, torch.float64) else ROUGH_FIT
        return expected.shape == outputs.shape and torch.allclose(expected, outputs, fit, fit)

    def _run(self, module: nn.Module, ids: Tensor, mask: Tensor) -> Any:
        accepted = inspect.signature(module.forward).parameters
        options = {"use_cache": False} if "use_cache" in accepted else {}
        return module(input_ids=ids, attention_mask=mask, **options)
