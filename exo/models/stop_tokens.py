"""Find the tokens that end a completion, and the ids of the head that no text contains."""

from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from exo.data.text import chat_template


def stop_ids(model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every token id that ends a completion, sorted.

    These are the tokenizer's end of sequence, what the model's generation config names, and the end of turn of the chat
    template. `model` may be the name of one that is not loaded.
    """
    config = _generation_config(model) if isinstance(model, str) else getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = set(named if isinstance(named, list | tuple) else [named]) | {
        tokenizer.eos_token_id,
        chat_template.stop_id(tokenizer),
    }
    return tuple(sorted(i for i in ids if isinstance(i, int)))


def _generation_config(name: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # there is none beside the weights: the model's config has the ids, as transformers reads it
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(name, trust_remote_code=False))


def absent_ids(model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids below the model's vocabulary size that the tokenizer does not know, sorted.

    Embeddings are often padded to a round number of rows. `model` may be the name of one that is not loaded.
    """
    if isinstance(model, str):
        config: Any = AutoConfig.from_pretrained(model, trust_remote_code=False)
        size = config.get_text_config().vocab_size
    else:
        head: Any = model.get_output_embeddings()
        size = head.weight.shape[0]
    return tuple(sorted(set(range(size)) - set(tokenizer.get_vocab().values())))
