"""Create the accelerator and place models on its device."""

import importlib.util
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from exo.cli.errors import ConfigError
from exo.cli.options import Compute, Training
from exo.distributed import deepspeed, fsdp

PATIENCE = timedelta(hours=2)  # of processes with one that writes a large model; one that has ended ends them at once


def make_accelerator(config: Compute) -> Accelerator:
    """accelerate, set up as the options say. Without a GPU of CUDA's or ROCm's it is the CPU: sums need float64."""
    dtype = config.dtype
    if dtype == "auto":
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bf16 else "float32"
    tracker = config.report_to if isinstance(config, Training) else "none"
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        # accelerate would drop a tracker that is not installed
        raise ConfigError(f"--report_to {tracker}: not installed; pip install {tracker}")
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    if fsdp.is_requested(config):
        fsdp.refuse(config, mixed)
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    deepspeed.refuse(config, mixed)
    deepspeed.choose_device(cpu)
    # accelerate would do it, but shards on GPUs alone, and DeepSpeed with a loop of its own
    names = [name for name in (fsdp.LAUNCHER, deepspeed.LAUNCHER) if name in os.environ]
    launchers = {name: os.environ.pop(name) for name in names}
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        log_with=None if tracker == "none" else tracker,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    os.environ.update(launchers)
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(f"accelerate: expected one process, DDP, FSDP or DeepSpeed, and no other; got {kind}")
    accelerator.gradient_accumulation_steps = 1  # the environment may say otherwise; the denominator is ours
    return accelerator


def place(model: Any, config: Compute, accelerator: Accelerator, exact: Sequence[nn.Module] = ()) -> Any:
    """The model itself, on this process's device; in shards, where they are asked for (sharding.shard)."""
    return fsdp.shard(model, accelerator, exact) if fsdp.is_requested(config) else model.to(accelerator.device)


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
