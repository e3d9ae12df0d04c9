"""Fused losses for preference alignment of language models: EXO, DPO, and the log-probabilities they are made of.

Importing this needs torch alone; triton is imported when a kernel is first used. See README.md for the shapes.
"""

from exo_kernels import reference
from exo_kernels.api.hidden import (
    explain,
    fused_linear_dpo_loss,
    fused_linear_exo_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from exo_kernels.api.logits import fused_dpo_loss, fused_exo_loss, preference_loss, sequence_logps, token_logps
from exo_kernels.api.modules import EXOLoss, LinearEXOLoss
from exo_kernels.objectives import LossStats

__version__ = "0.1.0"

__all__ = [
    "EXOLoss",
    "LinearEXOLoss",
    "LossStats",
    "explain",
    "fused_dpo_loss",
    "fused_exo_loss",
    "fused_linear_dpo_loss",
    "fused_linear_exo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "preference_loss",
    "reference",
    "sequence_logps",
    "token_logps",
]
