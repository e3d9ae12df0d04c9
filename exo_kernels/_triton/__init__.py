"""The Triton implementation: the functions of chunked again. Loaded on first use, so importing needs torch alone."""

from exo_kernels._triton.group_loss import group_loss
from exo_kernels._triton.linear import chunk_gradient, chunk_logps, chunk_logps_and_gradient, new_buffer
from exo_kernels._triton.token_logps import new_gradient, token_logps, token_logps_backward

__all__ = [
    "chunk_gradient",
    "chunk_logps",
    "chunk_logps_and_gradient",
    "group_loss",
    "new_buffer",
    "new_gradient",
    "token_logps",
    "token_logps_backward",
]
