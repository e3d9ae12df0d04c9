"""Build small models from a config, for trials and tasks; nothing is downloaded."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
# lets the tiny model read chats
TEMPLATE = (
    "{% for message in messages %}{{ '\n\n' if loop.index > 1 }}{{ message.role | capitalize }}:"
    "{{ ' ' + message.content | trim }}{{ eos_token if message.role == 'assistant' }}{% endfor %}"
    "{{ '\n\nAssistant:' if add_generation_prompt }}"
)


def tiny(
    texts: Iterable[str],
    *,
    seed: int = 0,
    vocab_size: int = 4096,
    hidden_size: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a small Llama with a byte-level BPE tokenizer that is trained on `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that no byte is unknown
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, chat_template=TEMPLATE)
    return _llama(tokenizer, seed, hidden_size, num_layers, num_heads), tokenizer


def word_level(
    words: Iterable[str], *, seed: int = 0, hidden_size: int = 128, num_layers: int = 2, num_heads: int = 4
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a small Llama with a tokenizer that splits at blanks; the vocabulary is `words` in order."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([PAD, UNKNOWN, END, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        clean_up_tokenization_spaces=False,  # True would join "good ." to "good.", which is another word
    )
    return _llama(tokenizer, seed, hidden_size, num_layers, num_heads), tokenizer


def _llama(tokenizer: PreTrainedTokenizerBase, seed: int, hidden: int, layers: int, heads: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # the weights are drawn on the CPU; torch.manual_seed would also reseed the accelerators, which the fork skips
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)
