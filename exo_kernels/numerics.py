"""Number formats, and the transform from a head's matmul to the logits: scale, softcap and temperature."""

from typing import NamedTuple

import torch


class LogitTransform(NamedTuple):
    """z = outer * tanh(inner * x), or outer * x: logits of x = h W^T + bias. dz/dx is `factor` where nothing caps."""

    outer: float
    inner: float
    capped: bool
    factor: float

    @classmethod
    def of(cls, logit_scale: float, softcap: float | None, temperature: float) -> "LogitTransform":
        """z = softcap(scale * x) / temperature, softcap(a) = c tanh(a / c)."""
        factor = logit_scale / temperature
        if softcap is None:
            return cls(factor, 1.0, False, factor)
        return cls(softcap / temperature, logit_scale / softcap, True, factor)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
