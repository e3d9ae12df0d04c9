"""A run that was interrupted, anywhere, is the run that was not: bit for bit, dropout and all."""

import itertools
import json

import pytest
import torch

from exo import models
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.training import checkpoint, checkpoint_files, step
from tests import interruptions
from tests.interruptions import STAGES, STEPS, made, sampled

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """As kill -9 would: nothing of ours catches it."""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return interruptions.given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def whole(given):
    return interruptions.undisturbed(given)


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
    "before the first update": lambda patch: killed_at(patch, step, "update", lambda *a: a[4] == 1),
    "before a state": lambda patch: killed_at(
        patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 2, before=False
    ),
    "between two states": lambda patch: killed_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 5),
    "in the save of a state": lambda patch: killed_at(
        patch, run_directory.os, "rename", lambda a, b: "checkpoints/step-6" in str(b)
    ),
    "after the save of a state": lambda patch: killed_at(
        patch, checkpoint_files, "write", lambda path, *a: "step-4" in str(path), before=False
    ),
    "in the last line": lambda patch: killed_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == STEPS),
    "while the model is saved": lambda patch: killed_at(
        patch, models, "save", lambda m, t, p: "staging" in str(p) and "step" not in str(p)
    ),
}


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
    went_on = "resuming after step" in capsys.readouterr().out
    assert went_on == (place not in ("before the first update", "before a state"))
    assert made(tmp_path / "run") == whole(stage)
    assert not (tmp_path / "run" / run_record.STATES).exists()


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
        killed_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    return tmp_path / "run", argv


def test_changed_options_are_shown_and_refused_unless_allowed(half, whole, capsys):
    run, argv = half
    changed = [*argv, "--learning_rate", "1e-3"]
    assert STAGES["sft"].main(changed) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "unfinished, with learning_rate 0.003, now 0.001; pass --allow_changes to resume" in said
    assert STAGES["sft"].main([*changed, "--allow_changes"]) == 0
    assert "resuming with changes: learning_rate 0.003, now 0.001" in capsys.readouterr().out
    assert made(run) != whole("sft")
    assert json.loads((run / "run.json").read_text())["arguments"]["learning_rate"] == 1e-3


def test_fewer_steps_than_were_taken_are_refused(half, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--allow_changes", "--max_steps", "3"]) == 1
    assert "holds the checkpoint of step 6; expected --max_steps 6 or more" in capsys.readouterr().err


def test_more_steps_than_were_asked_for_may_be_added(half, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--allow_changes", "--max_steps", "12"]) == 0
    assert [line["step"] for line in interruptions.lines(run / "metrics.jsonl")] == list(range(1, 13))


def test_what_changes_nothing_may_change(half, whole):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--logging_steps", "1", "--save_steps", "3"]) == 0
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
    file = run / "checkpoints" / "step-6" / damage
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"flipped": content, "cut": content[:-1], "gone": b""}[how])
    if how == "gone":
        file.unlink()
    assert STAGES["sft"].main(argv) == 0
    said = capsys.readouterr().out
    assert f"step-6 is damaged and not used: {damage}" in said and "resuming after step 4" in said
    assert made(run) == whole("sft")


