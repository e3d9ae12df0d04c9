"""LoRA: the reference is the model without the adapter, the saved model has it, and an earlier adapter is kept."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exo import align, models, sft
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed.accelerator import make_accelerator
from exo.models import lora as model_lora
from exo.training import preference
from exo.training.loop import Settings, _save_memory
from exo.training.optimizer import OptimizerSettings
from exo_kernels.schedules import plan
from tests import interruptions
from tests.tasks import PROMPTS, WORDS, lines, reward, write_model, write_rows

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")


def lora_settings(rank: int) -> model_lora.LoraSettings:
    return model_lora.LoraSettings(rank, 16, 0.0, "all-linear", "merged", False)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("start") / "model", scale=2.0)


def rows():
    examples = []
    for i, prompt in enumerate(PROMPTS * 4):
        texts = [f" {WORDS[i % 5]} good", " good good small", f" bad {WORDS[(i + 2) % 5]}", " big"]
        examples.append(
            {"prompt": f"{prompt} {WORDS[i % 7]}", "completions": texts, "rewards": [reward("", t) for t in texts]}
        )
    return examples


def aligned(start, tmp_path, name, *options):
    data = write_rows(tmp_path / "rows.jsonl", rows())
    arguments = ["--model", start, "--data", data, "--output_dir", str(tmp_path / name), "--max_steps", "6"]
    arguments += ["--batch_size", "8", "--learning_rate", "1e-2", "--device", "cpu", "--beta_pi", "0.5"]
    assert align.main([*arguments, "--lora_r", "4", *options]) == 0
    return tmp_path / name


def logits(model):
    ids = torch.tensor([[3, 5, 7, 4, 8]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_reference_is_the_model_without_the_adapter(start, tmp_path):
    """Check that a live reference (adapter disabled) and a cached one (computed before it was added) agree."""
    cached, live = (aligned(start, tmp_path, mode, "--reference", mode) for mode in ("cache", "live"))
    for a, b in zip(lines(cached / "metrics.jsonl"), lines(live / "metrics.jsonl"), strict=True):
        for name in ("loss", "log_ratios/mean_square", "eval_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-4), name
    assert lines(live / "metrics.jsonl")[5]["log_ratios/mean_square"] > 0.01, "the policy must have changed"


def test_a_disabled_adapter_gives_the_bits_of_the_base_model(start):
    model, _ = models.load(start)
    base_logits = logits(model)
    adapted = model_lora.apply(model, lora_settings(4), start)
    assert torch.equal(logits(adapted), base_logits), "a new adapter must not change the logits"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert not torch.equal(logits(adapted), base_logits)
    with model_lora.disabled(adapted):
        assert torch.equal(logits(adapted), base_logits)
    assert {"lora_" in name for name, p in adapted.named_parameters() if p.requires_grad} == {True}


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_the_saved_model_is_the_trained_model(start, tmp_path, output):
    """Check that merged and separate adapters load with the logits of the trained model."""
    run = aligned(start, tmp_path, output, "--lora_output", output, "--export_steps", "3")
    assert models.is_adapter(str(run)) == models.is_adapter(str(run / "models/step-3")) == (output == "adapter")
    again, tokenizer = models.load(str(run))
    first = models.load(start)[0]
    assert (logits(again) - logits(first)).abs().max() > 0.01
    if output == "merged":
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(run)), logits(again))
        other = aligned(start, tmp_path, "other", "--lora_output", "adapter")
        assert torch.allclose(logits(models.load(str(other))[0]), logits(again), atol=1e-5)


def test_a_policy_that_is_an_adapter_is_also_the_reference(start, tmp_path, capsys):
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": p, "completion": " good small good"} for p in PROMPTS])
    arguments = ["--model", start, "--data", texts, "--output_dir", str(tmp_path / "sft"), "--device", "cpu"]
    arguments += ["--max_steps", "8", "--learning_rate", "1e-2", "--lora_r", "4", "--lora_output", "adapter"]
    assert sft.main(arguments) == 0 and models.is_adapter(str(tmp_path / "sft"))
    tuned = models.load(str(tmp_path / "sft"))[0]
    assert (logits(tuned) - logits(models.load(start)[0])).abs().max() > 0.05
    run = aligned(str(tmp_path / "sft"), tmp_path, "run", "--max_steps", "1", "--learning_rate", "1e-9")
    first = lines(run / "metrics.jsonl")[0]
    assert first["log_ratios/mean_square"] < 1e-6, "the base model would be the wrong reference"
    assert torch.allclose(logits(models.load(str(run))[0]), logits(tuned), atol=1e-4)
    capsys.readouterr()
    arguments = [
        "--model",
        str(tmp_path / "sft"),
        "--data",
        write_rows(tmp_path / "rows.jsonl", rows()),
        "--lora_r",
        "4",
    ]
    assert align.main([*arguments, "--lora_output", "adapter", "--output_dir", str(tmp_path / "x")]) == 2
    assert "--lora_output adapter: expected a --model with weights of its own on disk" in capsys.readouterr().err


def test_a_frozen_head_uses_the_deferred_schedule(start, tmp_path, monkeypatch):
    taken = []
    choose = plan.choose

    def record_choice(schedule, needs, *rest):
        choice = choose(schedule, needs, *rest)
        taken.append((choice[0], needs.hidden))
        return choice

    monkeypatch.setattr(plan, "choose", record_choice)
    aligned(start, tmp_path, "run")
    assert {schedule for schedule, trained in taken if trained} == {"deferred"}


@pytest.fixture(scope="module", params=[64, 24])
def start_of_size(request, tmp_path_factory):
    """Return a model whose layers are multiples of the 4-bit blocks of 64 weights, as real ones are, or are not."""
    model, tokenizer = models.word_level(WORDS, hidden_size=request.param)
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    directory = tmp_path_factory.mktemp("start") / "model"
    models.save(model, tokenizer, directory)
    return str(directory)


def test_4_bit_weights_compute_like_their_fp32_values(start_of_size):
    """Check this with and without gradients; a pass without them comes first."""
    pytest.importorskip("bitsandbytes")
    model = models.load(start_of_size, four_bits=torch.float32)[0]
    expected = logits(models.dequantize(copy.deepcopy(model)))
    assert (logits(model) - expected).abs().max() < 1e-5
    ids = torch.tensor([[3, 5, 7, 4, 8]])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    result = model(inputs_embeds=embedded).logits
    assert (result - expected).abs().max() < 1e-5
    result.sum().backward()
    assert embedded.grad.abs().max() > 0


def test_a_4_bit_policy_has_a_4_bit_reference_and_saves_what_it_trained(start_of_size, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    start = start_of_size
    trained = []
    finish = model_lora.merged
    monkeypatch.setattr(
        model_lora, "merged", lambda model, *rest: trained.append(logits(model)) or finish(model, *rest)
    )
    run = aligned(start, tmp_path, "run", "--load_in_4bit", "--learning_rate", "3e-2")
    first, *_, last = (line for line in lines(run / "metrics.jsonl") if "loss" in line)
    assert first["log_ratios/mean_square"] < 1e-6, "the reference must have the 4-bit weights of the policy"
    assert last["log_ratios/mean_square"] > 0.01, "the policy must have changed"
    again = models.load(str(run))[0]
    assert (logits(again) - trained[0]).abs().max() < 1e-4
    assert "quantization_config" not in again.config.to_dict()
    unrounded, rounded = models.load(start)[0], models.load(start, four_bits=torch.float32)[0]
    assert (logits(rounded) - logits(unrounded)).abs().max() > 0.01, (
        "merging into the unrounded weights must be visible"
    )
    assert models.parameter_count(rounded) == models.parameter_count(unrounded)
    alone = aligned(start, tmp_path, "alone", "--load_in_4bit", "--lora_output", "adapter")
    assert models.is_adapter(str(alone))


def test_a_live_reference_without_its_adapter_has_no_dropout(tmp_path):
    interruptions.write_start(tmp_path / "model")
    interruptions.write_data(tmp_path)
    metrics = []
    for mode in ("live", "cache"):
        argv = interruptions.arguments("align", tmp_path, tmp_path / mode, "--reference", mode, "--lora_r", "4")
        assert align.main(argv[:1] + [str(tmp_path / "model")] + argv[2:]) == 0
        metrics.append([line for line in lines(tmp_path / mode / "metrics.jsonl") if "loss" in line])
    for live_line, cached_line in zip(
        *metrics, strict=True
    ):  # the reference draws no dropout masks, so the policy's are the same
        assert live_line["loss"] == pytest.approx(cached_line["loss"], abs=1e-4)


def test_an_adapter_that_fits_only_in_part_is_refused(start, tmp_path):
    run = aligned(start, tmp_path, "run", "--lora_output", "adapter")
    weights = load_file(run / "adapter_model.safetensors")
    for odd in (
        {name.replace("model.layers", "transformer.h"): w for name, w in weights.items()},
        {name: w for name, w in weights.items() if ".layers.1." not in name},
    ):
        save_file(odd, run / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="weights that are missing on one side"):
            models.load(str(run))


def test_an_adapter_loads_from_another_working_directory(start, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(start).parent)
    run = aligned(Path(start).name, tmp_path, "run", "--lora_output", "adapter")
    monkeypatch.chdir(tmp_path)
    models.load(str(run))


@pytest.mark.parametrize("targets", ["embed_tokens,q_proj", "lm_head"])
def test_an_adapter_on_the_embedding_or_the_head_is_refused(start, tmp_path, capsys, targets):
    arguments = ["--model", start, "--data", write_rows(tmp_path / "rows.jsonl", rows()), "--lora_r", "4"]
    assert align.main([*arguments, "--output_dir", str(tmp_path / "run"), "--lora_targets", targets]) == 2
    assert "expected layers between the embedding and the head" in capsys.readouterr().err


def test_weights_that_are_quantised_already_are_refused(start, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = models.load(start, four_bits=torch.float32)
    models.save(model, tokenizer, tmp_path / "four")
    with pytest.raises(ValueError, match="its weights are quantized"):
        models.load(str(tmp_path / "four"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_output", "adapter"], "--lora_output: expected --lora_r too"),
        (["--load_in_4bit"], "--load_in_4bit: expected --lora_r too"),
        (
            ["--load_in_4bit", "--lora_r", "4", "--model", "tiny"],
            "--load_in_4bit: expected a --model with weights of its own",
        ),
    ],
)
def test_4_bit_and_adapter_output_require_lora(start, tmp_path, capsys, options, message):
    arguments = ["--model", start, "--data", write_rows(tmp_path / "rows.jsonl", rows())]
    with pytest.raises(SystemExit) if "tiny" not in options else nullcontext():
        assert align.main([*arguments, "--output_dir", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_unknown_lora_targets_are_a_one_line_error(start, tmp_path, capsys):
    arguments = ["--model", start, "--data", write_rows(tmp_path / "rows.jsonl", rows()), "--lora_r", "4"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--lora_targets", "absent"]
    assert align.main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --lora_targets absent: ")


def test_damaged_and_pickled_adapters_are_refused(start, tmp_path):
    run = aligned(start, tmp_path, "run", "--lora_output", "adapter")
    weights = run / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:40])
    with pytest.raises(ValueError, match="expected an adapter that fits"):
        models.load(str(run))
    weights.rename(run / "adapter_model.bin")
    with pytest.raises(ValueError, match="expected its adapter in safetensors"):
        models.load(str(run))
    weights.write_bytes(content)
    record = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="expected a directory or a hub name, got neither"):
        models.load(str(run))


@pytest.mark.parametrize("lora", [0, 4])
def test_gradient_checkpointing_saves_memory_and_keeps_the_gradients_after_an_evaluation(start, lora):
    results, saved_sizes = {}, []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, _ = models.load(start)
        module = preference.PreferenceLoss(
            model_lora.apply(model, lora_settings(lora), "x"), loss="exo", beta_pi=0.5, beta_r=0.5,
            label_smoothing=0.0, temperature=1.0,
        ).train(False)  # fmt: skip
        _save_memory(module, Settings(OptimizerSettings(), "", gradient_checkpointing=checkpointed))
        collator = Collator(0, 8192)
        example = TokenizedExample((3, 4, 5) * 20, ((6, 7, 8), (9, 3)), (1.0, 0.0), 1, (-7.0, -4.0))
        preference.evaluate(module, [example], make_accelerator(device="cpu"), collator)
        saved_sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved_sizes.append(x.numel()) or x, lambda x: x):
            share = module(collator.collate([example]), 1)
        share.loss.backward()
        results[checkpointed] = sum(saved_sizes), [p.grad for p in module.parameters() if p.grad is not None]
    assert results[True][0] < 0.5 * results[False][0]
    assert all(torch.equal(a, b) for a, b in zip(results[True][1], results[False][1], strict=True))
