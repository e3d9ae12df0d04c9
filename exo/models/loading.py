"""Load causal LMs and tokenizers from directories and the hub."""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from exo.cli import console
from exo.cli.spelling import nearest
from exo.models import files, multimodal, weights
from exo.models.errors import no_bars_in_logs, one_line_errors, without_warnings
from exo.models.supported import refuse_unsupported
from exo.models.tiny_models import tiny

ATTENTION = (None, "eager", "sdpa")  # choices of a config; others need packages, or fetch kernels from the hub
# heads beside the LM head, which training and sampling do not need
VALUE_HEAD = re.compile(r"^(v_head|value_head|score|classifier|reward_head|rm_head|regression_head)\b")
# buffers in old checkpoints that transformers recomputes
BUFFERS = re.compile(r"\.(attn|attention)(\.attention)?\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$")


def load(
    name: str | PathLike[str], *, four_bits: torch.dtype | None = None, mapped: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in fp32 and its tokenizer from a directory or a hub name; merge an adapter with its model.

    `four_bits` stores the weights of all layers except the head in NF4, and computes in that dtype. `mapped` maps the
    files of a directory into memory in their dtype; converting them to fp32 gives the same weights.

    Only safetensors are read, and no code of the repository runs. Every refusal is a one-line ValueError.
    """
    name = str(name)
    if files.is_adapter(name):
        return _load_adapter(name)
    with no_bars_in_logs():
        config = load_config(name)
        refuse_unsupported(config)
        tokenizer = load_tokenizer(name)  # before the weights, which take longer to read
        quantization: dict[str, Any] = {}
        if four_bits is not None:
            quantization["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=four_bits,
            )
        dtype = _stored_dtype(name) if mapped else torch.float32

        def read(kind: Any) -> PreTrainedModel:
            return load_weights(kind, name, config, dtype=dtype, **quantization)

        if multimodal.is_wrapper(config):
            model = multimodal.text_part(name, config, read, compared=four_bits is None)
        else:
            model = read(AutoModelForCausalLM)
        if dtype != torch.float32:
            _restore_buffers(model)
        if four_bits is not None:
            _disable_repacking(model)
        return model, tokenizer


def _stored_dtype(name: str) -> torch.dtype:
    """Return the one dtype of a model's weights; fp32 if there are several, or none."""
    dtypes = {tensor.dtype for tensor in files.stored_tensors(name).values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _restore_buffers(model: PreTrainedModel) -> None:
    """Recompute in fp32 the buffers that a 16-bit model computed when it was built, such as a scale of embeddings."""
    model.config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        fresh = type(model)(model.config)
    persistent = model.state_dict().keys()
    for name, buffer in fresh.named_buffers():
        if name not in persistent:
            module, _, attribute = name.rpartition(".")
            model.get_submodule(module).register_buffer(attribute, buffer, persistent=False)


def _disable_repacking(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking weights on CPUs with AVX512-BF16.

    Repacking, in the first forward pass without gradients, rounds the scales and outputs to bf16, drops the gradients
    of later passes, and fails for layers whose sizes do not fit its blocks.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantize(model: Any) -> Any:
    """Convert a 4-bit model to fp32 with the same values."""
    with without_warnings():
        return model.dequantize(torch.float32).float()


def _load_adapter(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an adapter, merged with its base model; all weights can be trained."""
    try:
        import peft
    except ModuleNotFoundError:
        raise ValueError(f"model {name!r}: is an adapter and needs peft; pip install 'exo-kernels[lora]'") from None
    if not (Path(name) / "adapter_model.safetensors").is_file():
        raise ValueError(f"model {name!r}: expected its adapter in safetensors (pickles are not read)")
    files.root_of(name)  # refuses an adapter that is its own base
    base = files.base_of(name)
    model, tokenizer = load(base)
    with one_line_errors(name, f"an adapter that fits {base}"):
        adapted: Any = peft.PeftModel.from_pretrained(model, name)
        stored = load_file(Path(name) / "adapter_model.safetensors").keys()
        if unmatched := stored ^ peft.get_peft_model_state_dict(adapted).keys():  # peft only warns
            raise ValueError(f"{len(unmatched)} weights that are missing on one side: {min(unmatched)} ...")
        merged = adapted.merge_and_unload().requires_grad_(True)  # peft freezes all weights
    _refuse_not_finite(name, merged)
    return merged, load_tokenizer(name) if (Path(name) / "tokenizer_config.json").is_file() else tokenizer


def load_or_tiny(
    name: str, texts: Callable[[], Iterable[str]], *, seed: int, read: Callable[[str], tuple[Any, Any]] = load
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer by `read`; if the name is "tiny", build a small one on `texts`."""
    if name == "tiny":
        return tiny(texts(), seed=seed)
    if not Path(name).exists() and nearest(name, ["tiny"]):
        raise ValueError(f"--model {name}: no such directory; did you mean tiny?")
    return read(name)


def parameter_count(model: torch.nn.Module) -> int:
    """Count the parameters; a tied head counts once, and a byte holds two 4-bit parameters."""
    return sum(parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1) for parameter in model.parameters())


def check_fits(model: PreTrainedModel, rows: Iterable[Any]) -> None:
    """Raise ValueError unless every token of `rows` (TokenizedExample) has an embedding, and rows fit the positions."""
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


def load_config(name: str) -> PreTrainedConfig:
    """Load a model's config once its files have been checked."""
    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).is_dir():
        raise ValueError(f"model {name!r}: expected a directory or a hub name, got neither")
    files.check(name)
    with one_line_errors(name, "a config.json of a type that transformers knows without remote code"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config._attn_implementation not in ATTENTION:
            config._attn_implementation = None
        text_config = config.get_text_config()
        if not isinstance(text_config, PreTrainedConfig):
            raise ValueError(f"a {type(text_config).__name__} as text_config")
        return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end of sequence."""
    files.check(name)
    with one_line_errors(name, "a tokenizer beside the weights (tokenizer.json)"):
        tokenizer = _tokenizer_class(name).from_pretrained(name, trust_remote_code=False)
        with suppress(Exception):  # lets a panic through, which is no Exception
            tokenizer.decode(tokenizer("a b\nHello, 1 \u00e9")["input_ids"])
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"model {name!r}: tokenizer_config.json: model_max_length: expected a number; got a text")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model {name!r}: expected a tokenizer with an eos_token, got none; completions end with it, so name one "
            "in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # safe, because loss masks come from lengths: the end of a completion is still trained on
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(name: str) -> Any:
    """Return the class that reads a tokenizer as it was saved.

    For some model types (Qwen 3.5) AutoTokenizer chooses a class that ignores how tokenizer.json splits texts.
    """
    path = files.find(name, "tokenizer_config.json")
    saved = files.read(name, path).get("tokenizer_class") if path else None
    return PreTrainedTokenizerFast if saved in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer


def load_weights(
    kind: Any,
    name: str,
    config: PreTrainedConfig,
    *,
    head_is_new: bool = False,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> PreTrainedModel:
    """Load a model of a transformers class; raise ValueError unless the files hold exactly its weights, all finite."""
    expected = "weights in safetensors (pickles are not read; save_pretrained converts)"
    with one_line_errors(name, expected), without_warnings():
        model, report = kind.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **settings,
        )
    # transformers only warns of missing or misshapen weights, and initializes them randomly
    missing = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]} | report["missing_keys"]
    if head_is_new:
        missing = {key for key in missing if key.startswith(f"{model.base_model_prefix}.")}
    if missing:
        raise ValueError(
            f"model {name!r}: expected every weight of {type(model).__name__} in the shape that "
            f"config.json gives it, got {len(missing)} missing or of other shapes: {min(missing)} ..."
        )
    _refuse_unused(name, model, set(report["unexpected_keys"]), head_is_new)
    _refuse_not_finite(name, model)
    return model


def _refuse_unused(name: str, model: PreTrainedModel, keys: set[str], head_is_new: bool) -> None:
    """Raise ValueError for weights that the model does not have; print the name of an unused head."""
    keys = {key for key in keys if not BUFFERS.search(key)}
    if head_is_new:  # it replaces any other; the names of the body's weights may lack its prefix
        body = {model.base_model_prefix, *(child for child, _ in model.base_model.named_children())}
        keys = {key for key in keys if key.partition(".")[0] in body}
    heads = {key for key in keys if VALUE_HEAD.match(key)}
    if unused := keys - heads:
        raise ValueError(
            f"model {name!r}: expected no other weights than {type(model).__name__} has by config.json; got "
            f"{len(unused)} that it has no place for: {min(unused)}{' ...' * (len(unused) > 1)}"
        )
    if heads:
        console.log(f"  {name}: {len(heads)} weights of a head that is not used: {min(heads)}")


def _refuse_not_finite(name: str, model: PreTrainedModel) -> None:
    """Raise ValueError if a weight is not finite (for 4-bit weights, if a scale is not)."""
    scales = (
        (f"{key}.absmax", scale)
        for key, parameter in model.named_parameters()
        if (state := getattr(parameter, "quant_state", None)) is not None
        for scale in (state.absmax, state.offset, getattr(state.state2, "absmax", None))
        if isinstance(scale, torch.Tensor)
    )
    bad = weights.not_finite(model.named_parameters()) or weights.not_finite(scales)
    if bad:
        stored = {} if files.is_adapter(name) else files.stored_tensors(name)
        where = f" in {stored[bad].file.name}" if bad in stored else ""
        raise ValueError(f"model {name!r}: expected finite weights; {bad}{where} has NaN or infinite elements")
