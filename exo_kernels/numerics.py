"""Number formats, and the transform between a head's matmul and the logits: scale, softcap and temperature."""

from typing import NamedTuple

import torch


class LogitTransform(NamedTuple):
    """z = outer * tanh(inner * x), or outer * x if inner is 0: logits of x = h W^T + bias.

    dz/dx is `factor` times what the cap leaves, 1 - tanh(inner * x)^2.
    """

    outer: float
    inner: float
    factor: float

    @classmethod
    def of(cls, logit_scale: float, softcap: float | None, temperature: float) -> "LogitTransform":
        """Build z = softcap(scale * x) / temperature, softcap(a) = c tanh(a / c)."""
        factor = float(logit_scale) / float(temperature)
        if softcap is None:
            return cls(factor, 0.0, factor)
        return cls(float(softcap) / float(temperature), float(logit_scale) / float(softcap), factor)

    @property
    def capped(self) -> bool:
        return self.inner != 0.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits, softmax and sums are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
