"""Extract the text part of a multimodal checkpoint as a causal LM.

A wrapper around a language model (Gemma 3 and 4, Qwen 3.5, Llama 4, Mistral 3, LLaVA ...) is loaded and its text part
extracted. The part must compute the wrapper's logits on text. Images, audio and video are not supported, and the
wrapper is not saved.
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
from exo.models.errors import one_line_errors, without_warnings

CLOSE = 1e-4  # of the largest logit
NUM_TOKENS = 12  # of the text on which both are compared
MODALITIES = ("vision", "audio", "vq_", "image", "video", "speech")


def other_modalities(config: PreTrainedConfig) -> list[str]:
    """Return the names of a config's parts that are not text."""
    declared = {*config.sub_configs, *vars(config)}
    return sorted(key for key in declared if key.startswith(MODALITIES) and key.endswith("config"))


def is_wrapper(config: PreTrainedConfig) -> bool:
    """Return whether a config describes a model around a text model."""
    return "text_config" in {*config.sub_configs, *vars(config)}


def causal_class(config: PreTrainedConfig) -> Any:
    """Return transformers' causal LM for the text part of a wrapper; None if there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.get_text_config()), None)


def wrapper_class(config: PreTrainedConfig) -> Any:
    """Return the class of a wrapper's checkpoint; None if it is not in transformers."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(architecture, type) and getattr(architecture, "config_class", None) is type(config):
        return architecture
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)


def text_part(name: str, config: PreTrainedConfig, read: Callable[[Any], PreTrainedModel], compared: bool) -> Any:
    """Return the causal LM inside a wrapper, which `read` loads given its class, and print that.

    `compared` runs both on a few tokens. ValueError if the part cannot be extracted, or computes something else.
    """
    wrapper_type, kind = wrapper_class(config), causal_class(config)
    with one_line_errors(name, f"what {wrapper_type.__name__} is made of"), without_warnings(), torch.device("meta"):
        wrapper_type(copy.deepcopy(config))  # before the weights are read: a tower may need another library
    wrapper: Any = read(wrapper_type)
    with one_line_errors(name, f"a {kind.__name__} inside a {type(wrapper).__name__}"), without_warnings():
        model = _extract(wrapper, kind)
        _copy_quantizer(wrapper, model)
        model.name_or_path = model.config._name_or_path = name  # the base of an adapter that is trained
        if compared:
            _compare(wrapper, model)
    console.log(
        f"  {name}: {type(wrapper).__name__} is multimodal; its text part alone is used and saved, as {kind.__name__}"
    )
    return model


def _extract(wrapper: Any, kind: Any) -> Any:
    """Return a causal LM made of the wrapper's modules."""
    for module in wrapper.modules():
        if type(module) is kind:  # as in Llama 4
            return module
    config = wrapper.config.get_text_config()
    with init_empty_weights():
        model = kind(config)
    bodies = [module for module in wrapper.modules() if type(module) is type(model.base_model)]
    if len(bodies) != 1:
        raise ValueError(f"{len(bodies)} modules of the kind {type(model.base_model).__name__}")
    body, head = bodies[0], wrapper.get_output_embeddings()
    setattr(model, model.base_model_prefix, body)
    model.set_output_embeddings(head)
    model.config = body.config
    model.config.tie_word_embeddings = head.weight is body.get_input_embeddings().weight
    model.generation_config = wrapper.generation_config
    return model.train(wrapper.training)


def _copy_quantizer(wrapper: Any, model: Any) -> None:
    """Mark the text part of a 4-bit wrapper as quantized, as transformers and peft expect it."""
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
    ids = [i for i in range(0, vocabulary, max(1, vocabulary // (2 * NUM_TOKENS))) if i not in special][:NUM_TOKENS]
    inputs = {"input_ids": torch.tensor([ids], device=model.device), "use_cache": False}
    model.eval()
    wrapper.eval()
    expected, logits = wrapper(**inputs).logits.float(), model(**inputs).logits.float()
    eps = torch.finfo(model.dtype).eps
    error, largest = float((logits - expected).abs().amax()), float(expected.abs().amax())
    if not error <= max(CLOSE, 8 * eps) * largest:
        raise ValueError(
            f"logits that differ from the wrapper's by {error:.2g} of {largest:.2g}: text alone is not enough"
        )
