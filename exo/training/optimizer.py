"""The optimizer, the learning rate schedule and activation checkpointing."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from exo.cli.options import Training


def optimizer(module: nn.Module, config: Training, rates: Mapping[nn.Module, float] | None = None) -> torch.optim.AdamW:
    """AdamW; no decay on vectors (norms, biases), as everywhere in the field.

    `rates` gives parts of the module a peak learning rate of their own.
    """
    examples = []
    for part, peak in (rates or {module: config.learning_rate}).items():
        parameters = [p for p in part.parameters() if p.requires_grad]
        examples += [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay, "peak": peak},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "peak": peak},
        ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(examples, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def _spare(module: nn.Module, config: Training) -> None:
    """Checkpointing and compilation of the causal LMs in it, where they are asked for."""
    models: list[Any] = [child for child in module.children() if hasattr(child, "gradient_checkpointing_enable")]
    for model in models:
        if config.gradient_checkpointing:
            checkpoint_layers(model, config.dropout)
        if config.compile:
            below = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
            below.base_model.compile(dynamic=True)


def checkpoint_layers(model: Any, dropout: bool) -> None:
    """Each layer makes its activations again in the backward pass; transformers does so only in training mode."""
    with warnings.catch_warnings():  # of another name to come, which the oldest transformers we take does not know
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if dropout:
        return
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False) is True and layer is not model:
            layer.training = True  # itself alone: what is below it stays in evaluation, and drops nothing out
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


def learning_rate_share(config: Training, steps: int, step: int) -> float:
    """Share of the peak learning rate at a step, counted from 0."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_scheduler_type == "linear" else 1.0
