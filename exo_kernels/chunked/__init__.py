"""The implementation for any device, in plain torch: the functions of _triton again, on tiles that stay in cache."""

from exo_kernels.chunked.group_loss import group_loss
from exo_kernels.chunked.linear import chunk_gradient, chunk_logps, chunk_logps_and_gradient, new_buffer
from exo_kernels.chunked.token_logps import new_gradient, token_logps, token_logps_backward

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
