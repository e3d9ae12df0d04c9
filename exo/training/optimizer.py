"""The optimizer, the learning rate schedule and activation checkpointing."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn


class OptimizerSettings(NamedTuple):
    """AdamW and its schedule; the fields have the names of the options."""

    learning_rate: float = 1e-6  # the peak
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_steps: int = 0  # overrides warmup_ratio if > 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping


def optimizer(
    module: nn.Module, settings: OptimizerSettings, rates: Mapping[nn.Module, float] | None = None
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, without decay on vectors (norms, biases).

    `rates` gives parts of the module a peak learning rate of their own.
    """
    groups = []
    for part, peak in (rates or {module: settings.learning_rate}).items():
        parameters = [p for p in part.parameters() if p.requires_grad]
        groups += [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay, "peak": peak},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "peak": peak},
        ]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True)


def learning_rate_share(settings: OptimizerSettings, steps: int, step: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0."""
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if settings.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if settings.lr_scheduler_type == "linear" else 1.0


def enable_gradient_checkpointing(model: Any, dropout: bool) -> None:
    """Recompute the activations of each layer in the backward pass; transformers does so in training mode only."""
    with warnings.catch_warnings():  # the new name is unknown to the oldest transformers that we support
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if dropout:
        return
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False) is True and layer is not model:
            layer.training = True  # the layer alone: its children stay in evaluation mode, without dropout
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)
