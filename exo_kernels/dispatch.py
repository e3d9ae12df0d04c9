"""Choice of the implementation. An explicit request is honoured or refused, never replaced; only "auto" chooses."""

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch

Impl = Literal["auto", "triton", "chunked", "reference"]
IMPLS = ("auto", "triton", "chunked", "reference")
# Both are fixed before triton is imported.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def resolve(impl: str, device: torch.device) -> str:
    """Return the implementation for tensors on `device`. Raise ValueError if an explicit request cannot run there."""
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


def implementation(impl: str) -> ModuleType:
    """Import an implementation on first use."""
    return importlib.import_module("exo_kernels._triton" if impl == "triton" else f"exo_kernels.{impl}")
