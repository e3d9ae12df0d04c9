"""Check that a model's weights are finite, that some can be trained, and that training changes them."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo.cli.errors import RunError
from exo.distributed import gather
from exo.distributed.fsdp import local_tensor

MOVED = "moved"  # a counter of the training loop: 1 once a weight has changed


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the name of the first tensor with a NaN or infinite element, or ""; of a sharded tensor check the shard.

    Reads each tensor once and allocates nothing of its size.
    """
    for name, tensor in named:
        tensor = local_tensor(tensor).detach()
        if tensor.is_floating_point() and tensor.numel():
            if not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
                return name
    return ""


def refuse_not_finite(named: Iterable[tuple[str, Tensor]], what: str, accelerator: Accelerator) -> None:
    """Raise RunError on all ranks if a tensor of any rank is not finite; `what` completes the sentence."""
    name = next(filter(None, gather.all_gather_json(not_finite(named), accelerator)), "")
    if name:
        raise RunError(f"the weights are not finite ({name}), so {what}; lower --learning_rate")


def named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Return the parameters and the persistent buffers of a model by name."""
    return ((name, tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor))


class Movement:
    """Tracks whether training has changed any weight of the model that is to be saved."""

    def __init__(self, module: nn.Module, accelerator: Accelerator) -> None:
        """Raise RunError if the model (`module.model`, or the module itself) has no trainable parameter."""
        model = getattr(module, "model", module)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.accelerator = accelerator
        if not self.trained:
            raise RunError(f"nothing to train: every weight of {type(model).__name__} is frozen")
        self.digests: list[int] = []

    def begin(self) -> None:
        """Record the weights before the first step of this process."""
        self.digests = self._digests()

    def update(self, counters: dict[str, float]) -> None:
        """Set the counter if a weight has changed on any rank; costs nothing once it is set."""
        if not counters.setdefault(MOVED, 0.0):
            changed = self.digests != self._digests()
            counters[MOVED] = float(any(gather.all_gather_json(changed, self.accelerator)))

    def _digests(self) -> list[int]:
        """Compute an exact checksum of each tensor's bits."""
        return [_checksum(local_tensor(parameter).detach()) for parameter in self.trained]


def _checksum(tensor: Tensor) -> int:
    bits: Any = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.uint8)
    return int(tensor.contiguous().view(bits).sum(dtype=torch.int64))


def check_moved(counters: dict[str, float], steps: int) -> None:
    """Raise RunError if all steps of the run changed no weight."""
    if not counters.get(MOVED, 1.0):
        skipped = f", {counters['not_finite']:,.0f} of whose updates were skipped" * bool(counters["not_finite"])
        raise RunError(
            f"no weight has changed after {steps:,} steps{skipped}: every gradient was 0, or --learning_rate is too "
            "small to change a weight in fp32"
        )
