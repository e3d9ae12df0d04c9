"""The Triton implementation: the functions of chunked.py again. Loaded on first use, so importing needs torch alone."""

from exo_kernels._triton.group_loss import group_loss
from exo_kernels._triton.token_logps import new_gradient, token_logps, token_logps_backward

__all__ = ["group_loss", "new_gradient", "token_logps", "token_logps_backward"]
