"""Odd, incomplete or hostile model directories: they load correctly or are refused with a one-line error."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from exo import align, models, ppo, reward, sft
from tests.tasks import PROMPTS, write_model, write_rows

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def model(start, tmp_path):
    """Return a copy of a model directory for the test to damage."""
    return shutil.copytree(start, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def refusal(directory, load=models.load, **options):
    with pytest.raises(ValueError) as caught:
        load(str(directory), **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change", ["fewer layers", "a bias", "a tensor", "quantisation scales"])
@pytest.mark.parametrize("kind", ["load", "mapped", "reward"])
def test_weights_that_the_config_has_no_place_for_are_refused_by_name(model, change, kind):
    names = {"a bias": "model.layers.0.self_attn.q_proj.bias", "a tensor": "model.extra.weight"}
    names["quantisation scales"] = "model.layers.0.mlp.up_proj.weight_scale_inv"
    if change == "fewer layers":
        edit(model / "config.json", num_hidden_layers=1)
        expected = "got 9 that it has no place for: model.layers.1.input_layernorm.weight ..."
    else:
        weights(model, lambda tensors: tensors.update({names[change]: torch.ones(32)}))
        expected = f"got 1 that it has no place for: {names[change]}"
    if kind == "reward":
        assert expected in refusal(model, models.classifier_from, outputs=1, seed=0)
    else:
        assert expected in refusal(model, mapped=kind == "mapped")


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "value_head.weight", "v_head.0.bias"])
def test_a_value_head_beside_the_model_is_named_and_not_used(start, model, name, capsys):
    weights(model, lambda tensors: tensors.update({name: torch.ones(1, 32)}))
    loaded, expected = models.load(model)[0], models.load(start)[0]
    assert f"1 weights of a head that is not used: {name}" in capsys.readouterr().out
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_extra_buffers_of_old_checkpoints_are_accepted(model, tmp_path):
    """Check rotary frequencies, causal masks and a tied head, as old versions of transformers saved them."""

    def old(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    weights(model, old)
    models.load(model)
    _, tokenizer = models.load(model)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16))
    models.save(gpt, tokenizer, tmp_path / "gpt")

    def older(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    weights(tmp_path / "gpt", older)
    models.load(tmp_path / "gpt")


def test_a_head_that_is_not_tied_although_the_config_says_so_is_used(model):
    weights(model, lambda tensors: tensors.update({"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}))
    loaded, tokenizer = models.load(model)
    assert torch.equal(loaded.lm_head.weight, 2 * loaded.model.embed_tokens.weight)
    models.save(loaded, tokenizer, model)
    again = LlamaForCausalLM.from_pretrained(model)
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_with_file_and_name(model, bad, dtype):
    def spoil(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[LAYER][3, 5] = bad

    weights(model, spoil)
    for load, options in (
        (models.load, {}), (models.load, {"mapped": True}), (models.classifier_from, {"outputs": 1, "seed": 0})
    ):  # fmt: skip
        assert f"expected finite weights; {LAYER} in model.safetensors has NaN" in refusal(model, load, **options)
    classifier, tokenizer = models.classifier_from(write_model(model.parent / "plain"), 1, seed=0)
    classifier.score.weight.data[0, 0] = bad
    classifier.save_pretrained(model.parent / "reward")
    tokenizer.save_pretrained(model.parent / "reward")
    assert "score.weight in model.safetensors" in refusal(model.parent / "reward", models.load_classifier)


@pytest.mark.parametrize(("file", "entries", "key"), [
    ("config.json", {"transformers_weights": "../other.safetensors"}, "transformers_weights"),
    ("config.json", {"transformers_weights": "sub/w.safetensors.index.json"}, "transformers_weights"),
    ("config.json", {"transformers_weights": "/tmp/w.safetensors"}, "transformers_weights"),
    ("config.json", {"transformers_weights": ["model.safetensors"]}, "transformers_weights"),
    ("config.json", {"attn_implementation": "owner/name"}, "attn_implementation"),
    ("config.json", {"_attn_implementation": "owner/name:layer"}, "_attn_implementation"),
    ("config.json", {"attn_implementation": {"": "owner/name"}}, "attn_implementation"),
    ("config.json", {"experts_implementation": "owner/name"}, "experts_implementation"),
    ("config.json", {"text_config": {"attn_implementation": "paged|owner/name"}}, "attn_implementation"),
    ("config.json", {"use_pretrained_backbone": True, "backbone": "resnet50"}, "use_pretrained_backbone"),
    ("tokenizer_config.json", {"vocab_file": "../vocab.txt"}, "vocab_file"),
    ("tokenizer_config.json", {"vocab": "../vocab.txt"}, "vocab"),
    ("tokenizer_config.json", {"gguf_file": "../vocab.txt"}, "gguf_file"),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["../vocab.txt"]}, "fast_tokenizer_files"),
])  # fmt: skip
def test_files_and_kernels_elsewhere_are_refused(model, file, entries, key, monkeypatch):
    (model.parent / "vocab.txt").write_text("{}")
    shutil.copy(model / "model.safetensors", model.parent / "other.safetensors")
    monkeypatch.chdir(model)
    edit(model / file, **entries)
    assert f": {file}: {key}: expected" in refusal(model)
    assert f": {file}: {key}: expected" in refusal(model, models.load_tokenizer)


def test_code_named_by_a_config_is_not_run(model, monkeypatch):
    canary = model.parent / "canary"
    (model / "code.py").write_text(f"import os; os.mkdir({str(canary)!r})\nclass Model: pass\n")
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(f"import os; os.mkdir({str(canary)!r})\ndef generate(): pass\n")
    edit(model / "config.json", auto_map={"AutoConfig": "code.Model", "AutoModelForCausalLM": "code.Model"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Model", "code.Model"]})
    edit(model / "generation_config.json", custom_generate="owner/name")
    try:
        models.load(model)
    except ValueError as error:
        assert "\n" not in str(error)
    assert not canary.exists()


def test_links_and_paths_of_another_machine_are_fine(start, model):
    shutil.move(model / "model.safetensors", model.parent / "blob")
    (model / "model.safetensors").symlink_to("../blob")
    edit(model / "tokenizer_config.json", special_tokens_map_file="/home/someone/special.json", vocab_file="/gone/x")
    edit(model / "config.json", _name_or_path="/home/someone/model", attn_implementation="flash_attention_2")
    loaded = models.load(model)[0]
    assert loaded.config._attn_implementation == models.load(start)[0].config._attn_implementation


def write_adapter(base, directory, **changes):
    adapted = peft.get_peft_model(models.load(base)[0], peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(directory)
    edit(directory / "adapter_config.json", **changes)
    return str(directory)


def test_an_adapter_without_a_usable_base_is_refused_in_one_line(start, tmp_path):
    itself = write_adapter(start, tmp_path / "itself")
    edit(tmp_path / "itself/adapter_config.json", base_model_name_or_path=itself + "/../itself")
    assert "adapter whose base is, in the end, itself" in refusal(itself)
    one, two = (write_adapter(start, tmp_path / name) for name in ("one", "two"))
    edit(tmp_path / "one/adapter_config.json", base_model_name_or_path=two)
    edit(tmp_path / "two/adapter_config.json", base_model_name_or_path=one)
    assert "adapter whose base is, in the end, itself" in refusal(one)
    for changes, message in (
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a model"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: expected a model"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path: expected a model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config: expected none"),
        ({"base_model_name_or_path": "o/n", "revision": "abc"}, "revision: expected none"),
        ({"peft_type": "NOPE"}, "expected an adapter that fits"),
        ({"r": "x"}, "expected an adapter that fits"),
    ):
        assert message in refusal(write_adapter(start, tmp_path / "odd", **changes)), changes
    (tmp_path / "odd/adapter_config.json").write_text("[1]")
    assert "a JSON object in adapter_config.json" in refusal(tmp_path / "odd")


ODD = [None, True, -1, 0, 2.5, 1e308, 10**30, "x", "", [], [5], {}, {"a": 1}]


@pytest.mark.parametrize("load", [models.load, models.load_classifier, models.parameters_of])
def test_a_config_that_is_odd_in_one_entry_is_loaded_or_refused_in_one_line(start, model, load):
    if load is models.load_classifier:
        classifier, tokenizer = models.classifier_from(start, 1, seed=0)
        models.save(classifier, tokenizer, model)
    config = json.loads((model / "config.json").read_text())
    draw = random.Random(0)
    cases = [
        (key, value) for key in [*config, "architectures", "quantization_config", "sliding_window"] for value in ODD
    ]
    for key, value in [("architectures", [5]), ("architectures", 5), ("model_type", None), *draw.sample(cases, 60)]:
        if key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") and value == 10**30:
            continue
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        try:
            load(str(model))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, (key, value)
        except Exception as error:
            raise AssertionError(f"{key}={value!r}: {error!r}") from error


@pytest.mark.parametrize(
    "text", ["[]", "5", "", "{", "[" * 100_000, '{"a": ' * 20_000, "\x00", '"x"', "null", "é".encode("latin-1")]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_refused_in_one_line(model, file, text):
    (model / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        models.load(model)
        assert file == "generation_config.json"
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("mapped", [True, False])
def test_a_bad_header_of_the_weights_is_refused_in_one_line(model, mapped):
    content = (model / "model.safetensors").read_bytes()
    for bad in (b"", b"\xff" * 64, content[:40], content[:-10], (2**40).to_bytes(8, "little") + content[8:]):
        (model / "model.safetensors").write_bytes(bad)
        assert "safetensors" in refusal(model, mapped=mapped)


PANICS = {
    "when read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "when it encodes": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("when", PANICS)
def test_a_tokenizer_that_panics_is_refused_in_one_line(model, when):
    edit(model / "tokenizer.json", **PANICS[when])
    assert "expected a tokenizer beside the weights" in refusal(model, models.load_tokenizer)
    assert "expected a tokenizer beside the weights" in refusal(model)


@pytest.mark.parametrize("stage", [sft, align, reward, ppo])
def test_all_weights_are_trained_from_an_adapter(stage, start, tmp_path):
    adapter = write_adapter(start, tmp_path / "adapter")
    rows = [{"prompt": p, "chosen": " good small good", "rejected": " bad"} for p in PROMPTS]
    arguments = ["--model", adapter, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--device", "cpu"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--batch_size", "4"]
    arguments += ["--learning_rate", "1e-3"]
    if stage is ppo:
        arguments += ["--oracle", "tests.tasks:reward", "--rollout_size", "4", "--max_new_tokens", "4"]
        arguments += ["--critic_warmup_steps", "0"]
    assert stage.main(arguments) == 0
    merged = models.load(adapter)[0]
    assert all(parameter.requires_grad for parameter in merged.parameters())
    before = merged.state_dict()
    after = load_file(tmp_path / "run/model.safetensors")
    for name, tensor in after.items():
        if name in before:
            assert not torch.equal(tensor, before[name]), name


def test_a_reward_model_starts_from_the_body_merged_with_the_adapter(start, tmp_path):
    adapter = write_adapter(start, tmp_path / "adapter")
    classifier, _ = models.classifier_from(adapter, 1, seed=3)
    expected, plain = models.load(adapter)[0], models.classifier_from(start, 1, seed=3)[0]
    ids = torch.tensor([[3, 5, 7, 4]])
    assert torch.equal(classifier.eval().model(ids)[0], expected.eval().model(ids)[0])
    assert torch.equal(classifier.score.weight, plain.score.weight), "the same seed must give the same head"
    assert not torch.equal(classifier.model(ids)[0], plain.eval().model(ids)[0])
