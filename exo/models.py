"""Models and tokenizers: loading, small ones built on the spot, saving.

The only file of the product that knows transformers; everything else sees a torch module, its
config and a tokenizer. Leaves out devices, dtypes other than fp32 and adapters: the training loop
owns those.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from exo import artifacts

try:
    from huggingface_hub.errors import StrictDataclassError
    from huggingface_hub.utils import logging as hub_logging
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    from transformers.utils import logging as transformers_logging
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "tokenizers", "huggingface_hub"):
        raise
    raise ModuleNotFoundError(f"exo needs {error.name}: pip install 'exo-kernels[train]'", name=error.name) from None

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"


def load(name: str | PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in fp32 and its tokenizer, from a directory or a hub name.

    Weights come from safetensors only and no code of the repository is run: neither a pickle nor a
    modelling file can execute anything here. Every refusal is a one-line ValueError.
    """
    name = str(name)
    if Path(name).is_absolute() or name.startswith((".", "~")):
        if not Path(name).is_dir():
            raise ValueError(f"model {name!r}: expected a directory or a hub name, got neither")
    with _bars_only_on_a_terminal():
        config = _load_config(name)
        refuse_unsupported(config)
        tokenizer = load_tokenizer(name)  # before the weights, which take longer to read
        return _load_weights(AutoModelForCausalLM, name, config), tokenizer


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
        model = _load_weights(AutoModelForSequenceClassification, name, config)
        model.config.pad_token_id = tokenizer.pad_token_id  # its pooling goes by it
        return model, tokenizer


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
        model.config.pad_token_id = tokenizer.pad_token_id  # its pooling goes by it
        return model, tokenizer


def load_or_tiny(
    name: str, texts: Callable[[], Iterable[str]], *, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load`, or where the name is "tiny" a small model on `texts`."""
    if name == "tiny":
        return tiny(texts(), seed=seed)
    if not Path(name).exists() and difflib.get_close_matches(name, ["tiny"]):
        raise ValueError(f"--model {name}: no such directory; did you mean tiny?")
    return load(name)


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """ValueError, naming why, for a model whose loss or log-probabilities would come out wrong."""
    for refusal in (_not_decoder_only, _not_text_only, _not_a_language_model, _router_loss):
        if reason := refusal(config):
            raise ValueError(f"model type {config.model_type!r} is not supported: {reason}")


def tiny(
    texts: Iterable[str],
    *,
    seed: int = 0,
    vocab_size: int = 4096,
    hidden_size: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama behind a byte-level BPE trained on `texts`: for trials without weights."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        # All 256 bytes, so that nothing a later text holds can be unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)
    return _llama(tokenizer, seed, hidden_size, num_layers, num_heads), tokenizer


def word_level(
    words: Iterable[str],
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama behind a tokenizer that splits at blanks and knows `words`, in their order."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([PAD, UNKNOWN, END, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        # True would glue "good ." into "good.", which is another word.
        clean_up_tokenization_spaces=False,
    )
    return _llama(tokenizer, seed, hidden_size, num_layers, num_heads), tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | PathLike[str]) -> None:
    """Write safetensors, config, generation config and tokenizer, as transformers reads them."""
    with _bars_only_on_a_terminal():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path, name: str) -> None:
    """`save` into checkpoints/`name` of a run: there whole, or not at all."""
    target = run / "checkpoints" / name
    target.parent.mkdir(exist_ok=True)
    with artifacts.staged(target) as staging:
        save(model, tokenizer, staging)


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of the model, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


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
    """A padding token that is not the end of sequence: a classifier pools at the last token that is no padding, and
    would never see the end."""
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


def _load_weights(kind: Any, name: str, config: PreTrainedConfig, *, head_is_new: bool = False) -> PreTrainedModel:
    what = "weights in safetensors (pickles are not read; save_pretrained converts)"
    with _explained(name, what), _without_warnings():
        # Typed for its usual answer; asked for its report as well, it gives two things.
        loaded: Any = kind.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
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


def _not_decoder_only(config: PreTrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; expected a decoder-only causal LM"
    # BERT and its kin sit in the causal-LM mapping too, but attend both ways unless told otherwise:
    # each token would be scored by a model that has already seen it.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        if not getattr(config, "is_decoder", False):
            return "it is a masked LM that attends both ways; expected a causal LM"
    return None


def _not_text_only(config: PreTrainedConfig) -> str | None:
    declared = {*config.sub_configs, *vars(config)}
    foreign = sorted(key for key in declared if key.startswith(("vision", "audio", "vq_")) and "config" in key)
    # A text_config means a wrapper around the text model, made for inputs that are not text.
    if foreign or "text_config" in declared:
        return (
            f"it is multimodal ({', '.join(foreign) or 'text_config'} in its config), and what is "
            "not text would be left out of the prompt; expected a text-only causal LM"
        )
    return None


def _not_a_language_model(config: PreTrainedConfig) -> str | None:
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "transformers has no causal LM of this type"
    heads = config.architectures or []
    # Such a checkpoint loads without complaint when the LM head is tied to the embedding.
    if heads and all(head.endswith(("Classification", "QuestionAnswering")) for head in heads):
        return f"the checkpoint is a {heads[0]}, a classifier; expected a causal LM"
    return None


def _router_loss(config: PreTrainedConfig) -> str | None:
    """transformers adds the load-balancing loss only where `output_router_logits` is true.

    It is added to the loss that the model computes from labels; ours is computed from its logits,
    so the term would vanish in silence. With the flag false, the default of every mixture of
    experts in transformers, its own Trainer leaves the term out as well: nothing is dropped.
    """
    if not getattr(config, "output_router_logits", False):
        return None
    places = (config, getattr(config, "ffn_config", None))
    names = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef", "moe_loss_weight")
    found = {name: getattr(place, name) for place in places for name in names if hasattr(place, name)}
    if found and not any(found.values()):
        return None
    return (
        f"it asks for an auxiliary router loss (output_router_logits, {found}) that the preference "
        "loss would drop; set output_router_logits to false to train without it"
    )


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
    # The CPU generator alone is seeded, since the weights are drawn there: torch.manual_seed would
    # reseed the accelerators too, and the fork below leaves those be.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


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
