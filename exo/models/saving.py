"""Save models as transformers reads them. Training is in fp32; weights are rounded when they are written."""

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
from exo.models.errors import no_bars_in_logs
from exo.models.stop_tokens import stop_ids
from exo.runs.atomic import atomic_directory


class Dtypes(NamedTuple):
    """The dtypes in which a model is saved: that of most tensors, and by name those that differ."""

    most: torch.dtype = torch.float32
    others: dict[str, torch.dtype] = {}

    def of(self, name: str) -> torch.dtype:
        return self.others.get(name, self.most)


def dtypes_of(choice: str, name: str) -> Dtypes:
    """Return the dtypes of `--save_dtype` for a run that starts from the model `name`, or from its base model.

    "auto" is the dtype of most numbers in the model's safetensors; tensors of another dtype keep it if they are saved
    under the same name. Dtypes other than bf16 and fp16 become fp32.
    """
    if choice != "auto":
        return Dtypes(getattr(torch, choice))
    if name == "tiny":
        return Dtypes()
    tensors = files.stored_tensors(files.root_of(name))
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.size
    most = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32
    return Dtypes(most, {key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype != most})


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | PathLike[str],
    dtypes: Dtypes | None = None,
) -> None:
    """Write safetensors, config, generation config and tokenizer, as transformers reads them.

    Weights are written in `dtypes`, by default unchanged; config.json names the dtype of most. The model is unchanged.
    RunError if a weight is not finite in the dtype in which it is written.
    """
    with no_bars_in_logs(), _cast(model, dtypes):
        if name := weights.not_finite(weights.named_tensors(model)):
            place = Path(directory).parent if Path(directory).name.startswith(".") else directory
            dtype = _name_of(model.state_dict()[name].dtype)
            raise RunError(
                f"{place}: no model is written, because {name} is not finite in {dtype}; lower "
                "--learning_rate, or set --save_dtype float32"
            )
        _add_end_of_turn(model, tokenizer)
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        except SafetensorError as error:
            raise RunError(f"{directory}: the model could not be written: {str(error).splitlines()[0]}") from error
        config = Path(directory) / "config.json"
        if dtypes is not None and config.is_file():
            entries = json.loads(config.read_text(encoding="utf-8")) | {"dtype": _name_of(dtypes.most)}
            config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_end_of_turn(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the chat template's end of turn to the generation config, so that transformers' `generate` stops there."""
    config = getattr(model, "generation_config", None)
    has_end_of_turn = chat_template.stop_id(tokenizer) not in (None, tokenizer.eos_token_id)
    if config is not None and has_end_of_turn and not hasattr(model, "peft_config"):
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
    """Round the weights to be written (of an adapted model, the adapter's) in place, so that tied weights stay tied."""
    if dtypes is None:
        yield
        return
    adapted, config_dtype = hasattr(model, "peft_config"), model.config.dtype
    originals: dict[torch.nn.Parameter, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or not adapted):
            originals[parameter] = parameter.data
            parameter.data = parameter.data.to(dtypes.of(name))
    try:
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data
        model.config.dtype = config_dtype


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
