"""DeepSpeed's ZeRO, stages 1 and 2: every process has the whole weights, a part of the moments (1), and a part of the
step's gradient (2).

accelerate's launcher asks for it; its plugin reads what that says. The step stays ours, and --dtype is autocast over
fp32 weights, as under DDP. DeepSpeed is imported only when it is asked for. Left out: stage 3, which is what `--fsdp`
does; offloading; weights kept in 16 bits; DeepSpeed's own checkpoints, which are pickles.
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

LAUNCHER = "ACCELERATE_USE_DEEPSPEED"  # what accelerate's launcher says
BUCKET = 50_000_000  # numbers that are reduced or gathered at a time: 0.2 GB of fp32, where DeepSpeed would take 2
AUTO = ("auto", None)
# of zero_optimization: how things travel, which no result depends on but by the order of sums
PASSED_ON = {"overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions"}
PASSED_ON |= {"reduce_bucket_size", "allgather_bucket_size"}
# what DeepSpeed says of itself, and what is set here in any case
IDLE = {"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}


def is_launched() -> bool:
    return os.environ.get(LAUNCHER, "").lower() == "true"


def is_requested() -> bool:
    """Whether the run is to be ZeRO's; of one process there are no parts."""
    return is_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def choose_device(cpu: bool) -> None:
    """DeepSpeed chooses its device once, when anything imports it: a GPU if there is one, whatever --device says."""
    if is_launched() and cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"


def refuse(mixed_precision: str, *, fsdp: bool, compile: bool, load_in_4bit: bool, max_grad_norm: float) -> None:
    """Raise ConfigError for options of a training stage that do not go together with DeepSpeed, if it is requested."""
    if not is_launched():
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed: asked for by accelerate, and not installed; pip install 'exo-kernels[deepspeed]'")
    if mixed_precision == "fp16":
        raise ConfigError("DeepSpeed: expected --dtype bfloat16 or float32; got float16")
    for name, is_set in (("fsdp", fsdp), ("compile", compile), ("load_in_4bit", load_in_4bit)):
        if is_set:
            raise ConfigError(f"DeepSpeed: does not go together with --{name}")
    settings(max_grad_norm, mixed_precision)


def settings(max_grad_norm: float, mixed_precision: str) -> dict[str, Any]:
    """For DeepSpeed, from what accelerate's plugin found in the environment or in the file that it names."""
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
        said = value.get("enabled") if isinstance(value, Mapping) else value
        if name not in ours and name not in IDLE:
            raise ConfigError(f"DeepSpeed: its setting {name} is not for this version")
        if name in ours and said not in (*AUTO, *ours[name]) and said is not False:
            hint = f" (--max_grad_norm is {max_grad_norm:g})" if name == "gradient_clipping" else ""
            raise ConfigError(f"DeepSpeed: its setting {name}: expected auto, as our options say it{hint}; got {said}")
    for name, value in zero.items():
        off = value in (*AUTO, False) or isinstance(value, Mapping) and value.get("device") in (None, "none")
        if name not in PASSED_ON and not name.startswith("stage3_") and not off:
            raise ConfigError(f"DeepSpeed: its setting zero_optimization.{name} is not for this version; got {value}")
    parts = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    parts |= {name: value for name, value in zero.items() if name in PASSED_ON and value not in AUTO}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # it would divide by them; the denominator is ours
        "gradient_clipping": max_grad_norm,
        "zero_optimization": parts,
        "zero_allow_untested_optimizer": True,
        # accelerate's autocast around it would be switched off by it, so it makes its own, of the same kind
        "torch_autocast": {"enabled": mixed_precision == "bf16", "dtype": "bfloat16",
                           "lower_precision_safe_modules": []},  # all gradients travel in fp32
    }  # fmt: skip


def prepare(module: nn.Module, optim: torch.optim.Optimizer, max_grad_norm: float, accelerator: Accelerator) -> Any:
    """(DeepSpeed's engine around the module, its optimizer around ours)."""
    import deepspeed

    if accelerator.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # it would compile a library of its own for what gloo does
    # torch's warning, of the name by which DeepSpeed gathers
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
    """Of an optimizer; 0 if it is not ZeRO's."""
    return 1 + optim.partition_gradients if hasattr(optim, "partition_gradients") else 0


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Of one micro-batch; after the last of a step the gradient is whole, its parts where they belong."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)


def update(engine: Any, finite: bool) -> float:
    """Clip and step; the gradient's norm. One that is not finite changes nothing, nor does that of such a loss."""
    if not finite:
        for gradients in engine.optimizer.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(math.nan)  # then it drops the step itself, with all that it keeps of it
    engine.step()
    return float(engine.get_global_grad_norm())


def moments(optim: Any) -> dict[str, Tensor]:
    """By group and kind: flat, of all processes together, each with its part."""
    return {
        f"{i}.{kind}": _of_all(tensor) if tensor.dim() else tensor
        for i, flat in enumerate(optim.single_partition_of_fp32_groups)
        for kind, tensor in optim.state.get(flat, {}).items()
    }


def _of_all(part: Tensor) -> Tensor:
    mesh = init_device_mesh(part.device.type, (torch.distributed.get_world_size(),))
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)


def room(optim: Any, example: str, kind: str, shape: tuple[int, ...]) -> Tensor:
    """For a group's moment that was saved in that shape, to be read into before `fill`."""
    flat = optim.single_partition_of_fp32_groups[int(example)]
    own = optim.state[flat][kind] = torch.zeros(flat.shape if shape else (), device=flat.device)
    if not shape:
        return own
    whole = _of_all(own)
    return whole if whole.shape == shape else torch.zeros(shape)  # of other parts: all is read, and cut anew


def fill(optim: Any, read: Mapping[str, Tensor]) -> None:
    """Bring the optimizer in line with the module's weights, and with moments that were read whole."""
    optim.refresh_fp32_params()
    for name, tensor in read.items():
        example, _, kind = name.partition(".")
        own = optim.state[optim.single_partition_of_fp32_groups[int(example)]][kind]
        if tensor.dim() and not isinstance(tensor, DTensor):  # padded at its end alone, for any number of processes
            mine = tensor[torch.distributed.get_rank() * own.numel() :][: own.numel()]
            own[: len(mine)] = mine
