"""Models and tokenizers from directories and the hub, and back into directories.

Left out: devices, dtypes other than fp32 (the training loop owns those), adapters that are to be trained (adapter).
"""

import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from exo import artifacts
from exo.models.refusals import refuse_unsupported
from exo.models.small import PAD, tiny


def load(
    name: str | PathLike[str], *, four_bits: torch.dtype | None = None, mapped: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in fp32 and its tokenizer, from a directory or a hub name; an adapter's, merged with its model.

    `four_bits` holds the weights of its layers, but the head, in NF4, to compute with them in that dtype. `mapped`
    leaves those of a directory in the dtype of their files, which are mapped into memory: made fp32, they are the same.

    Weights come from safetensors only and no code of the repository is run: neither a pickle nor a
    modelling file can execute anything here. Every refusal is a one-line ValueError.
    """
    name = str(name)
    if Path(name).is_absolute() or name.startswith((".", "~")):
        if not Path(name).is_dir():
            raise ValueError(f"model {name!r}: expected a directory or a hub name, got neither")
    if is_adapter(name):
        return _with_adapter(name)
    with _bars_only_on_a_terminal():
        config = _load_config(name)
        refuse_unsupported(config)
        tokenizer = load_tokenizer(name)  # before the weights, which take longer to read
        rounded: dict[str, Any] = {} if four_bits is None else {"quantization_config": _nf4(four_bits)}
        dtype = _dtype_of(Path(name)) if mapped else torch.float32
        model = _load_weights(AutoModelForCausalLM, name, config, dtype=dtype, **rounded)
        if dtype != torch.float32:
            _restore_buffers(model)
        return model, tokenizer


def _dtype_of(directory: Path) -> torch.dtype:
    """The one dtype of its weights; fp32 where there are several, or none."""
    found = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(found.pop() if len(found) == 1 else "", torch.float32)


def _restore_buffers(model: PreTrainedModel) -> None:
    """What a model in 16 bits computed when it was made, such as a scale of embeddings, as fp32 has it."""
    model.config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        fresh = type(model)(model.config)
    kept = model.state_dict().keys()
    for name, buffer in fresh.named_buffers():
        if name not in kept:
            where, _, own = name.rpartition(".")
            model.get_submodule(where).register_buffer(own, buffer, persistent=False)


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    """As QLoRA has it: normal floats, their scales rounded too."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def in_full(model: Any) -> Any:
    """A model in 4 bits as one in fp32, of the same numbers."""
    with _without_warnings():
        found = model.dequantize(torch.float32)
    return found.float()


def is_adapter(name: str) -> bool:
    """Whether a directory holds an adapter of peft's, and so no model that stands alone."""
    return (Path(name) / "adapter_config.json").is_file()


def _with_adapter(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        import peft
    except ModuleNotFoundError:
        raise ValueError(f"model {name!r}: is an adapter and needs peft; pip install 'exo-kernels[lora]'") from None
    if not (Path(name) / "adapter_model.safetensors").is_file():
        raise ValueError(f"model {name!r}: expected its adapter in safetensors (pickles are not read)")
    with _explained(name, "an adapter of peft's and the model that it is for"):
        below = peft.PeftConfig.from_pretrained(name).base_model_name_or_path
    model, tokenizer = load(below)
    with _explained(name, f"an adapter that fits {below}"):
        adapted: Any = peft.PeftModel.from_pretrained(model, name)
        given = load_file(Path(name) / "adapter_model.safetensors").keys()
        odd = given ^ peft.get_peft_model_state_dict(adapted).keys()
        if odd:  # peft warns, and goes on without them
            raise ValueError(f"{len(odd)} weights that are missing on one side: {min(odd)} ...")
        merged = adapted.merge_and_unload()
    return merged, load_tokenizer(name) if (Path(name) / "tokenizer_config.json").is_file() else tokenizer


def load_classifier(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one output (a reward model) or two, and its tokenizer; as strict as `load`."""
    with _bars_only_on_a_terminal():
        config = _load_config(name)
        if not any("SequenceClassification" in head for head in config.architectures or []):
            raise ValueError(
                f"model {name!r}: expected a sequence classifier, got {config.architectures}; python -m exo.reward "
                "trains one"
            )
        if (config.num_labels or 0) > 2:
            raise ValueError(f"model {name!r}: expected one output (a reward) or two classes, got {config.num_labels}")
        tokenizer = load_tokenizer(name)
        return _load_weights(AutoModelForSequenceClassification, name, config), tokenizer


def classifier_from(name: str, outputs: int, *, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier on the body of a causal LM, its head new and drawn from the seed."""
    with _bars_only_on_a_terminal():
        config = _load_config(name)
        refuse_unsupported(config)
        tokenizer = load_tokenizer(name)
        config.num_labels = outputs
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = _load_weights(AutoModelForSequenceClassification, name, config, head_is_new=True)
            if tokenizer.pad_token_id == tokenizer.eos_token_id:
                _pad_apart(model, tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id  # transformers pools by it
        return model, tokenizer


def load_or_tiny(
    name: str, texts: Callable[[], Iterable[str]], *, seed: int, mapped: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load`, or where the name is "tiny" a small model on `texts`."""
    if name == "tiny":
        return tiny(texts(), seed=seed)
    if not Path(name).exists() and difflib.get_close_matches(name, ["tiny"]):
        raise ValueError(f"--model {name}: no such directory; did you mean tiny?")
    return load(name, mapped=mapped)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | PathLike[str]) -> None:
    """Write safetensors, config, generation config and tokenizer, as transformers reads them."""
    with _bars_only_on_a_terminal():
        try:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        except SafetensorError as error:
            raise artifacts.RunError(
                f"{directory}: the model could not be written: {str(error).splitlines()[0]}"
            ) from error


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path, name: str) -> None:
    """`save` into checkpoints/`name` of a run: there whole, or not at all."""
    target = run / "checkpoints" / name
    target.parent.mkdir(exist_ok=True)
    with artifacts.staged(target) as staging:
        save(model, tokenizer, staging)


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of the model, a tied head counted once; of those in 4 bits there are two in a byte."""
    return sum(parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1) for parameter in model.parameters())


def parameters_of(name: str) -> int:
    """Parameters of a causal LM by its config alone; its weights are not read."""
    with torch.device("meta"):
        return parameter_count(AutoModelForCausalLM.from_config(_load_config(name), trust_remote_code=False))


def check_fits(model: PreTrainedModel, rows: Iterable[Any]) -> None:
    """ValueError unless every token of `rows` (encoding.TokenGroup) has an embedding, and every position a place."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    positions = getattr(model.config, "max_position_embeddings", None)
    for row in rows:
        top = max(map(max, (row.prompt, *row.completions)))
        if top >= vocabulary:
            raise ValueError(
                f"model: expected embeddings for every token; got {vocabulary} and token id {top} in line {row.line}"
            )
        if positions is not None and row.longest > positions:
            raise ValueError(
                f"--max_length: expected at most the {positions} positions that the model has; line {row.line} "
                f"takes {row.longest}"
            )


def _load_config(name: str) -> PreTrainedConfig:
    with _explained(name, "a config.json of a type that transformers knows without remote code"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _pad_apart(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer a padding token that is not its end of sequence.

    We pool by length, but whoever runs the saved classifier by transformers takes the last token that is no padding.
    """
    known = tokenizer.get_vocab()
    own = next((token for token in (PAD, "<|padding|>", "[PAD]", "<|pad|>") if token in known), PAD)
    tokenizer.add_special_tokens({"pad_token": own})
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone; one without padding pads with its end of sequence."""
    with _explained(name, "a tokenizer beside the weights (tokenizer.json)"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model {name!r}: expected a tokenizer with an eos_token, got none; completions end "
            "with it, so name one in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # Safe, because loss masks come from lengths and never from comparing ids with the pad id:
        # the end of a completion stays a trained token.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(
    kind: Any,
    name: str,
    config: PreTrainedConfig,
    *,
    head_is_new: bool = False,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> PreTrainedModel:
    what = "weights in safetensors (pickles are not read; save_pretrained converts)"
    _check_shards(Path(name))
    with _explained(name, what), _without_warnings():
        # Typed for its usual answer; asked for its report as well, it gives two things.
        loaded: Any = kind.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **settings,
        )
    model, report = loaded
    # transformers fills what is missing or misshapen with random numbers, and warns.
    wrong = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    wrong |= report["missing_keys"]
    if head_is_new:
        wrong = {key for key in wrong if key.startswith(f"{model.base_model_prefix}.")}
    if wrong:
        raise ValueError(
            f"model {name!r}: expected every weight of {type(model).__name__} in the shape that "
            f"config.json gives it, got {len(wrong)} missing or of other shapes: {min(wrong)} ..."
        )
    return model


def _check_shards(directory: Path) -> None:
    """ValueError for an index that names files elsewhere than beside itself."""
    for index in directory.glob("*.index.json") if directory.is_dir() else ():
        with _explained(str(directory), f"an index of weights in {index.name}"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if odd := [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]:
            raise ValueError(
                f"model {str(directory)!r}: expected shards beside their index; {index.name} names {odd[0]!r}"
            )


@contextmanager
def _explained(name: str, expected: str) -> Iterator[None]:
    """What goes wrong while reading someone's files, as a ValueError of one line."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells of every try to reach the hub
    try:
        yield
    except Exception as error:  # transformers' parts raise many types, tokenizers a bare Exception
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        if not Path(name).exists():
            expected = "a directory, and there is none; or a hub name"
        raise ValueError(f"model {name!r}: expected {expected}; got: {lines[0]}") from error
    finally:
        hub_logging.set_verbosity(level)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers prints a table of what it found missing; what matters of it is an error here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    """transformers draws its progress bars into log files as well."""
    was_on = transformers_logging.is_progress_bar_enabled()
    if was_on and not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
