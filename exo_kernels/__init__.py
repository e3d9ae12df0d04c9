"""Fused losses for preference alignment of language models: EXO, DPO and their log-probabilities.

Importing the package needs only torch; triton is imported when a kernel is first used. See README.md for the shapes.
"""

from exo_kernels import reference
from exo_kernels.api.explain import explain
from exo_kernels.api.hidden import (
    fused_linear_dpo_loss,
    fused_linear_exo_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from exo_kernels.api.logits import fused_dpo_loss, fused_exo_loss, preference_loss, sequence_logps, token_logps
from exo_kernels.api.modules import EXOLoss, LinearEXOLoss
from exo_kernels.objectives import LossStats

__version__ = "0.2.0"

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
