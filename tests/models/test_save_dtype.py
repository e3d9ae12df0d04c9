"""A run saves the dtype of its start model, or that of --save_dtype; training is in fp32."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from exo import models
from exo.cli.errors import RunError
from exo.models import saving
from exo.runs import directory as run_directory
from tests import interruptions
from tests.interruptions import STAGES

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return the inputs, with the same start model in fp32 (`start`) and in bf16 (`half`)."""
    directory = interruptions.write_inputs(tmp_path_factory.mktemp("inputs"))
    model, tokenizer = models.load(directory / "start")
    models.save(model.to(HALF), tokenizer, directory / "half")
    models.save(model.float(), tokenizer, directory / "start")
    return directory


def trained(stage, inputs, run, start, *options):
    argv = interruptions.arguments(stage, inputs, run, *options)
    argv[1] = str(inputs / start)
    assert STAGES[stage].main(argv) == 0
    return run


def dtypes(directory):
    return {tensor.dtype for file in directory.glob("*.safetensors") for tensor in load_file(file).values()}


@pytest.mark.parametrize("stage", ["align", *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES if s != "align")])
def test_a_run_from_16_bits_trains_in_fp32_and_saves_rounded_weights(stage, inputs, tmp_path):
    """Compare with a run from the same weights in fp32: its weights, rounded once, and its metrics."""
    more = ["--export_steps", "4"] * (stage in ("align", "ppo"))
    full = trained(stage, inputs, tmp_path / "full", "start", *more)
    half = trained(stage, inputs, tmp_path / "half", "half", *more)
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    places = ["."] + ["models/step-4"] * bool(more) + ["models/best"] * (stage == "align")
    for place in places:
        exact, rounded = (load_file(run / place / "model.safetensors") for run in (full, half))
        assert exact.keys() == rounded.keys()
        for name, tensor in exact.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor.to(HALF), rounded[name]), name
        assert json.loads((half / place / "config.json").read_text())["dtype"] == "bfloat16"
        assert json.loads((full / place / "config.json").read_text())["dtype"] == "float32"
        assert {p.dtype for p in kind.from_pretrained(half / place).parameters()} == {HALF}
        assert (half / place / "model.safetensors").stat().st_size < 0.6 * (
            full / place / "model.safetensors"
        ).stat().st_size
    logs = [interruptions.fingerprint(run)["metrics"] for run in (full, half)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("choice", "expected"), [("float32", torch.float32), ("float16", torch.float16)])
def test_save_dtype_selects_the_dtype(choice, expected, inputs, tmp_path):
    run = trained("sft", inputs, tmp_path / "run", "half", "--save_dtype", choice, "--max_steps", "2")
    assert dtypes(run) == {expected}
    assert json.loads((run / "config.json").read_text())["dtype"] == choice
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(run).parameters()} == {expected}


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_adapters_and_merged_models_keep_the_dtype(output, inputs, tmp_path):
    options = ["--lora_r", "2", "--lora_output", output, "--max_steps", "2", "--lora_targets", "c_attn"]
    run = trained("sft", inputs, tmp_path / "run", "half", *options)
    assert dtypes(run) == {HALF}
    assert saving.dtypes_of("auto", str(run)).most == HALF
    again = trained("sft", inputs, tmp_path / "again", run, "--max_steps", "2")
    assert dtypes(again) == {HALF}
    assert models.load(again)[0].dtype == torch.float32


def test_resume_checkpoints_stay_in_fp32(inputs, tmp_path, monkeypatch):
    checkpoint_dtypes = []
    clear = run_directory.remove_resume_files
    monkeypatch.setattr(
        run_directory,
        "remove_resume_files",
        lambda run: checkpoint_dtypes.append(dtypes(run / "checkpoints/step-10/tensors")),
    )
    trained("sft", inputs, tmp_path / "run", "half")
    monkeypatch.undo()
    clear(tmp_path / "run")
    assert HALF not in checkpoint_dtypes[0] and torch.float32 in checkpoint_dtypes[0]


def test_mixed_dtypes_are_kept_per_tensor(inputs, tmp_path):
    shutil.copytree(inputs / "half", tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed/model.safetensors")
    norms = [name for name in tensors if "ln_" in name]
    save_file(tensors | {n: tensors[n].float() for n in norms}, tmp_path / "mixed/model.safetensors", {"format": "pt"})
    model, tokenizer = models.load(tmp_path / "mixed")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.save(model, tokenizer, tmp_path / "saved", models.dtypes_of("auto", str(tmp_path / "mixed")))
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert {name: tensor.dtype for name, tensor in saved.items()} == {
        name: torch.float32 if name in norms else HALF for name in tensors
    }
    assert json.loads((tmp_path / "saved/config.json").read_text())["dtype"] == "bfloat16"
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.dtype == torch.float32


def test_a_weight_that_the_dtype_cannot_hold_is_an_error(inputs, tmp_path):
    model, tokenizer = models.load(inputs / "start")
    model.transformer.wte.weight.data[0, 0] = 70_000.0
    with pytest.raises(RunError, match="wte.weight is not finite in float16"):
        models.save(model, tokenizer, tmp_path / "x", models.Dtypes(torch.float16))
    assert model.dtype == torch.float32
    models.save(model, tokenizer, tmp_path / "y", models.Dtypes(HALF))
