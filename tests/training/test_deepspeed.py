"""DeepSpeed ZeRO: the same steps as one process, the same bits after a kill, and refused settings.

The comparisons are in fp32, because DeepSpeed has no fp64; with the default epsilon of AdamW, rounding errors appear in
the sixth digit. All tests but the one for a missing DeepSpeed are skipped if it is not installed.
"""

import importlib.util
import json
import subprocess
import sys
import time
from itertools import product

import pytest
from safetensors.torch import load_file

from exo.cli.main import run_ranks
from tests import interruptions
from tests.fork_server import Server
from tests.interruptions import STAGES, fingerprint, lines
from tests.training.test_parallel import ENVIRONMENT, EVEN, FEW, UNEVEN, kill_midway, run_launched

installed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not installed, reason="needs DeepSpeed")
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in (ENVIRONMENT | {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return interruptions.write_inputs(tmp_path_factory.mktemp("inputs"))


SPLITS = [
    pytest.param(strategy, sizes, tokens, marks=() if (strategy, sizes, tokens) == ("zero2", UNEVEN, 70) else slow)
    for strategy, sizes, tokens in product(("zero1", "zero2"), (EVEN, UNEVEN, FEW), (70, 4096))
]


@needs_deepspeed
@pytest.mark.parametrize(("strategy", "sizes", "tokens"), SPLITS)
def test_eight_steps_on_two_processes_equal_those_on_one(strategy, sizes, tokens, tmp_path):
    """Check this if one rank has more micro-batches than the other, and if one has no group."""
    weights = []
    for name, processes, kind, max_tokens in (("one", 1, "ddp", 4096), ("two", 2, strategy, tokens)):
        arguments = [f"{kind}-fp32", str(tmp_path / name), json.dumps(sizes), str(max_tokens)]
        assert run_ranks("tests.parallel_worker", arguments, processes) == 0
        weights.append(load_file(tmp_path / name))
    one, two = weights
    assert one.keys() == two.keys()
    assert float((one.pop("losses") - two.pop("losses")).abs().max()) < 1e-6
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 4e-6


@needs_deepspeed
@slow
@pytest.mark.parametrize(
    ("stage", "zero", "more"),
    [("sft", 1, ["--gradient_checkpointing"]), ("reward", 2, []), ("align", 1, ["--reference", "live"]),
     ("align", 2, ["--lora_r", "4"]), ("align", 2, ["--dtype", "bfloat16"]), ("ppo", 1, []), ("ppo", 2, [])],
)  # fmt: skip
def test_zero_gives_the_same_weights_as_ddp(stage, zero, more, inputs, tmp_path, monkeypatch):
    """Check this up to the order of sums. In bfloat16 the order sometimes changes the third digit."""
    monkeypatch.setenv(STAGE, str(zero))
    for name, use_deepspeed in (("ddp", "false"), ("zero", "true")):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", use_deepspeed)
        code, output = run_launched(stage, inputs, tmp_path / name, *more)
        assert code == 0, output
    ddp_weights, zero_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("ddp", "zero"))
    assert ddp_weights.keys() == zero_weights.keys()
    tolerance = 1e-3 if "bfloat16" in more else 2e-5
    assert max(float((ddp_weights[name] - zero_weights[name]).abs().max()) for name in ddp_weights) < tolerance
    for ddp_line, zero_line in zip(
        *(lines(tmp_path / name / "metrics.jsonl") for name in ("ddp", "zero")), strict=True
    ):
        assert ddp_line.keys() == zero_line.keys()
        for name in {"loss", "grad_norm", "learning_rate", "clipped", "eval_loss"} & ddp_line.keys():
            assert ddp_line[name] == pytest.approx(zero_line[name], rel=1e-4, abs=1e-6), name


@needs_deepspeed
@slow
def test_the_preset_enables_deepspeed(inputs, tmp_path, monkeypatch):
    """Check that accelerate's launcher enables ZeRO, as recorded in the checkpoint."""
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    argv = interruptions.arguments("sft", inputs, tmp_path / "run", "--max_steps", "4000", "--save_steps", "0")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "exo/presets/zero2.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "exo.sft", *argv]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    log = tmp_path / "run" / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size > 2000):
        time.sleep(0.05)
    child.terminate()  # the launcher forwards the signal and the run saves a checkpoint
    child.wait(60)
    (state_file,) = tmp_path.glob("run/checkpoints/step-*/state.json")
    facts = json.loads(state_file.read_text())
    assert facts["processes"] == 2 and facts["zero"] == 2


@needs_deepspeed
@slow
@pytest.mark.parametrize("zero", (1, 2))
def test_two_killed_processes_resume_to_the_same_bits(zero, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv(STAGE, str(zero))
    assert run_launched("align", inputs, tmp_path / "undisturbed")[0] == 0
    server = Server()  # only now, because it inherits the environment
    kill_midway(server, inputs, tmp_path / "run", "--fsdp=false")
    server.close()
    assert not [f for f in (tmp_path / "run" / "checkpoints").rglob("*.*") if f.suffix not in (".safetensors", ".json")]
    code, output = run_launched("align", inputs, tmp_path / "run", "--fsdp=false")
    assert code == 0, output
    assert "resuming after step" in output
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "undisturbed")


@needs_deepspeed
@slow
def test_a_checkpoint_resumes_on_another_number_of_processes_but_only_with_deepspeed(inputs, tmp_path, monkeypatch):
    assert run_launched("align", inputs, tmp_path / "undisturbed")[0] == 0
    server = Server()  # only now, because it inherits the environment
    kill_midway(server, inputs, tmp_path / "run", "--fsdp=false")
    server.close()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    code, output = run_launched("align", inputs, tmp_path / "run", "--allow_changes")
    assert code == 1 and "resume with DeepSpeed" in output and "Traceback" not in output
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, output = run_launched("align", inputs, tmp_path / "run", processes=3)
    assert code == 1 and "by a run with 2 processes, with ZeRO 2; this one has 3" in output
    code, output = run_launched("align", inputs, tmp_path / "run", "--allow_changes", processes=3)
    assert code == 0 and "resuming after step" in output, output
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "run"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-5


@needs_deepspeed
@slow
@pytest.mark.parametrize(
    ("kind", "message"), [("loss", "the loss is nan"), ("gradient", "the gradient of all processes")]
)
def test_a_nonfinite_value_on_one_rank_stops_all_ranks_or_skips_the_update(
    kind, message, inputs, tmp_path, monkeypatch, capfd
):
    """Check that a NaN on one rank at one step makes both ranks stop, or both skip that update."""
    program = (
        "import os, sys, torch\nfrom exo import align\n"
        "from exo.training import preference\nforward, calls = preference.PreferenceLoss.forward, []\n"
        "def bad(self, batch, n):\n    share = forward(self, batch, n)\n    calls.extend([1] * bool(n))\n"
        "    if len(calls) == 5 and os.environ['RANK'] == '1' and n:\n"
        f"        if {kind == 'loss'}: return share._replace(loss=share.loss * float('nan'))\n"
        "        share.loss.register_hook(lambda g: g * float('inf'))\n    return share\n"
        "preference.PreferenceLoss.forward = bad\nsys.exit(align.main(sys.argv[1:]))\n"
    )
    (tmp_path / "poisoned.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:.")
    for on_nan, code in (("stop", 1), ("skip", 0)):
        argv = interruptions.arguments("align", inputs, tmp_path / on_nan, f"--on_nan={on_nan}")
        argv.remove("--dropout")
        assert run_ranks("poisoned", argv, 2) == code
        error = capfd.readouterr().err
        assert (message in error and "stopped before the update" in error) == (on_nan == "stop"), error
    log = [line for line in lines(tmp_path / "skip" / "metrics.jsonl") if "loss" in line or "skipped" in line]
    assert [line.get("skipped") for line in log].count(1.0) == 1
    assert "grad_norm" in log[-1]  # the gradient is finite again


def refusal(stage, inputs, out, capsys, *more):
    assert STAGES[stage].main(interruptions.arguments(stage, inputs, out, *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not out.exists()
    return error


@needs_deepspeed
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (STAGE, "0", "expected ZeRO stage 1 or 2; got 0, which is DDP"),
        (STAGE, "3", "expected ZeRO stage 1 or 2; got 3, which is what --fsdp does"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer is not for this version"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps: expected auto"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "(--max_grad_norm is 1); got 0.5"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json", "Expected a string path"),
    ],
)
def test_unsupported_accelerate_settings_are_refused(variable, value, message, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    assert message in refusal("align", inputs, tmp_path / "run", capsys)


@needs_deepspeed
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "its setting optimizer is not for"),
        ({"bf16": {"enabled": True}}, "its setting bf16: expected auto"),
        ({"train_batch_size": 8}, "its setting train_batch_size: expected auto"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients is not for"),
    ],
)
def test_unsupported_settings_in_a_config_file_are_refused(settings, message, inputs, tmp_path, monkeypatch, capsys):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | settings))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert message in refusal("align", inputs, tmp_path / "run", capsys)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("sft", "--dtype=float16", "expected --dtype bfloat16 or float32"),
        ("align", "--compile", "does not go together with --compile"),
        ("reward", "--fsdp", "does not go together with --fsdp"),
    ],
)
def test_options_incompatible_with_deepspeed_are_refused(stage, option, message, inputs, tmp_path, capsys):
    assert message in refusal(stage, inputs, tmp_path / "run", capsys, option)


def test_missing_deepspeed_is_a_one_line_error(inputs, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "deepspeed" else find_spec(name, *more)
    )
    assert "pip install 'exo-kernels[deepspeed]'" in refusal("align", inputs, tmp_path / "run", capsys)
