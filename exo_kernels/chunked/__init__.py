"""The implementation in plain torch for any device: the functions of _triton, on tiles that stay in cache."""

from exo_kernels.chunked.group_loss import group_loss
from exo_kernels.chunked.linear import chunk_gradient, chunk_logps, chunk_logps_and_gradient
from exo_kernels.chunked.token_logps import new_gradient, token_logps, token_logps_backward

__all__ = [
    "chunk_gradient",
    "chunk_logps",
    "chunk_logps_and_gradient",
    "group_loss",
    "new_gradient",
    "token_logps",
    "token_logps_backward",
]
