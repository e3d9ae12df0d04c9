"""DeepSpeed's ZeRO: the same steps as one process, the same end after a kill, and what it is not for.

In fp32, because DeepSpeed knows no doubles: with AdamW's epsilon as it is, rounding shows in the sixth digit. Skipped
where DeepSpeed is not installed, but for the line that says so.
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
from tests.interruptions import STAGES, lines, made
from tests.training.test_parallel import ENVIRONMENT, EVEN, FEW, UNEVEN, killed, run

installed = importlib.util.find_spec("deepspeed") is not None
needs_it = pytest.mark.skipif(not installed, reason="needs DeepSpeed")
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in (ENVIRONMENT | {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return interruptions.given(tmp_path_factory.mktemp("given"))


SPLITS = [
    pytest.param(how, sizes, tokens, marks=() if (how, sizes, tokens) == ("zero2", UNEVEN, 70) else slow)
    for how, sizes, tokens in product(("zero1", "zero2"), (EVEN, UNEVEN, FEW), (70, 4096))
]


@needs_it
@pytest.mark.parametrize(("how", "sizes", "tokens"), SPLITS)
def test_eight_steps_of_two_processes_are_those_of_one(how, sizes, tokens, tmp_path):
    """In micro-batches of which one process has more, and where one has no group at all."""
    found = []
    for name, processes, kind, most in (("one", 1, "ddp", 4096), ("two", 2, how, tokens)):
        arguments = [f"{kind}-fp32", str(tmp_path / name), json.dumps(sizes), str(most)]
        assert run_ranks("tests.parallel_worker", arguments, processes) == 0
        found.append(load_file(tmp_path / name))
    one, two = found
    assert one.keys() == two.keys()
    assert float((one.pop("losses") - two.pop("losses")).abs().max()) < 1e-6
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 4e-6


@needs_it
@slow
@pytest.mark.parametrize(
    ("stage", "zero", "more"),
    [("sft", 1, ["--gradient_checkpointing"]), ("reward", 2, []), ("align", 1, ["--reference", "live"]),
     ("align", 2, ["--lora_r", "4"]), ("align", 2, ["--dtype", "bfloat16"]), ("ppo", 1, []), ("ppo", 2, [])],
)  # fmt: skip
def test_a_stage_makes_what_ddp_makes(stage, zero, more, given, tmp_path, monkeypatch):
    """To the order of sums; in bfloat16 that is now and then another number of three digits, and another gradient."""
    monkeypatch.setenv(STAGE, str(zero))
    for name, asked in (("ddp", "false"), ("zero", "true")):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", asked)
        code, said = run(stage, given, tmp_path / name, *more)
        assert code == 0, said
    ddp, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("ddp", "zero"))
    assert ddp.keys() == parts.keys()
    most = 1e-3 if "bfloat16" in more else 2e-5
    assert max(float((ddp[name] - parts[name]).abs().max()) for name in ddp) < most
    for mine, theirs in zip(*(lines(tmp_path / name / "metrics.jsonl") for name in ("ddp", "zero")), strict=True):
        assert mine.keys() == theirs.keys()
        for name in {"loss", "grad_norm", "learning_rate", "clipped", "eval_loss"} & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@needs_it
@slow
def test_the_preset_asks_for_it(given, tmp_path, monkeypatch):
    """Through accelerate's own launcher; seen by what a state says of itself."""
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    argv = interruptions.arguments("sft", given, tmp_path / "run", "--max_steps", "4000", "--save_steps", "0")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "exo/presets/zero2.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "-m", "exo.sft", *argv]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    log = tmp_path / "run" / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size > 2000):
        time.sleep(0.05)
    child.terminate()  # the launcher passes it on, and the run keeps its state
    child.wait(60)
    (state,) = tmp_path.glob("run/checkpoints/step-*/state.json")
    facts = json.loads(state.read_text())
    assert facts["processes"] == 2 and facts["zero"] == 2


@needs_it
@slow
@pytest.mark.parametrize("zero", (1, 2))
def test_two_processes_that_are_killed_go_on_to_the_same_end(zero, given, tmp_path, monkeypatch):
    monkeypatch.setenv(STAGE, str(zero))
    assert run("align", given, tmp_path / "whole")[0] == 0
    server = Server()  # now that the environment is as it is to be
    killed(server, given, tmp_path / "run", "--fsdp=false")
    server.close()
    assert not [f for f in (tmp_path / "run" / "checkpoints").rglob("*.*") if f.suffix not in (".safetensors", ".json")]
    code, said = run("align", given, tmp_path / "run", "--fsdp=false")
    assert code == 0, said
    assert "resuming after step" in said
    assert made(tmp_path / "run") == made(tmp_path / "whole")


