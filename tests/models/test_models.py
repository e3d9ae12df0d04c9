"""Models: saving and loading changes nothing; unsupported models and bad directories are refused with a reason."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2VLConfig,
    T5Config,
    ViTConfig,
)

from exo import models
from exo.experiments.quickstart import corpus, vocabulary

TEXTS = [f"{prompt} {text}" for prompt, text in corpus(200, seed=0)]
BUILDERS = {
    "tiny": lambda seed=0: models.tiny(TEXTS, seed=seed, hidden_size=32),
    "word_level": lambda seed=0: models.word_level(vocabulary(), seed=seed, hidden_size=32),
}


@pytest.fixture(scope="module", params=BUILDERS)
def saved(request, tmp_path_factory):
    model, tokenizer = BUILDERS[request.param]()
    directory = tmp_path_factory.mktemp("model")
    models.save(model, tokenizer, directory)
    return model, tokenizer, directory


def changed_copy(directory, tmp_path, drop=(), **config):
    """Copy a saved model without the files in `drop` and with changed config entries; return the copy."""
    for file in directory.iterdir():
        if file.name not in drop:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    entries = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | config))
    return tmp_path


@pytest.mark.parametrize("read", ["ours", "transformers"])
def test_round_trip_leaves_the_logits_as_they_were(saved, read):
    model, tokenizer, directory = saved
    if read == "ours":
        again, tokenizer_again = models.load(directory)
    else:
        again = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer_again = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    assert torch.equal(tokenizer_again(TEXTS[0], return_tensors="pt")["input_ids"], ids)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert again.dtype == torch.float32
    assert again.generation_config.eos_token_id == tokenizer_again.eos_token_id == tokenizer.eos_token_id
    assert tokenizer_again.pad_token_id == tokenizer.pad_token_id


def test_word_level_text_survives(saved):
    _, _, directory = saved
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_byte_level_encodes_any_text():
    _, tokenizer = BUILDERS["tiny"]()
    text = "Never seen:  Ünïcode 漢字\n\ttabs , and \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", BUILDERS)
def test_the_seed_sets_the_weights_and_the_global_random_state_is_unchanged(name):
    state = torch.get_rng_state()
    (one, first), (two, second), (three, _) = (BUILDERS[name](seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.get_vocab() == second.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, three.lm_head.weight)


def test_parameters_of_a_tied_head_count_once():
    model, tokenizer = BUILDERS["word_level"]()
    head = len(tokenizer) * 32
    assert models.parameter_count(model) == sum(w.numel() for w in model.model.parameters())
    assert models.parameter_count(model) > head


def test_a_missing_pad_token_becomes_eos(saved, tmp_path):
    _, _, directory = saved
    changed_copy(directory, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    entries = json.loads(path.read_text())
    del entries["pad_token"]
    path.write_text(json.dumps(entries))
    _, tokenizer = models.load(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    del entries["eos_token"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="expected a tokenizer with an eos_token, got none"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("drop", "config", "message"),
    [
        (("model.safetensors",), {}, "expected weights in safetensors"),
        (("tokenizer.json", "tokenizer_config.json"), {}, "expected a tokenizer beside the weights"),
        ((), {"model_type": "no-such-type"}, "expected a config.json of a type"),
        ((), {"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ((), {"num_hidden_layers": 3}, "expected every weight of LlamaForCausalLM"),
        ((), {"hidden_size": 64, "head_dim": 16}, "missing or of other shapes"),
        ((), {"architectures": ["LlamaForSequenceClassification"]}, "a classifier"),
    ],
)
def test_a_bad_directory_is_refused_in_one_line(saved, tmp_path, drop, config, message):
    _, _, directory = saved
    with pytest.raises(ValueError, match=message) as caught:
        models.load(changed_copy(directory, tmp_path, drop, **config))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_read(saved, tmp_path):
    model, _, directory = saved
    changed_copy(directory, tmp_path, drop=("model.safetensors",))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles are not read"):
        models.load(tmp_path)


def test_a_missing_directory_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match="expected a directory or a hub name, got neither"):
        models.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "encoder-decoder"),
        (BertConfig(), "attends both ways"),
        (Qwen2VLConfig(), "multimodal"),
        (ViTConfig(), "no causal LM of this type"),
        (MixtralConfig(output_router_logits=True), "auxiliary router loss"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_an_unsupported_model_type_is_refused_with_a_reason(config, message):
    with pytest.raises(ValueError, match=f"model type '{config.model_type}' is not supported: .*{message}"):
        models.refuse_unsupported(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        GPT2Config(),
        BertConfig(is_decoder=True),
        MixtralConfig(),
        MixtralConfig(output_router_logits=True, router_aux_loss_coef=0.0),
    ],
)
def test_supported_model_types_are_not_refused(config):
    models.refuse_unsupported(config)
