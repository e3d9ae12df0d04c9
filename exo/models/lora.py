"""LoRA through peft: small matrices that are trained beside frozen ones. Switched off, they leave the model that was.

So the reference of an alignment needs no second model, and a frozen head takes the cheaper schedule by itself. A model
that comes with an adapter is merged with it when it is loaded (models): the start, and so the reference, is then what
that adapter made. With the frozen weights in 4 bits this is QLoRA; the reference is then the model of those weights.
Left out: other kinds of adapters, and one on the head.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from exo import models
from exo.cli import console
from exo.cli.options import AdapterOptions
from exo.distributed import fsdp
from exo.distributed.accelerator import compute_dtype


def load(
    options: AdapterOptions, name: str, texts: Callable[[], Iterable[str]], accelerator: Accelerator
) -> tuple[Any, Any]:
    """The model that a stage begins with, and its tokenizer."""
    if not options.load_in_4bit:
        read = partial(models.load, mapped=fsdp.is_requested(options.fsdp))
        return models.load_or_tiny(name, texts, seed=options.seed, read=read)
    return models.load(name, four_bits=compute_dtype(accelerator))


def apply(model: Any, options: AdapterOptions, name: str) -> Any:
    """The model of that name with LoRA beside its layers, all else frozen; itself where the rank is 0."""
    if not options.lora_r:
        return model
    import peft

    targets: Any = options.lora_targets if options.lora_targets == "all-linear" else options.lora_targets.split(",")
    # routers and the like, which are subclasses of nn.Linear and compute something else
    odd = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "transformers." in type(m).__module__]
    settings = peft.LoraConfig(
        r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, target_modules=targets,
        exclude_modules=odd if targets == "all-linear" and odd else None, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        with _looking_fp32(model), warnings.catch_warnings():  # between peft and transformers
            warnings.simplefilter("ignore", FutureWarning)
            found = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"--lora_targets {options.lora_targets}: {str(error).splitlines()[0]}") from None
    ends = (found.get_input_embeddings(), found.get_output_embeddings())
    if any(hasattr(end, "base_layer") for end in ends):
        raise ValueError(
            f"--lora_targets {options.lora_targets}: expected layers between the embedding and the head; got one of "
            "these two"
        )
    if Path(name).is_dir():  # it is found from other directories too
        found.peft_config["default"].base_model_name_or_path = str(Path(name).resolve())
    trained = sum(p.numel() for p in found.parameters() if p.requires_grad)
    share = 100 * trained / models.parameter_count(found)
    console.log(f"LoRA of rank {options.lora_r}: {trained / 1e6:,.2f}M parameters are trained, {share:.2f}%")
    return found


@contextmanager
def _looking_fp32(model: nn.Module) -> Iterator[None]:
    """For peft, which would round what it draws to the dtype of weights that are mapped from files of 16 bits."""
    mapped = {p: p.data for p in model.parameters() if p.dtype in fsdp.HALVES}
    for parameter in mapped:
        parameter.data = torch.zeros(1).expand(parameter.shape)  # of no memory
    try:
        yield
    finally:
        for parameter, own in mapped.items():
            parameter.data = own


def has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def disabled(model: nn.Module) -> AbstractContextManager[Any]:
    """The model without its adapter, for the while."""
    return model.disable_adapter() if has_adapter(model) else nullcontext()  # type: ignore[operator]


def check(options: AdapterOptions, model: str) -> None:
    """ValueError without what it needs, or where the adapter alone would be left, and what it is for is nowhere as a
    model."""
    if options.lora_r and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_r: needs peft; pip install 'exo-kernels[lora]'")
    if options.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit: needs bitsandbytes; pip install 'exo-kernels[qlora]'")
    if options.load_in_4bit and (models.is_adapter(model) or model == "tiny"):
        raise ValueError(
            f"--load_in_4bit: expected a --model whose weights are read as they stand; got {model}, which is made first"
        )
    alone = options.lora_r and options.lora_output == "adapter"
    if alone and (models.is_adapter(model) or model == "tiny"):
        raise ValueError(
            f"--lora_output adapter: expected a --model that stands alone, which the adapter would be put on; got "
            f"{model}; use merged"
        )


def merged(model: Any, options: Any, accelerator: Accelerator) -> Any:
    """What is to be saved: the adapter, or a copy of the model that has it merged. All processes ask; of a model in
    shards the first alone has it.

    Of weights in 4 bits the copy has what they stand for: it computes what was trained, which the weights that were
    rounded to them do not.
    """
    if options.load_in_4bit and options.lora_output == "adapter":
        console.log("  the adapter was trained beside weights in 4 bits; beside others it does not compute the same")
    own = fsdp.is_sharded(model)
    model = fsdp.gather_model(model, accelerator.is_main_process)
    if not has_adapter(model) or options.lora_output == "adapter" or not accelerator.is_main_process:
        return model
    alone = model if own else copy.deepcopy(model)  # what was gathered is nobody else's
    if options.load_in_4bit:
        import peft

        learned, settings = peft.get_peft_model_state_dict(model), model.peft_config["default"]
        alone = peft.get_peft_model(models.in_full(alone.unload()), settings)
        peft.set_peft_model_state_dict(alone, learned)
    return alone.merge_and_unload()
