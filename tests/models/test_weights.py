"""Non-finite weights are never written, and training that changes no weight is an error."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from exo.cli.errors import RunError
from exo.models import weights
from exo.training import step as training_step
from tests import interruptions
from tests.interruptions import STAGES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return interruptions.write_inputs(tmp_path_factory.mktemp("inputs"))


def run_stage(stage, inputs, run, capsys, *options):
    """Run a stage; return its exit code and a list of the last line on stderr."""
    code = STAGES[stage].main(interruptions.arguments(stage, inputs, run, *options))
    return code, capsys.readouterr().err.splitlines()[-1:]


def written(run):
    return sorted(str(file.relative_to(run)) for file in Path(run).rglob("*.safetensors"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_changes_no_weight_fails(stage, inputs, tmp_path, capsys):
    """Check this for a learning rate that is 0 in fp32, also when the same command resumes from a checkpoint."""
    for _ in range(2):
        code, (line,) = run_stage(stage, inputs, tmp_path / "run", capsys, "--learning_rate", "1e-60")
        assert code == 1 and "no weight has changed after 10 steps" in line
    assert not [file for file in written(tmp_path / "run") if "/" not in file], "no final model"


@pytest.mark.parametrize(("stage", "options"), [
    ("sft", []),
    ("align", ["--on_nan", "skip", "--eval_fraction", "0", "--eval_steps", "0"]),
    ("reward", ["--max_steps", "1"]),
    ("ppo", ["--critic_warmup_steps", "0", "--max_steps", "1"]),
])  # fmt: skip
def test_weights_that_are_not_finite_are_never_written(stage, options, inputs, tmp_path, capsys):
    options = ["--learning_rate", "1e300", "--save_steps", "1", "--export_steps", "1", *options]
    if stage in ("sft", "reward"):
        options = [option for option in options if option not in ("--export_steps",)]
        options.remove("1")
    code, (line,) = run_stage(stage, inputs, tmp_path / "run", capsys, *options)
    assert code == 1 and "the weights are not finite (model." in line
    assert written(tmp_path / "run") == []
    code, _ = run_stage(stage, inputs, tmp_path / "run", capsys, *options[2:], "--allow_changes")
    assert code == 0, "the same command with another learning rate must start over"


def test_a_poisoned_last_step_keeps_the_checkpoint_before_it(inputs, tmp_path, capsys, monkeypatch):
    original = training_step.update

    def poisoning(module, optim, config, accelerator, step, *rest):
        norm = original(module, optim, config, accelerator, step, *rest)
        if step == 5 and poisoned:
            next(module.parameters()).data.view(-1)[3] = float("inf")
        return norm

    monkeypatch.setattr(training_step, "update", poisoning)
    poisoned = True
    code, (line,) = run_stage("sft", inputs, tmp_path / "run", capsys, "--save_steps", "2")
    assert code == 1 and "step-4" in line
    poisoned = False
    code, _ = run_stage("sft", inputs, tmp_path / "run", capsys, "--save_steps", "2")
    assert code == 0


def test_the_first_tensor_that_is_not_finite_is_named():
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            odd = torch.ones(3, 5, dtype=dtype)
            odd[1, 2] = bad
            assert weights.not_finite([("a", torch.ones(2)), ("empty", torch.ones(0)), ("b", odd)]) == "b"
    huge = torch.full((4,), 3e38)
    assert weights.not_finite([("a", huge), ("i", torch.ones(2, dtype=torch.int64))]) == ""


def test_a_model_that_is_frozen_is_refused_before_the_first_step():
    module = torch.nn.Module()
    module.model = torch.nn.Linear(2, 2).requires_grad_(False)
    module.critic = torch.nn.Linear(2, 2)  # is not saved
    with pytest.raises(RunError, match="nothing to train: every weight of Linear is frozen"):
        weights.Movement(module, Accelerator(cpu=True))


def test_one_bit_of_one_weight_is_a_change():
    """Check this for a matrix of zeros beside another, as in LoRA, in every dtype that is trained."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module = torch.nn.ParameterList([torch.randn(8, 4, dtype=dtype), torch.zeros(4, 8, dtype=dtype)])
        movement, counters = weights.Movement(module, Accelerator(cpu=True)), {"not_finite": 0.0}
        movement.begin()
        movement.update(counters)
        with pytest.raises(RunError, match="no weight has changed after 3 steps"):
            weights.check_moved(counters, 3)
        with torch.no_grad():
            module[1][2, 3] = torch.finfo(dtype).tiny
        movement.update(counters)
        weights.check_moved(counters, 3)
