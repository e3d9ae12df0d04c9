"""LoRA: the reference is the model without it, what is left the model with it, and an earlier adapter is not lost."""

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
    made = []
    for i, prompt in enumerate(PROMPTS * 4):
        texts = [f" {WORDS[i % 5]} good", " good good small", f" bad {WORDS[(i + 2) % 5]}", " big"]
        made.append(
            {"prompt": f"{prompt} {WORDS[i % 7]}", "completions": texts, "rewards": [reward("", t) for t in texts]}
        )
    return made


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


def test_the_reference_is_the_model_below_the_adapter(start, tmp_path):
    """Live, it is the adapter switched off; kept, it was made before there was one. The runs are the same."""
    kept, live = (aligned(start, tmp_path, mode, "--reference", mode) for mode in ("cache", "live"))
    for a, b in zip(lines(kept / "metrics.jsonl"), lines(live / "metrics.jsonl"), strict=True):
        for name in ("loss", "log_ratios/mean_square", "eval_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-4), name
    assert lines(live / "metrics.jsonl")[5]["log_ratios/mean_square"] > 0.01, "the policy has moved"


def test_switched_off_it_is_the_model_that_was_to_the_last_bit(start):
    model, _ = models.load(start)
    before = logits(model)
    adapted = model_lora.apply(model, lora_settings(4), start)
    assert torch.equal(logits(adapted), before), "it begins as nothing"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert not torch.equal(logits(adapted), before)
    with model_lora.disabled(adapted):
        assert torch.equal(logits(adapted), before)
    assert {"lora_" in name for name, p in adapted.named_parameters() if p.requires_grad} == {True}


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_what_a_run_leaves_is_the_model_that_was_trained(start, tmp_path, output):
    """The metrics' held-out loss is that of what is loaded again."""
    run = aligned(start, tmp_path, output, "--lora_output", output, "--export_steps", "3")
    assert models.is_adapter(str(run)) == models.is_adapter(str(run / "models/step-3")) == (output == "adapter")
    again, tokenizer = models.load(str(run))
    first = models.load(start)[0]
    assert (logits(again) - logits(first)).abs().max() > 0.01
    if output == "merged":
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(run)), logits(again))
        other = aligned(start, tmp_path, "other", "--lora_output", "adapter")
        assert torch.allclose(logits(models.load(str(other))[0]), logits(again), atol=1e-5)


def test_a_policy_that_comes_with_an_adapter_begins_and_is_referred_to_with_it(start, tmp_path, capsys):
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


def test_a_frozen_head_takes_the_schedule_for_it(start, tmp_path, monkeypatch):
    taken = []
    choose = plan.choose

    def spying(asked, needs, *rest):
        found = choose(asked, needs, *rest)
        taken.append((found[0], needs.hidden))
        return found

    monkeypatch.setattr(plan, "choose", spying)
    aligned(start, tmp_path, "run")
    assert {schedule for schedule, trained in taken if trained} == {"deferred"}


@pytest.fixture(scope="module", params=[64, 24])
def start_of_size(request, tmp_path_factory):
    """Layers of whole blocks of 64 weights, as real ones are; and layers that blocks do not fit."""
    model, tokenizer = models.word_level(WORDS, hidden_size=request.param)
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    directory = tmp_path_factory.mktemp("start") / "model"
    models.save(model, tokenizer, directory)
    return str(directory)


def test_weights_in_four_bits_compute_alike_on_every_cpu(start_of_size):
    """As the same numbers in fp32 do, with gradients and without, before a pass without them and after."""
    pytest.importorskip("bitsandbytes")
    model = models.load(start_of_size, four_bits=torch.float32)[0]
    expected = logits(models.dequantize(copy.deepcopy(model)))
    assert (logits(model) - expected).abs().max() < 1e-5
    ids = torch.tensor([[3, 5, 7, 4, 8]])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = model(inputs_embeds=embedded).logits
    assert (found - expected).abs().max() < 1e-5
    found.sum().backward()
    assert embedded.grad.abs().max() > 0


