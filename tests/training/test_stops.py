"""What stops a run: signals, full disks, numbers that are not finite. None of them costs a step that was made."""

import io
import itertools
import os
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel

from exo import models
from exo.cli import signals
from exo.runs.jsonl import append
from exo.training import checkpoint_files, preference
from exo.training import step as training_step
from tests import interruptions
from tests.interruptions import STAGES, STEPS, made, sampled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return interruptions.given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def whole(given):
    return interruptions.undisturbed(given)


@pytest.mark.parametrize(
    ("stage", "number"),
    sampled(*itertools.product(STAGES, signals.SIGNALS), quick=lambda s, n: s == "align" or n == signal.SIGTERM),
)
def test_a_run_that_is_told_to_stop_loses_no_step(stage, number, given, whole, tmp_path, monkeypatch, capfd):
    argv = interruptions.arguments(stage, given, tmp_path / "run")
    accumulate = training_step.accumulate

    def told(module, parts, count, accelerator, collate, step, *rest):
        if step == 6:
            os.kill(os.getpid(), number)
        return accumulate(module, parts, count, accelerator, collate, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "accumulate", told)
        assert STAGES[stage].main(argv) == 128 + number
    said = capfd.readouterr().err.strip().splitlines()
    assert said[0].startswith("Stopping after this step") and said[-1].startswith(
        "stopped: after step 5 of 10, saved in"
    )
    assert STAGES[stage].main(argv) == 0
    assert "resuming after step 5" in capfd.readouterr().out
    assert made(tmp_path / "run") == whole(stage)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(given, whole, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("align", given, tmp_path / "run")
    evaluate = preference.evaluate

    def told(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preference, "evaluate", told)
        assert STAGES["align"].main(argv) == 143
    assert "after step 3 of 10" in capsys.readouterr().err
    assert STAGES["align"].main(argv) == 0
    assert made(tmp_path / "run") == whole("align")


def test_a_signal_in_a_save_does_not_cost_it(given, whole, tmp_path, monkeypatch, capsys):
    """It is finished, not begun again."""
    argv = interruptions.arguments("sft", given, tmp_path / "run")
    write, written = checkpoint_files._write_tensors, []

    def signalled(directory, tensors):
        write(directory, tensors)
        written.append(directory.parent.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "_write_tensors", signalled)
        assert STAGES["sft"].main(argv) == 143
    assert written == [".step-2.staging", ".step-4.staging"]
    assert STAGES["sft"].main(argv) == 0
    assert made(tmp_path / "run") == whole("sft")


def test_a_listener_that_is_gone_costs_nothing(given, whole, tmp_path):
    """Ctrl-C ends the reader of a pipe too."""
    argv = interruptions.arguments("sft", given, tmp_path / "run", "--logging_steps", "1")
    command = [sys.executable, "-m", "exo.sft", *argv, "--max_steps", "4000", "--save_steps", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in child.stdout:
        if b"step 20/" in line:
            break
    child.stdout.close()
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 130
    assert checkpoint_files.newest(tmp_path / "run" / "checkpoints") is not None


@pytest.mark.parametrize("stage", ["sft", "align"])
def test_a_disk_that_is_full_when_the_model_is_written_names_the_state(
    stage, given, whole, tmp_path, monkeypatch, capsys
):
    argv = interruptions.arguments(stage, given, tmp_path / "run")

    def full(self, directory, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert STAGES[stage].main(argv) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "No space left" in said and "the last checkpoint is" in said
    assert STAGES[stage].main(argv) == 0
    assert made(tmp_path / "run") == whole(stage)


def test_a_line_that_is_written_in_part_is_none(tmp_path):
    """As a full disk does it: a part is taken, and no error given."""

    class Half(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2])

    with Half(tmp_path / "log", "wb") as file:
        with pytest.raises(OSError, match="No space left"):
            append(file, "a line\n")
        assert (tmp_path / "log").read_bytes() == b""


def test_a_full_disk_names_the_last_whole_state_and_leaves_it(given, whole, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("sft", given, tmp_path / "run")
    fsync = os.fsync

    def full(handle):
        if "step-6" in (name := os.readlink(f"/proc/self/fd/{handle}")) and name.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert STAGES["sft"].main(argv) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: step 6: the checkpoint could not be written") and "No space left on device" in said
    assert "the last checkpoint is" in said and "step-4" in said
    assert STAGES["sft"].main(argv) == 0
    assert made(tmp_path / "run") == whole("sft")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_with_its_state(kind, given, whole, tmp_path, monkeypatch, capsys):
    """That of the step before it, from which the same command goes on, here to a loss that is finite."""
    argv = interruptions.arguments("align", given, tmp_path / "run", "--save_steps", "0")
    update = training_step.update

    def poisoned(module, optim, norm, accelerator, step, batch, *rest):
        if step == 6 and kind == "loss":
            raise training_step._not_finite(step, "the loss is nan", batch)
        if step == 6:
            next(p for p in module.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return update(module, optim, norm, accelerator, step, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "update", poisoned)
        assert STAGES["align"].main(argv) == 1
    said = capsys.readouterr().err
    assert "error: step 6" in said and "stopped before the update" in said
    assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-5'}" in said
    assert STAGES["align"].main(argv) == 0
    assert made(tmp_path / "run") == whole("align")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped_where_that_was_asked_for(kind, given, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("align", given, tmp_path / "run", "--on_nan", "skip")
    forward = preference.PreferenceLoss.forward
    calls = []

    def poisoned(self, batch, count):
        share = forward(self, batch, count)
        calls.append(1)
        if len(calls) != 4:
            return share
        if kind == "loss":
            return share._replace(loss=share.loss * float("nan"))
        return share._replace(loss=share.loss + (next(self.parameters()).sum() * 0).abs().sqrt())

    monkeypatch.setattr(preference.PreferenceLoss, "forward", poisoned)
    assert STAGES["align"].main(argv) == 0
    assert "1 updates were skipped: their loss or gradient was not finite" in capsys.readouterr().out
    log = [line for line in interruptions.lines(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in line]
    assert [line.get("skipped") for line in log].count(1.0) == 1 and len(log) == STEPS
    assert all(parameter.isfinite().all() for parameter in models.load(str(tmp_path / "run"))[0].parameters())


def test_nothing_is_left_to_listen_when_training_is_over(given, tmp_path):
    def own(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGINT, own)
    try:
        assert STAGES["sft"].main(interruptions.arguments("sft", given, tmp_path / "run", "--max_steps", "1")) == 0
        assert signal.getsignal(signal.SIGINT) is own and signals.stop_requested() == 0
    finally:
        signal.signal(signal.SIGINT, before)
