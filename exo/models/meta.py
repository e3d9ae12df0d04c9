"""Build causal LMs from their configs alone, on the meta device: no weights are read or needed."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from exo.models import files, multimodal
from exo.models.errors import one_line_errors
from exo.models.loading import load_config, load_tokenizer, parameter_count
from exo.models.supported import refuse_unsupported


def load_without_weights(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model, on the meta device, and the tokenizer of `load`; ValueError for what it refuses by config.

    Of an adapter, only the configs and tokenizers of its chain are read.
    """
    root = files.root_of(name)
    model, tokenizer = _on_meta(root), load_tokenizer(root)
    while files.is_adapter(name):
        if (Path(name) / "tokenizer_config.json").is_file():
            return model, load_tokenizer(name)
        name = files.base_of(name)
    return model, tokenizer


def parameters_of(name: str) -> int:
    """Count the parameters of a causal LM from its config, without reading weights."""
    return parameter_count(_on_meta(name))


def _on_meta(name: str) -> PreTrainedModel:
    """Return the causal LM that a config describes, without weights; ValueError for one that `load` refuses."""
    config = load_config(name)
    refuse_unsupported(config)
    with one_line_errors(name, "a config.json that makes a causal LM"), torch.device("meta"):
        if multimodal.is_wrapper(config):
            return multimodal.causal_class(config)(config.get_text_config())
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
