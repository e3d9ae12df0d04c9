"""A sharded model (FSDP2): each rank holds a part of every weight, gradient and moment, and gathers layers on use.

`fully_shard` wraps the layers of a model, and a root around the model. Code that runs under the root finds the weights
outside the layers unsharded, such as the head that the fused loss needs. A rank never holds more on its device than
its shards, one layer and those weights; while it samples, it holds the model in the dtype of computation. --fsdp asks
for it, or accelerate's launcher with FSDP settings, of which only their presence is read.
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
ROOT = "_exo_root"  # attribute of a sharded model
T = TypeVar("T")
LAUNCHER = "ACCELERATE_USE_FSDP"  # set by accelerate's launcher


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
    """Shard the model over the ranks' devices, in fp32 if it was in 16 bits, and return it.

    Add an adapter before and make the optimizer after. The parts in `exact` compute in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        # autocast chooses what is computed in bfloat16; casting inputs would round rewards and reference log-probs
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = {name for child in model.modules() for name in getattr(child, "_no_split_modules", None) or ()}
    root = Root(model)
    for child in exact:
        fully_shard(child, mesh=mesh)
    for child in [child for child in model.modules() if type(child).__name__ in layers] + [root]:
        if any(parameter.dtype in HALVES for parameter in child.parameters()):
            child.float()
        fully_shard(child, mesh=mesh, mp_policy=policy)
    vars(model)[ROOT] = root  # not as a submodule, because the root contains the model
    return model


class Root(nn.Module):
    """The FSDP root of a model; its forward calls a function with the root's weights unsharded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def run_unsharded_root(module: nn.Module, call: Callable[[], T]) -> T:
    """Return call(), run under the roots of the sharded models in `module`.

    All ranks call. The weights are resharded afterwards, or after the backward pass if gradients are enabled.
    """
    roots = _roots(module)
    for root in roots:
        call = partial(root, call)
    result = call()
    if not torch.is_grad_enabled():
        for root in roots:
            for part in _parts(root):
                part.reshard()  # FSDP keeps the root unsharded for a backward pass
    return result


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Unshard the model on every device, so that each rank runs it by itself, without gradients.

    All ranks enter and leave the context.
    """
    parts = [part for root in _roots(model) for part in _parts(root)]
    with torch.no_grad():
        run_unsharded_root(model, lambda: None)  # before the parts: FSDP takes the first one used for the root
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(not isinstance(part, Root), recurse=False)
            part.reshard()


def _roots(module: nn.Module) -> list[nn.Module]:
    return [vars(child)[ROOT] for child in module.modules() if ROOT in vars(child)]


def _parts(root: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [child for child in root.modules() if isinstance(child, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Return whether a parameter of the module is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; all ranks call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_model(model: Any, main: bool) -> Any:
    """Return a copy of a sharded transformers model, with its adapter, on the CPU of the main rank; None on others.

    A model that is not sharded is returned itself. All ranks call.
    """
    if not is_sharded(model):
        return model
    state = {}
    for name, tensor in model.state_dict().items():
        full = full_tensor(tensor)
        if main:
            state[name] = full.cpu()
    if not main:
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with init_empty_weights(include_buffers=False):
        plain = type(base)(base.config)
    if hasattr(base, "generation_config"):  # classifiers have none
        plain.generation_config = base.generation_config
    if base is not model:
        import peft

        settings = model.peft_config["default"]
        name = settings.base_model_name_or_path
        plain = peft.get_peft_model(plain, copy.deepcopy(settings), low_cpu_mem_usage=True)
        plain.peft_config["default"].base_model_name_or_path = name
    plain.load_state_dict(state, assign=True)
    (plain.get_base_model() if hasattr(plain, "get_base_model") else plain).tie_weights()
    return plain
