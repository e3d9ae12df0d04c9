"""A run that was interrupted, anywhere, is the run that was not: bit for bit, dropout and all."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from exo import artifacts, checkpoints, models, policy, signals, states, steps
from tests import interruptions
from tests.interruptions import STAGES, STEPS, made

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """As kill -9 would: nothing of ours catches it."""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return interruptions.given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def whole(given):
    """What each stage makes when nothing happens to it; made once."""
    found = {}

    def of(stage):
        if stage not in found:
            assert STAGES[stage].main(interruptions.arguments(stage, given, given / f"whole-{stage}")) == 0
            found[stage] = made(given / f"whole-{stage}")
        return found[stage]

    return of


def killed_at(monkeypatch, owner, name, when, before=True):
    """The process dies in the call for which `when(*arguments)` holds."""
    own = getattr(owner, name)

    def dies(*arguments, **options):
        if not when(*arguments):
            return own(*arguments, **options)
        if not before:
            own(*arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, dies)


PLACES = {
    "before the first update": lambda patch: killed_at(patch, steps, "update", lambda *a: a[4] == 1),
    "before a state": lambda patch: killed_at(
        patch, checkpoints.Keeper, "mark", lambda self, n, c: n == 2, before=False
    ),
    "between two states": lambda patch: killed_at(patch, checkpoints.Keeper, "mark", lambda self, n, c: n == 5),
    "in the save of a state": lambda patch: killed_at(patch, artifacts.os, "rename", lambda a, b: "00000006" in str(b)),
    "after the save of a state": lambda patch: killed_at(
        patch, states, "write", lambda path, *a: "00000004" in str(path), before=False
    ),
    "in the last line": lambda patch: killed_at(patch, checkpoints.Keeper, "mark", lambda self, n, c: n == STEPS),
    "while the model is saved": lambda patch: killed_at(
        patch, models, "save", lambda m, t, p: "staging" in str(p) and "step" not in str(p)
    ),
}


def sampled(*cases, quick):
    """Those that `quick` holds for, and the others for the long lane."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("stage", "place"),
    sampled(*itertools.product(STAGES, PLACES), quick=lambda s, p: s == "align" or p == "between two states"),
)
def test_a_killed_run_goes_on_to_the_same_end(stage, place, given, whole, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments(stage, given, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        PLACES[place](patch)
        STAGES[stage].main(argv)
    assert STAGES[stage].main(argv) == 0
    went_on = "going on after step" in capsys.readouterr().out
    assert went_on == (place not in ("before the first update", "before a state"))
    assert made(tmp_path / "run") == whole(stage)
    assert not (tmp_path / "run" / artifacts.STATES).exists()


@pytest.mark.parametrize(
    ("stage", "number"),
    sampled(*itertools.product(STAGES, signals.SIGNALS), quick=lambda s, n: s == "align" or n == signal.SIGTERM),
)
def test_a_run_that_is_told_to_stop_loses_no_step(stage, number, given, whole, tmp_path, monkeypatch, capfd):
    argv = interruptions.arguments(stage, given, tmp_path / "run")
    accumulate = steps.accumulate

    def told(module, parts, count, accelerator, collate, step, *rest):
        if step == 6:
            os.kill(os.getpid(), number)
        return accumulate(module, parts, count, accelerator, collate, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "accumulate", told)
        assert STAGES[stage].main(argv) == 128 + number
    said = capfd.readouterr().err.strip().splitlines()
    assert said[0].startswith("stopping at the next step") and said[-1].startswith(
        "stopped: after step 5 of 10, kept in"
    )
    assert STAGES[stage].main(argv) == 0
    assert "going on after step 5" in capfd.readouterr().out
    assert made(tmp_path / "run") == whole(stage)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(given, whole, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("align", given, tmp_path / "run")
    evaluate = policy.evaluate

    def told(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(policy, "evaluate", told)
        assert STAGES["align"].main(argv) == 143
    assert "after step 3 of 10" in capsys.readouterr().err
    assert STAGES["align"].main(argv) == 0
    assert made(tmp_path / "run") == whole("align")


def test_the_end_is_the_end(given, whole, tmp_path, capsys):
    whole("sft")
    run = given / "whole-sft"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert STAGES["sft"].main(interruptions.arguments("sft", given, run)) == 0
    assert "this run has finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


@pytest.fixture
def half(given, tmp_path, monkeypatch):
    """A run of SFT that was killed after step 7, and its arguments."""
    argv = interruptions.arguments("sft", given, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, checkpoints.Keeper, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    return tmp_path / "run", argv


def test_changed_options_are_shown_and_refused_unless_allowed(half, whole, capsys):
    run, argv = half
    changed = [*argv, "--learning_rate", "1e-3"]
    assert STAGES["sft"].main(changed) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "unfinished, with learning_rate 0.003, now 0.001; --allow_changes goes on" in said
    assert STAGES["sft"].main([*changed, "--allow_changes"]) == 0
    assert "going on with changes: learning_rate 0.003, now 0.001" in capsys.readouterr().out
    assert made(run) != whole("sft")
    assert json.loads((run / "run.json").read_text())["arguments"]["learning_rate"] == 1e-3


def test_fewer_steps_than_were_taken_are_refused(half, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--allow_changes", "--max_steps", "3"]) == 1
    assert "holds the state of step 6; expected --max_steps 6 at least" in capsys.readouterr().err


def test_more_steps_than_were_asked_for_may_be_added(half, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--allow_changes", "--max_steps", "12"]) == 0
    assert [line["step"] for line in interruptions.lines(run / "metrics.jsonl")] == list(range(1, 13))


def test_what_changes_nothing_may_change(half, whole):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--logging_steps", "1", "--checkpoint_steps", "3"]) == 0
    assert made(run) == whole("sft")


def test_beginning_anew_is_for_the_user_to_say(half, whole, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--overwrite_output_dir"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert made(run) == whole("sft")


FILES = ("tensors/shard-00001-model-00001-of-00001.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize(
    ("damage", "how"),
    sampled(*itertools.product(FILES, ("flipped", "cut", "gone")), quick=lambda d, h: h == "flipped" or d == FILES[0]),
)
def test_a_damaged_state_is_named_and_the_one_before_it_used(half, whole, damage, how, capsys):
    run, argv = half
    file = run / "resume" / "step-00000006" / damage
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"flipped": content, "cut": content[:-1], "gone": b""}[how])
    if how == "gone":
        file.unlink()
    assert STAGES["sft"].main(argv) == 0
    said = capsys.readouterr().out
    assert f"step-00000006 is damaged and not used: {damage}" in said and "going on after step 4" in said
    assert made(run) == whole("sft")


def test_one_that_was_damaged_makes_room_for_one_that_is_whole(half, whole, monkeypatch):
    """Though its step is later."""
    run, argv = half
    (run / "resume" / "step-00000006" / "manifest.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, checkpoints.Keeper, "mark", lambda self, n, c: n == 6)
        STAGES["sft"].main([*argv, "--checkpoint_steps", "1"])
    assert sorted(path.name[-1] for path in (run / "resume").iterdir()) == ["4", "5"]
    assert STAGES["sft"].main(argv) == 0
    assert made(run) == whole("sft")


@pytest.mark.parametrize("how", ["damaged", "of another version"])
def test_where_no_state_is_whole_the_user_is_asked(half, whole, capsys, monkeypatch, how):
    """It may be a disk that comes back; and what is there is not touched."""
    run, argv = half
    manifests = [run / "resume" / state / "manifest.json" for state in ("step-00000004", "step-00000006")]
    before = [file.read_bytes() for file in manifests]
    for file in manifests:
        text = file.read_text()
        file.write_text(text.replace('"version": 2', '"version": 1') if "version" in how else text[1:])
    assert STAGES["sft"].main(argv) == 1
    said = capsys.readouterr()
    assert "none of its states is whole; --overwrite_output_dir begins the run anew" in said.err
    assert ("it is of another version of exo (1, and this one reads 2)" in said.out) == ("version" in how)
    for file, content in zip(manifests, before, strict=True):
        file.write_bytes(content)
    assert STAGES["sft"].main(argv) == 0
    assert made(run) == whole("sft")


def test_a_signal_in_a_save_does_not_cost_it(given, whole, tmp_path, monkeypatch, capsys):
    """It is finished, not begun again."""
    argv = interruptions.arguments("sft", given, tmp_path / "run")
    write, written = states._write_tensors, []

    def signalled(directory, tensors):
        write(directory, tensors)
        written.append(directory.parent.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(states, "_write_tensors", signalled)
        assert STAGES["sft"].main(argv) == 143
    assert written == [".step-00000002.staging", ".step-00000004.staging"]
    assert STAGES["sft"].main(argv) == 0
    assert made(tmp_path / "run") == whole("sft")


def test_a_state_in_many_files_is_one(given, whole, tmp_path, monkeypatch):
    """As of a large model, whose files are kept small enough to be in memory twice."""
    monkeypatch.setattr(states, "FILE", 4000)
    argv = interruptions.arguments("sft", given, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, checkpoints.Keeper, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    assert len(list((tmp_path / "run/resume/step-00000006/tensors").iterdir())) > 10
    assert STAGES["sft"].main(argv) == 0
    assert made(tmp_path / "run") == whole("sft")


def test_a_log_that_is_not_the_states_is_seen(half, capsys):
    run, argv = half
    (run / "metrics.jsonl").write_text("")
    assert STAGES["sft"].main(argv) == 1
    assert "it has fewer, and so is not this state's" in capsys.readouterr().err


def test_a_position_in_other_batches_is_refused_and_the_first_command_still_goes_on(half, whole, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--allow_changes", "--batch_size", "5"]) == 1
    assert "batch_size was 7, and is 5 now" in capsys.readouterr().err
    assert STAGES["sft"].main(argv) == 0
    assert made(run) == whole("sft")


def test_a_listener_that_is_gone_costs_nothing(given, whole, tmp_path):
    """Ctrl-C ends the reader of a pipe too."""
    argv = interruptions.arguments("sft", given, tmp_path / "run", "--logging_steps", "1")
    command = [sys.executable, "-m", "exo.sft", *argv, "--max_steps", "4000", "--checkpoint_steps", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in child.stdout:
        if b"step 20/" in line:
            break
    child.stdout.close()
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 130
    assert states.newest(tmp_path / "run" / "resume") is not None


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
    assert said.startswith("error: ") and "No space left" in said and "the last whole state is" in said
    assert STAGES[stage].main(argv) == 0
    assert made(tmp_path / "run") == whole(stage)


def test_a_line_that_is_written_in_part_is_none(tmp_path):
    """As a full disk does it: a part is taken, and no error given."""

    class Half(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2])

    with Half(tmp_path / "log", "wb") as file:
        with pytest.raises(OSError, match="No space left"):
            artifacts.append(file, "a line\n")
        assert (tmp_path / "log").read_bytes() == b""


def test_a_state_of_another_model_is_refused(half, capsys, monkeypatch):
    run, argv = half
    other = {"weights.other": torch.zeros(3)}
    monkeypatch.setattr(checkpoints.Keeper, "_weights", lambda self: other)
    assert STAGES["sft"].main(argv) == 1
    assert "of another model" in capsys.readouterr().err


def test_a_state_of_another_number_of_processes_is_refused(half, capsys):
    run, argv = half
    state = run / "resume" / "step-00000006"
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(facts | {"processes": 2}))
    (state / "manifest.json").unlink()
    (state / "manifest.json").write_bytes(states._encoded(states._listed(state)))
    assert STAGES["sft"].main(argv) == 1
    expected = "of a run with 2 processes; this one has 1 process; with --allow_changes"
    assert expected in capsys.readouterr().err


def test_a_full_disk_names_the_last_whole_state_and_leaves_it(given, whole, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("sft", given, tmp_path / "run")
    fsync = os.fsync

    def full(handle):
        if "step-00000006" in (name := os.readlink(f"/proc/self/fd/{handle}")) and name.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert STAGES["sft"].main(argv) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: step 6: its state could not be written") and "No space left on device" in said
    assert "the last whole state is" in said and "step-00000004" in said
    assert STAGES["sft"].main(argv) == 0
    assert made(tmp_path / "run") == whole("sft")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_with_its_state(kind, given, whole, tmp_path, monkeypatch, capsys):
    """That of the step before it, from which the same command goes on, here to a loss that is finite."""
    argv = interruptions.arguments("align", given, tmp_path / "run", "--checkpoint_steps", "0")
    update = steps.update

    def poisoned(module, optim, config, accelerator, step, batch, loss):
        if step == 6 and kind == "loss":
            raise steps._not_finite(step, "the loss is nan", batch)
        if step == 6:
            next(p for p in module.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return update(module, optim, config, accelerator, step, batch, loss)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "update", poisoned)
        assert STAGES["align"].main(argv) == 1
    said = capsys.readouterr().err
    assert "error: step 6" in said and "stopped before the update" in said
    assert f"the last whole state is {tmp_path / 'run' / 'resume' / 'step-00000005'}" in said
    assert STAGES["align"].main(argv) == 0
    assert made(tmp_path / "run") == whole("align")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped_where_that_was_asked_for(kind, given, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments("align", given, tmp_path / "run", "--on_nan", "skip")
    forward = policy.PolicyLoss.forward
    calls = []

    def poisoned(self, batch, count):
        share = forward(self, batch, count)
        calls.append(1)
        if len(calls) != 4:
            return share
        if kind == "loss":
            return share._replace(loss=share.loss * float("nan"))
        return share._replace(loss=share.loss + (next(self.parameters()).sum() * 0).abs().sqrt())

    monkeypatch.setattr(policy.PolicyLoss, "forward", poisoned)
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
        assert signal.getsignal(signal.SIGINT) is own and signals.asked() == 0
    finally:
        signal.signal(signal.SIGINT, before)
