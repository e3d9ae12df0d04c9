"""Refuse models, by their config, whose loss or log-probs would be wrong."""

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from exo.models import multimodal


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise ValueError with the reason for a model whose loss or log-probs would be wrong."""
    for refusal in (_not_decoder_only, _not_text_only, _not_a_language_model, _router_loss, _quantized):
        if reason := refusal(config):
            raise ValueError(f"model type {config.model_type!r} is not supported: {reason}")


def _not_decoder_only(config: PreTrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; expected a decoder-only causal LM"
    # BERT and its relatives have causal-LM classes too, but attend in both directions by default, so they see each
    # token before they score it
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "it is a masked LM that attends both ways; expected a causal LM"
    return None


def _not_text_only(config: PreTrainedConfig) -> str | None:
    """Accept a wrapper around a text model if transformers has a causal LM for the text part (multimodal.py)."""
    parts = multimodal.other_modalities(config)
    if not multimodal.is_wrapper(config):
        return f"it is multimodal ({', '.join(parts)} in its config) and has no text part of its own" if parts else None
    text = config.get_text_config()
    if multimodal.causal_class(config) is None:
        kind = text.model_type
        return f"it is multimodal, and transformers has no causal LM for its text part (model type {kind!r})"
    if multimodal.wrapper_class(config) is None:
        return f"it is multimodal, and transformers has no model of {(config.architectures or ['this type'])[0]}"
    for refusal in (_not_decoder_only, _router_loss, _quantized):
        if reason := refusal(text):
            return f"of its text part, {text.model_type!r}: {reason}"
    return None


def _not_a_language_model(config: PreTrainedConfig) -> str | None:
    if multimodal.is_wrapper(config):
        return None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal LM of this type"
    heads = config.architectures or []
    # such a checkpoint loads without an error if the LM head is tied to the embedding
    if heads and all(head.endswith(("Classification", "QuestionAnswering")) for head in heads):
        return f"the checkpoint is a {heads[0]}, a classifier; expected a causal LM"
    return None


def _router_loss(config: PreTrainedConfig) -> str | None:
    """Refuse `output_router_logits`: its load-balancing loss is part of transformers' loss, and ours would drop it.

    Without the flag, the default of every mixture of experts, transformers' Trainer leaves the term out too.
    """
    if not getattr(config, "output_router_logits", False):
        return None
    places = (config, getattr(config, "ffn_config", None))
    names = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef", "moe_loss_weight")
    coefficients = {name: getattr(place, name) for place in places for name in names if hasattr(place, name)}
    if coefficients and not any(coefficients.values()):
        return None
    return (
        f"its auxiliary router loss (output_router_logits, {coefficients}) would be dropped by the preference loss; "
        "set output_router_logits to false to train without it"
    )


def _quantized(config: PreTrainedConfig) -> str | None:
    if getattr(config, "quantization_config", None):
        return "its weights are quantized; expected weights in 16 or 32 bits, which --load_in_4bit can quantize"
    return None