def test_weights_in_four_bits_are_the_reference_too_and_what_is_left_computes_what_was_trained(
    start_of_size, tmp_path, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    start = start_of_size
    trained = []
    finish = model_lora.merged
    monkeypatch.setattr(
        model_lora, "merged", lambda model, *rest: trained.append(logits(model)) or finish(model, *rest)
    )
    run = aligned(start, tmp_path, "run", "--load_in_4bit", "--learning_rate", "3e-2")
    first, *_, last = (line for line in lines(run / "metrics.jsonl") if "loss" in line)
    assert first["log_ratios/mean_square"] < 1e-6, "the reference has the policy's own weights, 4 bits of them"
    assert last["log_ratios/mean_square"] > 0.01, "the policy has moved"
    again = models.load(str(run))[0]
    assert (logits(again) - trained[0]).abs().max() < 1e-4
    assert "quantization_config" not in again.config.to_dict()
    whole, rounded = models.load(start)[0], models.load(start, four_bits=torch.float32)[0]
    assert (logits(rounded) - logits(whole)).abs().max() > 0.01, "so merging with the weights in full would show"
    assert models.parameter_count(rounded) == models.parameter_count(whole)
    alone = aligned(start, tmp_path, "alone", "--load_in_4bit", "--lora_output", "adapter")
    assert models.is_adapter(str(alone))


def test_a_live_reference_below_an_adapter_drops_nothing_out(tmp_path):
    interruptions.write_start(tmp_path / "model")
    interruptions.write_data(tmp_path)
    found = []
    for mode in ("live", "cache"):
        argv = interruptions.arguments("align", tmp_path, tmp_path / mode, "--reference", mode, "--lora_r", "4")
        assert align.main(argv[:1] + [str(tmp_path / "model")] + argv[2:]) == 0
        found.append([line for line in lines(tmp_path / mode / "metrics.jsonl") if "loss" in line])
    for mine, theirs in zip(*found, strict=True):  # the policy drops out alike: its draws are not the reference's
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_an_adapter_that_fits_in_part_is_refused(start, tmp_path):
    run = aligned(start, tmp_path, "run", "--lora_output", "adapter")
    weights = load_file(run / "adapter_model.safetensors")
    for odd in (
        {name.replace("model.layers", "transformer.h"): w for name, w in weights.items()},
        {name: w for name, w in weights.items() if ".layers.1." not in name},
    ):
        save_file(odd, run / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="weights that are missing on one side"):
            models.load(str(run))


def test_the_start_of_an_adapter_is_found_from_elsewhere(start, tmp_path, monkeypatch):
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
    ("options", "said"),
    [
        (["--lora_output", "adapter"], "--lora_output: expected --lora_r too"),
        (["--load_in_4bit"], "--load_in_4bit: expected --lora_r too"),
        (
            ["--load_in_4bit", "--lora_r", "4", "--model", "tiny"],
            "--load_in_4bit: expected a --model with weights of its own",
        ),
    ],
)
def test_four_bits_without_what_they_need_are_one_line(start, tmp_path, capsys, options, said):
    arguments = ["--model", start, "--data", write_rows(tmp_path / "rows.jsonl", rows())]
    with pytest.raises(SystemExit) if "tiny" not in options else nullcontext():
        assert align.main([*arguments, "--output_dir", str(tmp_path / "run"), *options]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_names_of_layers_that_are_not_there_are_one_line(start, tmp_path, capsys):
    arguments = ["--model", start, "--data", write_rows(tmp_path / "rows.jsonl", rows()), "--lora_r", "4"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--lora_targets", "absent"]
    assert align.main(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: --lora_targets absent: ")


def test_a_damaged_adapter_and_one_of_pickles_are_one_line(start, tmp_path):
    run = aligned(start, tmp_path, "run", "--lora_output", "adapter")
    weights = run / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="expected an adapter that fits"):
        models.load(str(run))
    weights.rename(run / "adapter_model.bin")
    with pytest.raises(ValueError, match="expected its adapter in safetensors"):
        models.load(str(run))
    weights.write_bytes(whole)
    record = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="expected a directory or a hub name, got neither"):
        models.load(str(run))


@pytest.mark.parametrize("lora", [0, 4])
def test_checkpointing_changes_no_gradient_keeps_less_and_outlives_an_evaluation(start, lora):
    found, kept = {}, []
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
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            share = module(collator.collate([example]), 1)
        share.loss.backward()
        found[checkpointed] = sum(kept), [p.grad for p in module.parameters() if p.grad is not None]
    assert found[True][0] < 0.5 * found[False][0]
    assert all(torch.equal(a, b) for a, b in zip(found[True][1], found[False][1], strict=True))