def test_one_that_was_damaged_makes_room_for_one_that_is_whole(half, whole, monkeypatch):
    """Though its step is later."""
    run, argv = half
    (run / "checkpoints" / "step-6" / "manifest.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 6)
        STAGES["sft"].main([*argv, "--save_steps", "1"])
    assert sorted(path.name[-1] for path in (run / "checkpoints").iterdir()) == ["4", "5"]
    assert STAGES["sft"].main(argv) == 0
    assert made(run) == whole("sft")


@pytest.mark.parametrize("how", ["damaged", "of another version"])
def test_where_no_state_is_whole_the_user_is_asked(half, whole, capsys, monkeypatch, how):
    """It may be a disk that comes back; and what is there is not touched."""
    run, argv = half
    manifests = [run / "checkpoints" / state / "manifest.json" for state in ("step-4", "step-6")]
    before = [file.read_bytes() for file in manifests]
    for file in manifests:
        text = file.read_text()
        file.write_text(text.replace('"version": 2', '"version": 1') if "version" in how else text[1:])
    assert STAGES["sft"].main(argv) == 1
    said = capsys.readouterr()
    assert "no checkpoint is intact; pass --overwrite_output_dir to start over" in said.err
    assert ("another version of exo wrote it (1; this one reads 2)" in said.out) == ("version" in how)
    for file, content in zip(manifests, before, strict=True):
        file.write_bytes(content)
    assert STAGES["sft"].main(argv) == 0
    assert made(run) == whole("sft")


def test_a_state_in_many_files_is_one(given, whole, tmp_path, monkeypatch):
    """As of a large model, whose files are kept small enough to be in memory twice."""
    monkeypatch.setattr(checkpoint_files, "FILE", 4000)
    argv = interruptions.arguments("sft", given, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    assert len(list((tmp_path / "run/checkpoints/step-6/tensors").iterdir())) > 10
    assert STAGES["sft"].main(argv) == 0
    assert made(tmp_path / "run") == whole("sft")


def test_a_log_that_is_not_the_states_is_seen(half, capsys):
    run, argv = half
    (run / "metrics.jsonl").write_text("")
    assert STAGES["sft"].main(argv) == 1
    assert "the log is not this checkpoint's" in capsys.readouterr().err


def test_a_position_in_other_batches_is_refused_and_the_first_command_still_goes_on(half, whole, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--allow_changes", "--batch_size", "5"]) == 1
    assert "batch_size was 7, and is 5 now" in capsys.readouterr().err
    assert STAGES["sft"].main(argv) == 0
    assert made(run) == whole("sft")


def test_a_state_of_another_model_is_refused(half, capsys, monkeypatch):
    run, argv = half
    other = {"weights.other": torch.zeros(3)}
    monkeypatch.setattr(checkpoint.Checkpointer, "_weights", lambda self: other)
    assert STAGES["sft"].main(argv) == 1
    assert "saved from another model" in capsys.readouterr().err


def test_a_state_of_another_number_of_processes_is_refused(half, capsys):
    run, argv = half
    state = run / "checkpoints" / "step-6"
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(facts | {"processes": 2}))
    (state / "manifest.json").unlink()
    (state / "manifest.json").write_bytes(checkpoint_files._encode_manifest(checkpoint_files._digests(state)))
    assert STAGES["sft"].main(argv) == 1
    expected = "saved by a run with 2 processes; this one has 1 process; pass --allow_changes"
    assert expected in capsys.readouterr().err


def test_the_checkpoint_to_resume_from_may_be_named(half, whole, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, f"--resume_from_checkpoint={run / 'checkpoints' / 'step-4'}"]) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert made(run) == whole("sft")


def test_the_newest_checkpoint_may_be_demanded(half, whole, capsys):
    run, argv = half
    assert STAGES["sft"].main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert "resuming after step 6" in capsys.readouterr().out
    assert made(run) == whole("sft")


def test_another_run_may_resume_from_a_checkpoint(half, whole, given, tmp_path, capsys):
    """Its log begins after that step; its model is the same to the last bit."""
    run, _ = half
    argv = interruptions.arguments("sft", given, tmp_path / "other", "--resume_from_checkpoint")
    assert STAGES["sft"].main([*argv, str(run / "checkpoints" / "step-6")]) == 0
    expected, other = whole("sft"), made(tmp_path / "other")
    assert other.pop("metrics") == expected["metrics"][6:]
    assert other == {name: value for name, value in expected.items() if name != "metrics"}
    assert (run / "checkpoints" / "step-6").is_dir() and len(interruptions.lines(run / "metrics.jsonl")) == 7


def test_a_named_checkpoint_must_be_intact(half, whole, capsys):
    run, argv = half
    place = run / "checkpoints" / "step-4"
    (place / "state.json").write_text("{}")
    assert STAGES["sft"].main([*argv, "--resume_from_checkpoint", str(place)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--resume_from_checkpoint {place}: the checkpoint is damaged: state.json has 2 bytes" in line
    assert STAGES["sft"].main(argv) == 0
    assert made(run) == whole("sft")


def test_a_checkpoint_that_is_not_there_is_an_error(given, half, tmp_path, capsys):
    argv = interruptions.arguments("sft", given, tmp_path / "new", "--resume_from_checkpoint")
    assert STAGES["sft"].main([*argv, "true"]) == 1
    assert f"--resume_from_checkpoint true: {tmp_path / 'new'} has no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    run, argv = half
    for value, options in (
        ("absent", []),
        ("true", ["--overwrite_output_dir"]),
        (str(run), ["--overwrite_output_dir"]),
    ):
        with pytest.raises(SystemExit) as stop:
            STAGES["sft"].main([*argv, f"--resume_from_checkpoint={value}", *options])
        assert stop.value.code == 2 and "--resume_from_checkpoint: expected" in capsys.readouterr().err
    assert (run / "checkpoints" / "step-6").is_dir()


def test_as_many_checkpoints_are_kept_as_are_asked_for(half, given, tmp_path, monkeypatch):
    run, _ = half
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-4", "step-6"]
    argv = interruptions.arguments("sft", given, tmp_path / "more", "--save_total_limit", "3", "--save_steps", "1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    assert sorted(path.name for path in (tmp_path / "more" / "checkpoints").iterdir()) == ["step-4", "step-5", "step-6"]
