"""A model in shards (FSDP2): each process holds a part of every weight, gradient and moment, and gathers a layer when
it needs it.

torch's `fully_shard` on the layers of a model, and on an entrance around it: whatever runs by the entrance finds what
is outside the layers whole, and so the fused loss its head. No process ever holds more on its device than its shards,
a layer and that; but while it samples, all of the model, in the dtype of computation. `--fsdp` asks for it, or
accelerate's launcher with FSDP settings, of which only that they are there is read. Left out: 4 bits, compilation.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from exo.cli.errors import ConfigError

HALVES = (torch.bfloat16, torch.float16)
ENTRANCE = "exo_entrance"  # a model's attribute
T = TypeVar("T")
LAUNCHER = "ACCELERATE_USE_FSDP"  # what accelerate's launcher says


def is_requested(option: bool) -> bool:
    """Return whether the model is to be sharded, by --fsdp or the launcher; never on a single rank."""
    launched = os.environ.get(LAUNCHER, "").lower() == "true"
    return (option or launched) and int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse(mixed_precision: str, compile: bool, load_in_4bit: bool) -> None:
    """Raise ConfigError for options that do not go together with FSDP."""
    if mixed_precision == "fp16":
        raise ConfigError("--fsdp: expected --dtype bfloat16 or float32; got float16")
    for name, is_set in (("load_in_4bit", load_in_4bit), ("compile", compile)):
        if is_set:
            raise ConfigError(f"--fsdp: does not go together with --{name}")


def shard(model: nn.Module, accelerator: Accelerator, exact: Sequence[nn.Module] = ()) -> nn.Module:
    """The model itself, in shards on the processes' devices from now on, in fp32 if it was in 16 bits.

    With its adapter, if it is to have one; its optimizer comes after. `exact` parts of it compute in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        # autocast decides what is computed in bfloat16; what is cast on the way in would be rewards and references too
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = {name for child in model.modules() for name in getattr(child, "_no_split_modules", None) or ()}
    entrance = Root(model)
    for child in exact:
        fully_shard(child, mesh=mesh)
    for child in [child for child in model.modules() if type(child).__name__ in layers] + [entrance]:
        if any(parameter.dtype in HALVES for parameter in child.parameters()):
            child.float()
        fully_shard(child, mesh=mesh, mp_policy=policy)
    vars(model)[ENTRANCE] = entrance  # not as a part of the model, which is a part of it
    return model


class Root(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def run_unsharded_root(module: nn.Module, call: Callable[[], T]) -> T:
    """What the call gives, which runs models in `module`, and reads what is outside the layers of those in shards.

    All processes call. Without gradients all is in shards again after it; else after the backward pass.
    """
    entrances = _entrances(module)
    for entrance in entrances:
        call = partial(entrance, call)
    found = call()
    if not torch.is_grad_enabled():
        for entrance in entrances:
            for part in _parts(entrance):
                part.reshard()  # the outermost is left whole for a backward pass
    return found


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """For the while a model in shards is whole on every device, and each process runs it by itself, without gradients.
    All processes begin and end it."""
    parts = [part for entrance in _entrances(model) for part in _parts(entrance)]
    with torch.no_grad():
        run_unsharded_root(model, lambda: None)  # before its parts: the first to be used is taken for the outermost
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(not isinstance(part, Root), recurse=False)
            part.reshard()


def _entrances(module: nn.Module) -> list[nn.Module]:
    return [vars(child)[ENTRANCE] for child in module.modules() if ENTRANCE in vars(child)]


def _parts(entrance: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [child for child in entrance.modules() if isinstance(child, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of it; all processes ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_model(model: Any, main: bool) -> Any:
    """A causal LM or classifier of transformers, with its adapter, that is no longer in shards, on the CPU of the main
    process; None on others. One that is not in shards is returned itself. All processes ask."""
    if not is_sharded(model):
        return model
    state = {}
    for name, tensor in model.state_dict().items():
        found = full_tensor(tensor)
        if main:
            state[name] = found.cpu()
    if not main:
        return None
    below = model.get_base_model() if hasattr(model, "get_base_model") else model
    with init_empty_weights(include_buffers=False):
        plain = type(below)(below.config)
    if hasattr(below, "generation_config"):  # of a classifier there is none
        plain.generation_config = below.generation_config
    if below is not model:
        import peft

        settings = model.peft_config["default"]
        name = settings.base_model_name_or_path
        plain = peft.get_peft_model(plain, copy.deepcopy(settings), low_cpu_mem_usage=True)
        plain.peft_config["default"].base_model_name_or_path = name
    plain.load_state_dict(state, assign=True)
    below_plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    below_plain.tie_weights()
    return plain
