"""Signals, full disks and non-finite values stop a run without losing a completed step."""

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
from tests.interruptions import STAGES, STEPS, fingerprint, mark_slow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return interruptions.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs):
    return interruptions.undisturbed_runs(inputs)


@pytest.mark.parametrize(
    ("stage", "number"),
    mark_slow(*itertools.product(STAGES, signals.SIGNALS), quick=lambda s, n: s == "align" or n == signal.SIGTERM),
)
def test_a_stop_signal_loses_no_step(stage, number, inputs, undisturbed, tmp_path, monkeypatch, capfd):
    argv = interruptions.arguments(stage, inputs, tmp_path / "run")
    accumulate = training_step.accumulate

    def stop_at_step_6(module, parts, count, accelerator, collate, step, *rest):
        if step == 6:
            os.kill(os.getpid(), number)
        return accumulate(module, parts, count, accelerator, collate, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "accumulate", stop_at_step_6)
        assert STAGES[stage].main(argv) == 128 + number
    messages = capfd.readouterr().err.strip().splitlines()
    assert messages[0].startswith("Stopping after this step") and messages[-1].startswith(
        "stopped: after step 5 of 10, saved in"
    )
    assert STAGES[stage].main(argv) == 0
    assert "resuming after step 5" in capfd.readouterr().out
    assert fingerprint(tmp_path / "run") == undisturbed(stage)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(inputs, undisturbed, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("align", inputs, tmp_path / "run")
    evaluate = preference.evaluate

    def stop_in_evaluation(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preference, "evaluate", stop_in_evaluation)
        assert STAGES["align"].main(argv) == 143
    assert "after step 3 of 10" in capsys.readouterr().err
    assert STAGES["align"].main(argv) == 0
    assert fingerprint(tmp_path / "run") == undisturbed("align")


def test_a_signal_during_a_save_lets_the_save_finish(inputs, undisturbed, tmp_path, monkeypatch, capsys):
    """Check that each checkpoint is written once."""
    argv = interruptions.arguments("sft", inputs, tmp_path / "run")
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
    assert fingerprint(tmp_path / "run") == undisturbed("sft")


def test_a_closed_stdout_does_not_prevent_a_checkpoint(inputs, undisturbed, tmp_path):
    """Check this for Ctrl-C, which also ends the reader of a pipe."""
    argv = interruptions.arguments("sft", inputs, tmp_path / "run", "--logging_steps", "1")
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
def test_a_full_disk_at_the_final_save_names_the_last_checkpoint(
    stage, inputs, undisturbed, tmp_path, monkeypatch, capsys
):
    argv = interruptions.arguments(stage, inputs, tmp_path / "run")

    def full(self, directory, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        assert STAGES[stage].main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "No space left" in error and "the last checkpoint is" in error
    assert STAGES[stage].main(argv) == 0
    assert fingerprint(tmp_path / "run") == undisturbed(stage)


def test_a_partially_written_line_is_removed(tmp_path):
    """Check this for a full disk, where `write` accepts a part of the line without an error."""

    class Half(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2])

    with Half(tmp_path / "log", "wb") as file:
        with pytest.raises(OSError, match="No space left"):
            append(file, "a line\n")
        assert (tmp_path / "log").read_bytes() == b""


def test_a_full_disk_at_a_checkpoint_names_and_keeps_the_last_one(inputs, undisturbed, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("sft", inputs, tmp_path / "run")
    fsync = os.fsync

    def full(handle):
        if "step-6" in (name := os.readlink(f"/proc/self/fd/{handle}")) and name.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert STAGES["sft"].main(argv) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: step 6: the checkpoint could not be written") and "No space left on device" in error
    assert "the last checkpoint is" in error and "step-4" in error
    assert STAGES["sft"].main(argv) == 0
    assert fingerprint(tmp_path / "run") == undisturbed("sft")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_nonfinite_loss_or_gradient_stops_the_run_with_a_checkpoint(
    kind, inputs, undisturbed, tmp_path, monkeypatch, capsys
):
    """Check that the checkpoint is of the previous step and that the same command resumes from it."""
    argv = interruptions.arguments("align", inputs, tmp_path / "run", "--save_steps", "0")
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
    error = capsys.readouterr().err
    assert "error: step 6" in error and "stopped before the update" in error
    assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-5'}" in error
    assert STAGES["align"].main(argv) == 0
    assert fingerprint(tmp_path / "run") == undisturbed("align")


@pytest.mark.parametrize("kind", ["loss", "gradient", "infinite"])
def test_on_nan_skip_skips_the_update(kind, inputs, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("align", inputs, tmp_path / "run", "--on_nan", "skip")
    forward = preference.PreferenceLoss.forward
    calls = []

    def poisoned(self, batch, count):
        share = forward(self, batch, count)
        calls.append(1)
        if len(calls) != 4:
            return share
        if kind == "loss":
            return share._replace(loss=share.loss * float("nan"))
        if kind == "infinite":
            return share._replace(loss=share.loss + next(self.parameters()).sum() * float("inf"))
        return share._replace(loss=share.loss + (next(self.parameters()).sum() * 0).abs().sqrt())

    monkeypatch.setattr(preference.PreferenceLoss, "forward", poisoned)
    assert STAGES["align"].main(argv) == 0
    assert "1 updates were skipped: their loss or gradient was not finite" in capsys.readouterr().out
    log = [line for line in interruptions.lines(tmp_path / "run" / "metrics.jsonl") if "learning_rate" in line]
    assert [line.get("skipped") for line in log].count(1.0) == 1 and len(log) == STEPS
    assert [line["clipped"] for line in log if line.get("skipped")] == [0.0], "a skipped update is not clipped"
    assert all(parameter.isfinite().all() for parameter in models.load(str(tmp_path / "run"))[0].parameters())


def test_signal_handlers_are_restored_after_training(inputs, tmp_path):
    def handler(number, frame):
        raise AssertionError

    previous = signal.signal(signal.SIGINT, handler)
    try:
        assert STAGES["sft"].main(interruptions.arguments("sft", inputs, tmp_path / "run", "--max_steps", "1")) == 0
        assert signal.getsignal(signal.SIGINT) is handler and signals.stop_requested() == 0
    finally:
        signal.signal(signal.SIGINT, previous)
