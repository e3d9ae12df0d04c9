"""Train LoRA adapters through peft. With the adapter disabled, the model is the original.

So alignment needs no second model as its reference, and a frozen head uses the cheaper schedule. An adapter given as
--model is merged when it is loaded, for training and as the reference. With 4-bit frozen weights this is QLoRA, and the
reference has the same 4-bit weights. Not supported: other kinds of adapters, and adapters on the head.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from exo import models
from exo.cli import console
from exo.distributed import fsdp
from exo.distributed.accelerator import compute_dtype


class LoraSettings(NamedTuple):
    """The options --lora_* and --load_in_4bit."""

    r: int  # 0: no adapter
    alpha: int
    dropout: float
    targets: str  # "all-linear", or names of layers separated by commas
    output: str  # "merged" | "adapter"
    load_in_4bit: bool


def load(
    name: str,
    texts: Callable[[], Iterable[str]],
    settings: LoraSettings,
    accelerator: Accelerator,
    *,
    seed: int,
    sharded: bool,
) -> tuple[Any, Any]:
    """Return the initial model of a stage, and its tokenizer."""
    if settings.load_in_4bit:
        return models.load(name, four_bits=compute_dtype(accelerator))
    return models.load_or_tiny(name, texts, seed=seed, read=partial(models.load, mapped=sharded))


def apply(model: Any, settings: LoraSettings, name: str) -> Any:
    """Add LoRA to the model called `name` and freeze everything else; with rank 0 return the model unchanged."""
    if not settings.r:
        return model
    import peft

    targets: Any = settings.targets if settings.targets == "all-linear" else settings.targets.split(",")
    # routers and other subclasses of nn.Linear compute something else
    special = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "transformers." in type(m).__module__
    ]
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        exclude_modules=special if targets == "all-linear" and special else None,
        task_type="CAUSAL_LM",
    )
    try:
        with _as_fp32(model), warnings.catch_warnings():  # peft calls deprecated functions of transformers
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--lora_targets {settings.targets}: {str(error).splitlines()[0]}") from None
    if any(hasattr(end, "base_layer") for end in (adapted.get_input_embeddings(), adapted.get_output_embeddings())):
        raise ValueError(
            f"--lora_targets {settings.targets}: expected layers between the embedding and the head; got one of these "
            "two"
        )
    if Path(name).is_dir():  # the adapter must find its base model from any directory
        adapted.peft_config["default"].base_model_name_or_path = str(Path(name).resolve())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    share = 100 * trained / models.parameter_count(adapted)
    console.log(f"LoRA of rank {settings.r}: {trained / 1e6:,.2f}M trainable parameters, {share:.2f}%")
    return adapted


@contextmanager
def _as_fp32(model: nn.Module) -> Iterator[None]:
    """Replace 16-bit parameters by fp32 ones, because peft would round the adapter's initial values to their dtype."""
    mapped = {p: p.data for p in model.parameters() if p.dtype in fsdp.HALVES}
    for parameter in mapped:
        parameter.data = torch.zeros(1).expand(parameter.shape)  # takes no memory
    try:
        yield
    finally:
        for parameter, data in mapped.items():
            parameter.data = data


def has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def disabled(model: nn.Module) -> AbstractContextManager[Any]:
    """Disable the model's adapter, if it has one, inside the context."""
    return model.disable_adapter() if has_adapter(model) else nullcontext()  # type: ignore[operator]


def check(settings: LoraSettings, model: str) -> None:
    """Raise ValueError if a package is missing, or if the output would be an adapter without a base model on disk."""
    if settings.r and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_r: needs peft; pip install 'exo-kernels[lora]'")
    if settings.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit: needs bitsandbytes; pip install 'exo-kernels[qlora]'")
    if not (models.is_adapter(model) or model == "tiny"):
        return
    if settings.load_in_4bit:
        raise ValueError(f"--load_in_4bit: expected a --model with weights of its own on disk; got {model}")
    if settings.r and settings.output == "adapter":
        raise ValueError(
            f"--lora_output adapter: expected a --model with weights of its own on disk, to which the adapter can be "
            f"added; got {model}; use --lora_output merged"
        )


def merged(model: Any, settings: LoraSettings, accelerator: Accelerator) -> Any:
    """Return the model to save: the adapter, or a copy of the model with the adapter merged.

    Every rank must call it. For a sharded model only rank 0 gets the result. A copy of a 4-bit model has the values of
    its 4-bit weights, so it computes what was trained; the original weights with the adapter would not.
    """
    if settings.load_in_4bit and settings.output == "adapter":
        console.log("  the adapter was trained with 4-bit weights; with other weights it computes something else")
    sharded = fsdp.is_sharded(model)
    model = fsdp.gather_model(model, accelerator.is_main_process)
    if not has_adapter(model) or settings.output == "adapter" or not accelerator.is_main_process:
        return model
    merging = model if sharded else copy.deepcopy(model)  # a gathered model is a copy already
    if settings.load_in_4bit:
        import peft

        adapter, config = peft.get_peft_model_state_dict(model), model.peft_config["default"]
        merging = peft.get_peft_model(models.dequantize(merging.unload()), config)
        peft.set_peft_model_state_dict(merging, adapter)
    return merging.merge_and_unload()
