"""Slowdowns to plant in the kernels, to see that the guard finds them: `pytest benchmarks/ --plant NAME`.

They wrap private functions of the CPU's implementation.
"""

from collections.abc import Callable
from typing import Any

import torch

from exo_kernels import chunked, groups
from exo_kernels.schedules import chunks

SetAttribute = Callable[[Any, str, Any], None]  # of a module or class: the built-in, or pytest's monkeypatch


def _extra_pass(set_attribute: SetAttribute) -> None:
    """Read and write every chunk of gradients once more."""

    def twice(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(out: torch.Tensor, *arguments: Any) -> Any:
            result = original(out, *arguments)
            out.mul_(1.0)
            return result

        return wrapper

    for name in ("chunk_logps_and_gradient", "chunk_gradient", "token_logps_backward"):
        set_attribute(chunked, name, twice(getattr(chunked, name)))


def _weight_gradient_copy(set_attribute: SetAttribute) -> None:
    """Copy the gradient of the head once more."""
    original = chunks.Gradients.finish

    def finish(self: chunks.Gradients) -> Any:
        hidden, weight, bias = original(self)
        return hidden, weight.clone(), bias

    set_attribute(chunks.Gradients, "finish", finish)


def _logits_copy(set_attribute: SetAttribute) -> None:
    """Keep a full fp32 copy of the logits."""
    original = chunks.Workspace.logits

    def logits(self: chunks.Workspace, rows: Any, with_ref: bool = False) -> Any:
        hidden, targets, a = original(self, rows, with_ref)
        self.copies = [*getattr(self, "copies", []), a.float().clone()]
        return hidden, targets, a

    set_attribute(chunks.Workspace, "logits", logits)


def _logit_in_fp32(set_attribute: SetAttribute) -> None:
    """Take the target's logit from the fp32 matmul, instead of adding it up in fp64."""

    def rounding_error(self: chunks.Workspace, stats: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(stats[0])

    set_attribute(chunks.Workspace, "_rounding_error", rounding_error)


def _sums_in_fp32(set_attribute: SetAttribute) -> None:
    """Add up the log-probs of a sequence one after another in fp32, instead of in fp64."""

    def segment_sum(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        running = torch.nn.functional.pad(values.float().cumsum(0), (1, 0))
        return (running[offsets[1:]] - running[offsets[:-1]]).to(values.dtype)

    set_attribute(groups, "segment_sum", segment_sum)


SLOWDOWNS: dict[str, Callable[[SetAttribute], None]] = {
    "extra-pass": _extra_pass,
    "weight-gradient-copy": _weight_gradient_copy,
    "logits-copy": _logits_copy,
    "logit-in-fp32": _logit_in_fp32,
    "sums-in-fp32": _sums_in_fp32,
}
