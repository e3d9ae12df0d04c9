"""Load sequence classifiers (reward models, sentiment oracles), or make them from the body of a causal LM."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from exo.models import files, multimodal
from exo.models.errors import no_bars_in_logs, one_line_errors
from exo.models.loading import load, load_config, load_tokenizer, load_weights
from exo.models.meta import load_without_weights
from exo.models.supported import refuse_unsupported
from exo.models.tiny_models import PAD


def load_classifier(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier of one output (a reward model) or two classes, and its tokenizer; strict as `load`."""
    if files.is_adapter(name):
        raise ValueError(
            f"model {name!r}: is an adapter; expected a sequence classifier; python -m exo.reward trains one"
        )
    with no_bars_in_logs():
        config = load_config(name)
        if not any("SequenceClassification" in head for head in config.architectures or []):
            raise ValueError(
                f"model {name!r}: expected a sequence classifier, got {config.architectures}; python -m exo.reward "
                "trains one"
            )
        if (config.num_labels or 0) > 2:
            raise ValueError(f"model {name!r}: expected one output (a reward) or two classes, got {config.num_labels}")
        tokenizer = load_tokenizer(name)
        return load_weights(AutoModelForSequenceClassification, name, config), tokenizer


def classifier_from(name: str, outputs: int, *, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a sequence classifier on the body of a causal LM (an adapter is merged); `seed` draws its head."""
    with no_bars_in_logs(), torch.random.fork_rng(devices=[]):
        if files.is_adapter(name) or multimodal.is_wrapper(load_config(name)):
            causal, tokenizer = load(name)
            torch.default_generator.manual_seed(seed)
            model = _with_new_head(name, causal, outputs)
        else:
            config = load_config(name)
            refuse_unsupported(config)
            _refuse_without_classifier(config)
            tokenizer = load_tokenizer(name)
            config.num_labels = outputs
            torch.default_generator.manual_seed(seed)
            model = load_weights(AutoModelForSequenceClassification, name, config, head_is_new=True)
        _separate_pad_token(model, tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id  # transformers pools by it
        return model, tokenizer


def classifier_without_weights(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the body and the tokenizer of `classifier_from`, on the meta device: no weights are read."""
    model, tokenizer = load_without_weights(name)
    _refuse_without_classifier(model.config)
    _separate_pad_token(model, tokenizer)
    return model, tokenizer


def _refuse_without_classifier(config: PreTrainedConfig) -> None:
    if MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None) is None:
        raise ValueError(
            f"model type {config.model_type!r} is not supported: transformers has no sequence classifier of this type"
        )


def _with_new_head(name: str, causal: Any, outputs: int) -> Any:
    """Put a new head on the body of a loaded causal LM."""
    _refuse_without_classifier(causal.config)
    causal.config.num_labels = outputs
    with one_line_errors(name, "a body that a sequence classifier can have"):
        with init_empty_weights():
            model: Any = AutoModelForSequenceClassification.from_config(causal.config)
        setattr(model, model.base_model_prefix, causal.base_model)
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                model._init_weights(module)
    return model


def _separate_pad_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a padding token other than the end of sequence, because transformers pools the last token before padding."""
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    pad_token = next((token for token in (PAD, "<|padding|>", "[PAD]", "<|pad|>") if token in vocabulary), PAD)
    tokenizer.add_special_tokens({"pad_token": pad_token})
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