@needs_it
@slow
def test_a_state_goes_on_in_other_processes_but_with_deepspeed_alone(given, tmp_path, monkeypatch):
    assert run("align", given, tmp_path / "whole")[0] == 0
    server = Server()  # now that the environment is as it is to be
    killed(server, given, tmp_path / "run", "--fsdp=false")
    server.close()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    code, said = run("align", given, tmp_path / "run", "--allow_changes")
    assert code == 1 and "resume with DeepSpeed" in said and "Traceback" not in said
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, said = run("align", given, tmp_path / "run", processes=3)
    assert code == 1 and "by a run with 2 processes, with ZeRO 2; this one has 3" in said
    code, said = run("align", given, tmp_path / "run", "--allow_changes", processes=3)
    assert code == 0 and "resuming after step" in said, said
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-5


@needs_it
@slow
@pytest.mark.parametrize(("what", "said"), [("loss", "the loss is nan"), ("gradient", "the gradient of all processes")])
def test_what_is_not_finite_stops_before_the_update_or_skips_it(what, said, given, tmp_path, monkeypatch, capfd):
    """On one process alone, at one step: both stop, or both skip that update and go on."""
    program = (
        "import os, sys, torch\nfrom exo import align\n"
        "from exo.training import preference\nforward, calls = preference.PreferenceLoss.forward, []\n"
        "def bad(self, batch, n):\n    share = forward(self, batch, n)\n    calls.extend([1] * bool(n))\n"
        "    if len(calls) == 5 and os.environ['RANK'] == '1' and n:\n"
        f"        if {what == 'loss'}: return share._replace(loss=share.loss * float('nan'))\n"
        "        share.loss.register_hook(lambda g: g * float('inf'))\n    return share\n"
        "preference.PreferenceLoss.forward = bad\nsys.exit(align.main(sys.argv[1:]))\n"
    )
    (tmp_path / "poisoned.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:.")
    for on_nan, code in (("stop", 1), ("skip", 0)):
        argv = interruptions.arguments("align", given, tmp_path / on_nan, f"--on_nan={on_nan}")
        argv.remove("--dropout")
        assert run_ranks("poisoned", argv, 2) == code
        error = capfd.readouterr().err
        assert (said in error and "stopped before the update" in error) == (on_nan == "stop"), error
    log = [line for line in lines(tmp_path / "skip" / "metrics.jsonl") if "loss" in line or "skipped" in line]
    assert [line.get("skipped") for line in log].count(1.0) == 1
    assert "grad_norm" in log[-1]  # which is finite again


def refused(stage, given, out, capsys, *more):
    assert STAGES[stage].main(interruptions.arguments(stage, given, out, *more)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not out.exists()
    return said


@needs_it
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (STAGE, "0", "expected ZeRO stage 1 or 2; got 0, which is DDP"),
        (STAGE, "3", "expected ZeRO stage 1 or 2; got 3, which is what --fsdp does"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer is not for this version"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps: expected auto"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "(--max_grad_norm is 1); got 0.5"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json", "Expected a string path"),
    ],
)
def test_what_accelerate_may_not_say_is_refused(variable, value, said, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    assert said in refused("align", given, tmp_path / "run", capsys)


@needs_it
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": {"type": "Adam"}}, "its setting optimizer is not for"),
        ({"bf16": {"enabled": True}}, "its setting bf16: expected auto"),
        ({"train_batch_size": 8}, "its setting train_batch_size: expected auto"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients is not for"),
    ],
)
def test_what_a_file_of_settings_may_not_say_is_refused(settings, said, given, tmp_path, monkeypatch, capsys):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | settings))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert said in refused("align", given, tmp_path / "run", capsys)


@needs_it
@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ("sft", "--dtype=float16", "expected --dtype bfloat16 or float32"),
        ("align", "--compile", "does not go together with --compile"),
        ("reward", "--fsdp", "does not go together with --fsdp"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(stage, more, said, given, tmp_path, capsys):
    assert said in refused(stage, given, tmp_path / "run", capsys, more)


def test_where_it_is_not_installed_one_line_says_so(given, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "deepspeed" else found(name, *more)
    )
    assert "pip install 'exo-kernels[deepspeed]'" in refused("align", given, tmp_path / "run", capsys)
