"""Which implementation runs. Explicit requests are honoured or refused, never replaced; only "auto" may choose."""

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch

Impl = Literal["auto", "triton", "chunked", "reference"]
IMPLS = ("auto", "triton", "chunked", "reference")
# Both are settled before triton is imported and cannot change afterwards.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def resolve(impl: str, device: torch.device) -> str:
    """Name the implementation for tensors on `device`. ValueError where an explicit request cannot run."""
    if impl == "auto":
        return "triton" if device.type == "cuda" and TRITON_INSTALLED else "chunked"
    if impl == "reference" and device.type == "meta":
        raise ValueError("impl: expected tensors with values for 'reference'; got meta tensors")
    if impl == "triton":
        if not TRITON_INSTALLED:
            raise ValueError("impl: expected an installed triton package for 'triton'; got none: pip install triton")
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(f"impl: expected GPU tensors for 'triton', or TRITON_INTERPRET=1; got {device}")
    return impl


KERNEL_OBJECTIVES = ("exo", "dpo")  # what _triton/group_loss.py computes


def implementation(impl: str) -> ModuleType:
    return importlib.import_module("exo_kernels._triton" if impl == "triton" else f"exo_kernels.{impl}")


def group_implementation(objective: str, impl: str) -> ModuleType:
    """An objective without a kernel runs in torch: it is K scalars a prompt."""
    return implementation(impl if objective in KERNEL_OBJECTIVES else "chunked")
