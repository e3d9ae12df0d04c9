"""DeepSpeed's ZeRO, stages 1 and 2: each rank has all weights, a part of the moments, and of the gradient in stage 2.

accelerate's launcher requests it, and its plugin reads the launcher's settings. The training step stays ours, and
--dtype is autocast over fp32 weights, as under DDP. Left out: stage 3, for which there is --fsdp; offloading; weights
in 16 bits; DeepSpeed's own checkpoints, which are pickles.
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from exo.cli.errors import ConfigError

LAUNCHER = "ACCELERATE_USE_DEEPSPEED"  # set by accelerate's launcher
BUCKET = 50_000_000  # numbers that are reduced or gathered at a time: 0.2 GB of fp32, where DeepSpeed would take 2
AUTO = ("auto", None)
# options of zero_optimization about communication, which change results by the order of sums only
PASSED_ON = {"overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions"}
PASSED_ON |= {"reduce_bucket_size", "allgather_bucket_size"}
# logging, and options that are set here in any case
IDLE = {"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}


def is_launched() -> bool:
    return os.environ.get(LAUNCHER, "").lower() == "true"


def is_requested() -> bool:
    """Return whether the launcher requests DeepSpeed on more than one rank."""
    return is_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def choose_device(cpu: bool) -> None:
    """Choose the CPU if --device says so, because DeepSpeed takes a GPU when it is imported."""
    if is_launched() and cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"


def refuse(mixed_precision: str, *, fsdp: bool, compile: bool, load_in_4bit: bool, max_grad_norm: float) -> None:
    """Raise ConfigError for options of a training stage that do not go together with DeepSpeed, if it is requested."""
    if not is_launched():
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed: requested by accelerate's launcher, but not installed; pip install 'exo-kernels[deepspeed]'"
        )
    if mixed_precision == "fp16":
        raise ConfigError("DeepSpeed: expected --dtype bfloat16 or float32; got float16")
    for name, is_set in (("fsdp", fsdp), ("compile", compile), ("load_in_4bit", load_in_4bit)):
        if is_set:
            raise ConfigError(f"DeepSpeed: does not go together with --{name}")
    settings(max_grad_norm, mixed_precision)


def settings(max_grad_norm: float, mixed_precision: str) -> dict[str, Any]:
    """Return DeepSpeed's configuration, from the launcher's settings; ConfigError if one is not supported."""
    from accelerate.utils import DeepSpeedPlugin

    try:
        given = dict(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, OSError) as error:
        raise ConfigError(f"DeepSpeed: {str(error).splitlines()[0]}") from None
    zero = dict(given.pop("zero_optimization", {}))
    stage = zero.pop("stage", 0)
    if stage not in (1, 2):
        instead = {0: "which is DDP: leave DeepSpeed out", 3: "which is what --fsdp does"}
        raise ConfigError(f"DeepSpeed: expected ZeRO stage 1 or 2; got {stage}, {instead.get(stage, 'unknown')}")
    ours = {
        "train_batch_size": (), "train_micro_batch_size_per_gpu": (), "gradient_accumulation_steps": (1,),
        "gradient_clipping": (max_grad_norm,), "fp16": (), "bf16": (),
    }  # fmt: skip
    for name, value in given.items():
        setting = value.get("enabled") if isinstance(value, Mapping) else value
        if name not in ours and name not in IDLE:
            raise ConfigError(f"DeepSpeed: its setting {name} is not for this version")
        if name in ours and setting not in (*AUTO, *ours[name]) and setting is not False:
            hint = f" (--max_grad_norm is {max_grad_norm:g})" if name == "gradient_clipping" else ""
            raise ConfigError(
                f"DeepSpeed: its setting {name}: expected auto, which takes our options{hint}; got {setting}"
            )
    for name, value in zero.items():
        off = value in (*AUTO, False) or isinstance(value, Mapping) and value.get("device") in (None, "none")
        if name not in PASSED_ON and not name.startswith("stage3_") and not off:
            raise ConfigError(f"DeepSpeed: its setting zero_optimization.{name} is not for this version; got {value}")
    parts = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    parts |= {name: value for name, value in zero.items() if name in PASSED_ON and value not in AUTO}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # DeepSpeed would divide by them; our denominator counts the whole step
        "gradient_clipping": max_grad_norm,
        "zero_optimization": parts,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed disables the autocast around it, so it makes the same one itself
        "torch_autocast": {"enabled": mixed_precision == "bf16", "dtype": "bfloat16",
                           "lower_precision_safe_modules": []},  # reduce all gradients in fp32
    }  # fmt: skip


def prepare(module: nn.Module, optim: torch.optim.Optimizer, max_grad_norm: float, accelerator: Accelerator) -> Any:
    """Return DeepSpeed's engine around the module, and its optimizer around ours."""
    import deepspeed

    if accelerator.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # or it compiles a communication library where gloo is enough
    # DeepSpeed gathers by a name that torch deprecates
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    engine, wrapped, _, _ = deepspeed.initialize(
        model=module.to(accelerator.device),
        optimizer=optim,
        config=settings(max_grad_norm, accelerator.mixed_precision),
    )
    return engine, wrapped


def is_engine(module: nn.Module) -> bool:
    return hasattr(module, "set_gradient_accumulation_boundary")


def stage(optim: Any) -> int:
    """Return the ZeRO stage of an optimizer; 0 if it is another one."""
    return 1 + optim.partition_gradients if hasattr(optim, "partition_gradients") else 0


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Run the backward pass of a micro-batch; the last one of a step reduces the gradient."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)


def update(engine: Any, finite: bool) -> float:
    """Clip and step, and return the gradient norm; skip the step if the loss or the gradient is not finite."""
    if not finite:
        for gradients in engine.optimizer.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(math.nan)  # makes DeepSpeed skip the step
    engine.step()
    return float(engine.get_global_grad_norm())


def moments(optim: Any) -> dict[str, Tensor]:
    """Return the moments by group and kind: flat, sharded over the ranks."""
    return {
        f"{i}.{kind}": _sharded(tensor) if tensor.dim() else tensor
        for i, flat in enumerate(optim.single_partition_of_fp32_groups)
        for kind, tensor in optim.state.get(flat, {}).items()
    }


def _sharded(part: Tensor) -> Tensor:
    mesh = init_device_mesh(part.device.type, (torch.distributed.get_world_size(),))
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)


def empty_moment(optim: Any, group: str, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Return an empty tensor to read a group's saved moment into, before `fill`."""
    flat = optim.single_partition_of_fp32_groups[int(group)]
    local = optim.state[flat][kind] = torch.zeros(flat.shape if shape else (), device=flat.device)
    if not shape:
        return local
    sharded = _sharded(local)
    return (
        sharded if sharded.shape == shape else torch.zeros(shape)
    )  # split for another number of ranks: read it unsharded, and split it in `fill`


def fill(optim: Any, read: Mapping[str, Tensor]) -> None:
    """Update the optimizer from the module's weights, and from moments that were read unsharded."""
    optim.refresh_fp32_params()
    for name, tensor in read.items():
        group, _, kind = name.partition(".")
        local = optim.state[optim.single_partition_of_fp32_groups[int(group)]][kind]
        if tensor.dim() and not isinstance(tensor, DTensor):  # only its end is padded, for any number of ranks
            part = tensor[torch.distributed.get_rank() * local.numel() :][: local.numel()]
            local[: len(part)] = part
