"""Small tokenizers of the kinds that public models have. Each treats the beginning of a text differently."""

import json
from collections.abc import Callable
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from exo.data.text import tokenize

CORPUS = [
    "the cat sat on the mat. Human: what is it? Assistant: good\nbad answers, one two\n\nthree <think> user ok"
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|user|>", "<|assistant|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of a prompt as sampling sees them."""
    (ids,), _ = tokenize.sampled_prompts([prompt], tokenizer, 10**6)
    return ids


def byte_level(add_prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(backend, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))


def llama3() -> Tokenizer:
    """Return a byte-level tokenizer that splits by a pattern, and whose post-processor adds BOS."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_pattern(), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _with_special_tokens(backend, "<s> $A")


def _pattern() -> Any:
    from tokenizers import Regex

    return Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def dummy_prefix() -> Tokenizer:
    """Return a tokenizer like that of Llama 2: it adds a blank before every text and falls back to bytes."""
    backend = metaspace("always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return backend


def metaspace(scheme: Literal["always", "first", "never"]) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # no piece spans two words
    backend = _with_bytes(_trained(backend, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL)))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    metaspaces = decoders.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspaces])
    return _with_special_tokens(backend, "<s> $A")


def _with_bytes(backend: Tokenizer) -> Tokenizer:
    """Add a token for each byte, to which unknown characters fall back."""
    description = json.loads(backend.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(BYTES)}
    description["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(description))


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    alphabet = sorted(set("".join(CORPUS)))
    return _trained(
        backend,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
        ),
    )


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return _trained(backend, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))


def word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(backend, trainers.WordLevelTrainer(special_tokens=SPECIAL))


def _trained(backend: Tokenizer, trainer: Any) -> Tokenizer:
    trainer.show_progress = False
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


def _with_special_tokens(backend: Tokenizer, template: str) -> Tokenizer:
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return backend


def _transformers_tokenizer(backend: Tokenizer, **names: str | None) -> PreTrainedTokenizerFast:
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in tokens.items() if v})


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level, no BOS (GPT-2, Qwen)": lambda: _transformers_tokenizer(byte_level(), bos_token=None),
    "byte-level with a prefix blank": lambda: _transformers_tokenizer(byte_level(True), bos_token=None),
    "byte-level with BOS (Llama 3)": lambda: _transformers_tokenizer(llama3(), pad_token=None),
    "byte-level, pad = EOS": lambda: _transformers_tokenizer(byte_level(), bos_token=None, pad_token="</s>"),
    "byte-level that appends EOS": lambda: _transformers_tokenizer(_with_special_tokens(byte_level(), "$A </s>")),
    "byte-level with BOS and EOS": lambda: _transformers_tokenizer(_with_special_tokens(byte_level(), "<s> $A </s>")),
    "SentencePiece with a dummy prefix (Llama 2)": lambda: _transformers_tokenizer(dummy_prefix(), pad_token=None),
    "Metaspace first (Llama 2, new format)": lambda: _transformers_tokenizer(metaspace("first")),
    "Metaspace always (Mistral)": lambda: _transformers_tokenizer(metaspace("always")),
    "Metaspace never (Gemma)": lambda: _transformers_tokenizer(metaspace("never")),
    "Unigram (XLM, T5)": lambda: _transformers_tokenizer(unigram(), bos_token=None),
    "WordPiece (BERT)": lambda: _transformers_tokenizer(word_piece(), bos_token=None),
    "words": lambda: _transformers_tokenizer(word_level(), bos_token=None),
}
WORDS_ONLY = ("WordPiece (BERT)", "words")  # drop line breaks, and join letters to the word before them
