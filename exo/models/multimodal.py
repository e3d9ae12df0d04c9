"""The text part of a multimodal checkpoint, as a causal LM of its own.

A wrapper around a language model (Gemma 3 and 4, Qwen 3.5, Llama 4, Mistral 3, LLaVA ...) is loaded and its text part
extracted. The part must compute the wrapper's logits on text before it is used. Images, audio and video are not
supported, and the wrapper is not saved again.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from exo.cli import console
from exo.models.quiet import explained, without_warnings

CLOSE = 1e-4  # of the largest logit
TOKENS = 12  # of the text on which both are compared
MODALITIES = ("vision", "audio", "vq_", "image", "video", "speech")


def others(config: PreTrainedConfig) -> list[str]:
    """Return the names of a config's parts that are not text."""
    declared = {*config.sub_configs, *vars(config)}
    return sorted(key for key in declared if key.startswith(MODALITIES) and key.endswith("config"))


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Return whether a config is of a model around a text model."""
    return "text_config" in {*config.sub_configs, *vars(config)}


def causal_class(config: PreTrainedConfig) -> Any:
    """Return transformers' causal LM for the text part of a wrapper; None if there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.get_text_config()), None)


def wrapper_class(config: PreTrainedConfig) -> Any:
    """Return the class that a wrapper's checkpoint was saved from; None if it is none of transformers'."""
    named = [getattr(transformers, head, None) for head in config.architectures or []]
    if named and isinstance(named[0], type) and getattr(named[0], "config_class", None) is type(config):
        return named[0]
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)


def text_part(name: str, config: PreTrainedConfig, read: Callable[[Any], PreTrainedModel], compared: bool) -> Any:
    """Return the causal LM inside a wrapper, which `read` loads given its class; print one line that says so.

    `compared` runs both on a few tokens. ValueError if the part cannot be extracted, or computes something else.
    """
    whole, kind = wrapper_class(config), causal_class(config)
    with explained(name, f"what {whole.__name__} is made of"), without_warnings(), torch.device("meta"):
        whole(copy.deepcopy(config))  # before its weights are read: a tower may need another library
    wrapper: Any = read(whole)
    with explained(name, f"a {kind.__name__} inside a {type(wrapper).__name__}"), without_warnings():
        model = _extracted(wrapper, kind)
        _keep_quantizer(wrapper, model)
        model.name_or_path = model.config._name_or_path = name  # where an adapter will look for it
        if compared:
            _compare(wrapper, model)
    console.log(
        f"  {name}: {type(wrapper).__name__} is multimodal; its text part alone is used and saved, as {kind.__name__}"
    )
    return model


def _extracted(wrapper: Any, kind: Any) -> Any:
    """Return a causal LM of the wrapper's own modules."""
    for module in wrapper.modules():
        if type(module) is kind:  # as in Llama 4
            return module
    config = wrapper.config.get_text_config()
    with init_empty_weights():
        model = kind(config)
    tower = [module for module in wrapper.modules() if type(module) is type(model.base_model)]
    if len(tower) != 1:
        raise ValueError(f"{len(tower)} modules of the kind {type(model.base_model).__name__}")
    setattr(model, model.base_model_prefix, tower[0])
    head = wrapper.get_output_embeddings()
    model.set_output_embeddings(head)
    model.config = tower[0].config
    model.config.tie_word_embeddings = head.weight is tower[0].get_input_embeddings().weight
    model.generation_config = wrapper.generation_config
    return model.train(wrapper.training)


def _keep_quantizer(wrapper: Any, model: Any) -> None:
    """Let a part in 4 bits be known as such to transformers and peft."""
    if getattr(wrapper, "hf_quantizer", None) is None:
        return
    for name, value in vars(wrapper).items():
        if name == "hf_quantizer" or name.startswith("is_") or "quantiz" in name:
            vars(model).setdefault(name, value)
    model.hf_quantizer = wrapper.hf_quantizer
    model.config.quantization_config = wrapper.config.quantization_config


@torch.no_grad()
def _compare(wrapper: Any, model: Any) -> None:
    config = wrapper.config.to_dict()
    special = {value for key, value in config.items() if key.endswith(("_id", "_index")) and isinstance(value, int)}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [i for i in range(0, vocabulary, max(1, vocabulary // (2 * TOKENS))) if i not in special][:TOKENS]
    inputs = {"input_ids": torch.tensor([ids], device=model.device), "use_cache": False}
    model.eval()
    wrapper.eval()
    expected, found = wrapper(**inputs).logits.float(), model(**inputs).logits.float()
    eps = torch.finfo(model.dtype).eps
    off, most = float((found - expected).abs().amax()), float(expected.abs().amax())
    if not off <= max(CLOSE, 8 * eps) * most:
        raise ValueError(f"other logits than the wrapper's own, by {off:.2g} of {most:.2g}: text alone is not enough")
