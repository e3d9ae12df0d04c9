"""LoRA through peft: small matrices that are trained beside frozen ones. Switched off, they leave the model that was.

So the reference of an alignment needs no second model, and a frozen head takes the cheaper schedule by itself. A model
that comes with an adapter is merged with it when it is loaded (models): the start, and so the reference, is then what
that adapter made. Left out: other kinds of adapters, and one on the head.
"""

import copy
import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from exo import config, console, models
from exo.config import NOT_NEGATIVE, PART, at_least, option, require


@dataclass(frozen=True)
class Options(config.DataTraining):
    """What every stage that can train an adapter has in common."""

    lora_r: int = option(0, "rank of LoRA's matrices; 0 trains the model whole", NOT_NEGATIVE)
    lora_alpha: int = option(16, "their product is multiplied by this over the rank", at_least(1))
    lora_dropout: float = option(0.0, "dropout before them; needs --dropout", PART)
    lora_targets: str = option("all-linear", "names of the layers that get them, with commas; all-linear but the head")
    lora_output: Literal["merged", "adapter"] = option(
        "merged", "what the run leaves: a model that stands alone, or the adapter, which needs --model beside it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        heard = self.dropout or not self.lora_dropout
        require(heard, "lora_dropout", "0, or --dropout too, without which nothing is dropped out", self.lora_dropout)


def add(model: Any, options: Options) -> Any:
    """The model with LoRA beside its layers, all else frozen; itself where the rank is 0."""
    if not options.lora_r:
        return model
    import peft

    targets: Any = options.lora_targets if options.lora_targets == "all-linear" else options.lora_targets.split(",")
    settings = peft.LoraConfig(
        r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        with warnings.catch_warnings():  # between peft and transformers
            warnings.simplefilter("ignore", FutureWarning)
            found = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"--lora_targets {options.lora_targets}: {str(error).splitlines()[0]}") from None
    trained = sum(p.numel() for p in found.parameters() if p.requires_grad)
    share = 100 * trained / models.parameter_count(found)
    console.say(f"LoRA of rank {options.lora_r}: {trained / 1e6:,.2f}M parameters are trained, {share:.2f}%")
    return found


def is_one(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def switched_off(model: nn.Module) -> AbstractContextManager[Any]:
    """The model without its adapter, for the while."""
    return model.disable_adapter() if is_one(model) else nullcontext()  # type: ignore[operator]


def check(options: Options, model: str) -> None:
    """ValueError without peft, or where the adapter alone would be left, and what it is for is nowhere as a model."""
    if options.lora_r and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_r: needs peft; pip install 'exo-kernels[lora]'")
    alone = options.lora_r and options.lora_output == "adapter"
    if alone and (models.is_adapter(model) or model == "tiny"):
        raise ValueError(
            f"--lora_output adapter: expected a --model that stands alone, which the adapter would be put on; got "
            f"{model}; use merged"
        )


def finished(model: Any, options: Any) -> Any:
    """What is to be saved: the adapter, or a copy of the model that has it merged."""
    if not is_one(model) or options.lora_output == "adapter":
        return model
    return copy.deepcopy(model).merge_and_unload()
