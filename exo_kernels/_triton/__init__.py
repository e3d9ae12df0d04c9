"""The Triton implementation: the functions of chunked, imported on first use."""

from exo_kernels._triton.group_loss import group_loss
from exo_kernels._triton.linear import chunk_gradient, chunk_logps, chunk_logps_and_gradient
from exo_kernels._triton.token_logps import new_gradient, token_logps, token_logps_backward

__all__ = [
    "chunk_gradient",
    "chunk_logps",
    "chunk_logps_and_gradient",
    "group_loss",
    "new_gradient",
    "token_logps",
    "token_logps_backward",
]
