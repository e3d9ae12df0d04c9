"""A model in shards (FSDP2): each process holds a part of every weight, gradient and moment, and gathers a layer when
it needs it.

torch's `fully_shard` on the layers and on what is around them, which is the module that computes the loss: so the head
is whole where the fused loss reads it, inside that module's forward. `--fsdp` asks for it, or accelerate's launcher
with FSDP settings, of which only that they are there is read. Left out: sampling from a model in shards (ppo refuses).
"""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exo.config import ConfigError

LAUNCHER = "ACCELERATE_USE_FSDP"  # what accelerate's launcher says


def asked(config: Any) -> bool:
    """Whether the run is to be in shards; of one process there are none."""
    launched = os.environ.get(LAUNCHER, "").lower() == "true"
    return (getattr(config, "fsdp", False) or launched) and int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse(config: Any, mixed_precision: str) -> None:
    """ConfigError for what does not go together with shards."""
    if mixed_precision == "fp16":
        raise ConfigError("--fsdp: expected --dtype bfloat16 or float32; got float16")
    for name in ("load_in_4bit", "compile"):
        if getattr(config, name, False):
            raise ConfigError(f"--fsdp: does not go together with --{name}")


def shard(module: nn.Module, mixed_precision: str) -> nn.Module:
    """The module itself, in shards from now on; make its optimizer after this."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = {name for child in module.modules() for name in getattr(child, "_no_split_modules", None) or ()}
    for child in list(module.modules()):
        if type(child).__name__ in layers:
            fully_shard(child, mp_policy=policy)
    return fully_shard(module, mp_policy=policy)  # type: ignore[return-value]


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def settle(module: nn.Module) -> None:
    """Back to shards: what ran without a backward pass left the outermost weights whole."""
    from torch.distributed.fsdp import FSDPModule

    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def own(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; all processes ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(model: Any, main: bool) -> Any:
    """A causal LM or classifier of transformers, with its adapter, that is no longer in shards, on the CPU of the main
    process; None on others. One that is not in shards is returned itself. All processes ask."""
    if not is_sharded(model):
        return model
    state = {}
    for name, tensor in model.state_dict().items():
        found = whole(tensor)
        if main:
            state[name] = found.cpu()
    if not main:
        return None
    below = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        plain = type(below)(below.config)
    plain.generation_config = below.generation_config
    if below is not model:
        import peft

        settings = model.peft_config["default"]
        name = settings.base_model_name_or_path
        plain = peft.get_peft_model(plain, copy.deepcopy(settings))
        plain.peft_config["default"].base_model_name_or_path = name
    plain.load_state_dict(state)
    return plain
