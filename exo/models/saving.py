"""Models as directories that transformers reads, in the dtype that was asked for.

Training is in fp32; weights are rounded when they are written.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exo.cli.errors import RunError
from exo.data.text import chat_template
from exo.models import files, weights
from exo.models.quiet import bars_only_on_a_terminal
from exo.models.stop_tokens import stop_ids
from exo.runs.atomic import atomic_directory

NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Dtypes(NamedTuple):
    """The dtypes that a model is saved in: of most tensors, and by name of those that differ."""

    most: torch.dtype = torch.float32
    others: dict[str, torch.dtype] = {}

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.most)


def dtypes_of(choice: str, name: str) -> Dtypes:
    """Return what `--save_dtype` means for a run that starts from a model.

    `auto` is the dtype of most numbers in the model's safetensors; a tensor of another dtype keeps its own, if it is
    saved by the same name. Of an adapter the model below it counts. What is neither bf16 nor fp16 becomes fp32.
    """
    if choice != "auto":
        return Dtypes(getattr(torch, choice))
    if name == "tiny":
        return Dtypes()
    found = files.stored(files.root_of(name))
    sizes: Counter[torch.dtype] = Counter()
    for tensor in found.values():
        sizes[NAMES.get(tensor.dtype, torch.float32)] += torch.Size(tensor.shape).numel()
    most = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32
    own = {key: NAMES.get(tensor.dtype, torch.float32) for key, tensor in found.items()}
    return Dtypes(most, {key: dtype for key, dtype in own.items() if dtype != most})


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | PathLike[str],
    dtypes: Dtypes | None = None,
) -> None:
    """Write safetensors, config, generation config and tokenizer, as transformers reads them.

    Weights are written in `dtypes`, by default as they are; config.json names the dtype of most. The model is
    unchanged. RunError if a weight is not finite, in the dtype that it is written in.
    """
    with bars_only_on_a_terminal(), _cast(model, dtypes):
        if name := weights.not_finite(weights.stored(model)):
            place = Path(directory).parent if Path(directory).name.startswith(".") else directory
            raise RunError(
                f"{place}: no model is written, because {name} is not finite in {_dtype(model, name)}; lower "
                "--learning_rate, or set --save_dtype float32"
            )
        _name_end_of_turn(model, tokenizer)
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        except SafetensorError as error:
            raise RunError(f"{directory}: the model could not be written: {str(error).splitlines()[0]}") from error
        config = Path(directory) / "config.json"
        if dtypes is not None and config.is_file():
            entries = json.loads(config.read_text(encoding="utf-8")) | {
                "dtype": str(dtypes.most).removeprefix("torch.")
            }
            config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_end_of_turn(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the end of turn of the chat template in the generation config, so that `generate` stops where we do."""
    config = getattr(model, "generation_config", None)
    if (
        config is None
        or hasattr(model, "peft_config")
        or chat_template.stop_id(tokenizer) in (None, tokenizer.eos_token_id)
    ):
        return
    config.eos_token_id = list(stop_ids(model, tokenizer))


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path, name: str, dtypes: Dtypes | None = None
) -> None:
    """Save a loadable model atomically in the subdirectory models/`name` of a run."""
    target = run / "models" / name
    target.parent.mkdir(exist_ok=True)
    with atomic_directory(target) as staging:
        save(model, tokenizer, staging, dtypes)


@contextmanager
def _cast(model: Any, dtypes: Dtypes | None) -> Iterator[None]:
    """Round the weights that will be written, inside the context and in place, so that tied weights stay tied.

    For a model with an adapter these are the adapter's.
    """
    if dtypes is None:
        yield
        return
    adapted, before = hasattr(model, "peft_config"), model.config.dtype
    data: dict[torch.nn.Parameter, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or not adapted):
            data[parameter] = parameter.data
            parameter.data = parameter.data.to(dtypes.of(name))
    try:
        yield
    finally:
        for parameter, own in data.items():
            parameter.data = own
        model.config.dtype = before


def _dtype(model: torch.nn.Module, name: str) -> str:
    return str(model.state_dict()[name].dtype).removeprefix("torch.")
