"""Create the accelerator and place models on its device."""

import importlib.util
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import accelerate
import torch
from accelerate import Accelerator as Accelerator  # the type, for packages that must not import accelerate
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from exo.cli.errors import ConfigError
from exo.distributed import deepspeed, fsdp

TIMEOUT = timedelta(hours=2)  # of collectives, while rank 0 writes a large model; a rank that ends is noticed at once


class Training(NamedTuple):
    """Options of a stage that trains, which FSDP and DeepSpeed depend on or do not support."""

    fsdp: bool = False
    compile: bool = False
    load_in_4bit: bool = False
    max_grad_norm: float = 1.0


def make_accelerator(
    dtype: str = "auto",
    device: str = "auto",
    output_dir: str | None = None,
    *,
    report_to: str = "none",
    training: Training | None = None,  # None: the stage does not train
) -> Accelerator:
    """Create the accelerator, on the CPU unless there is a CUDA or ROCm GPU: sums need float64.

    ConfigError if the options do not go together with FSDP or DeepSpeed where one of them is requested.
    """
    if dtype == "auto":
        on_gpu = device != "cpu" and torch.cuda.is_available()
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bf16 else "float32"
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        # accelerate would drop a tracker that is not installed
        raise ConfigError(f"--report_to {report_to}: not installed; pip install {report_to}")
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    if fsdp.is_requested(training is not None and training.fsdp):
        unsupported = (training.compile, training.load_in_4bit) if training is not None else (False, False)
        fsdp.refuse(mixed, *unsupported)
    cpu = device == "cpu" or not torch.cuda.is_available()
    if training is not None:
        deepspeed.refuse(mixed, **training._asdict())
    deepspeed.choose_device(cpu)
    # hide the launcher's request: accelerate shards on GPUs only, and runs DeepSpeed with a loop of its own
    names = [name for name in (fsdp.LAUNCHER, deepspeed.LAUNCHER) if name in os.environ]
    launchers = {name: os.environ.pop(name) for name in names}
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    os.environ.update(launchers)
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(f"accelerate: expected one process, DDP, FSDP or DeepSpeed, and no other; got {kind}")
    accelerator.gradient_accumulation_steps = 1  # whatever the environment says; our denominator counts the whole step
    return accelerator


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's random states, on all devices."""
    accelerate.utils.set_seed(seed)


def place(model: Any, accelerator: Accelerator, shard: bool, exact: Sequence[nn.Module] = ()) -> Any:
    """Move the model to this rank's device, sharded over the ranks if FSDP is requested, and return it."""
    return fsdp.shard(model, accelerator, exact) if fsdp.is_requested(shard) else model.to(accelerator.device)


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype that the model computes in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
