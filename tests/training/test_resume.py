"""A run that is interrupted anywhere resumes to the bits of an undisturbed run, dropout included."""

import itertools
import json

import pytest
import torch

from exo import models
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.training import checkpoint, checkpoint_files, step
from tests import interruptions
from tests.interruptions import STAGES, STEPS, fingerprint, mark_slow

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Raised to simulate kill -9; no code of exo catches it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return interruptions.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs):
    return interruptions.undisturbed_runs(inputs)


def kill_at(monkeypatch, owner, name, when, before=True):
    """Raise Killed in the first call of `owner.name` for which `when(*arguments)` is true, before or after it runs."""
    original = getattr(owner, name)

    def killed(*arguments, **options):
        if not when(*arguments):
            return original(*arguments, **options)
        if not before:
            original(*arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, killed)


PLACES = {
    "before the first update": lambda patch: kill_at(patch, step, "update", lambda *a: a[4] == 1),
    "before a checkpoint": lambda patch: kill_at(
        patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 2, before=False
    ),
    "between two checkpoints": lambda patch: kill_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 5),
    "in the save of a checkpoint": lambda patch: kill_at(
        patch, run_directory.os, "rename", lambda a, b: "checkpoints/step-6" in str(b)
    ),
    "after the save of a checkpoint": lambda patch: kill_at(
        patch, checkpoint_files, "write", lambda path, *a: "step-4" in str(path), before=False
    ),
    "in the last line": lambda patch: kill_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == STEPS),
    "while the model is saved": lambda patch: kill_at(
        patch, models, "save", lambda m, t, p: "staging" in str(p) and "step" not in str(p)
    ),
}


@pytest.mark.parametrize(
    ("stage", "place"),
    mark_slow(*itertools.product(STAGES, PLACES), quick=lambda s, p: s == "align" or p == "between two checkpoints"),
)
def test_a_killed_run_resumes_to_the_same_bits(stage, place, inputs, undisturbed, tmp_path, monkeypatch, capsys):
    argv = interruptions.arguments(stage, inputs, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        PLACES[place](patch)
        STAGES[stage].main(argv)
    assert STAGES[stage].main(argv) == 0
    resumed = "resuming after step" in capsys.readouterr().out
    assert resumed == (place not in ("before the first update", "before a checkpoint"))
    assert fingerprint(tmp_path / "run") == undisturbed(stage)
    assert not (tmp_path / "run" / run_record.STATES).exists()


def test_a_finished_run_is_not_repeated(inputs, undisturbed, tmp_path, capsys):
    undisturbed("sft")
    run = inputs / "undisturbed-sft"
    modified = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert STAGES["sft"].main(interruptions.arguments("sft", inputs, run)) == 0
    assert "this run has finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == modified


@pytest.fixture
def killed_run(inputs, tmp_path, monkeypatch):
    """Return the directory and the arguments of an SFT run that was killed after step 7."""
    argv = interruptions.arguments("sft", inputs, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    return tmp_path / "run", argv


def test_changed_options_are_shown_and_refused_unless_allowed(killed_run, undisturbed, capsys):
    run, argv = killed_run
    changed = [*argv, "--learning_rate", "1e-3"]
    assert STAGES["sft"].main(changed) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "unfinished, with learning_rate 0.003, now 0.001; pass --allow_changes to resume" in error
    assert STAGES["sft"].main([*changed, "--allow_changes"]) == 0
    assert "resuming with changes: learning_rate 0.003, now 0.001" in capsys.readouterr().out
    assert fingerprint(run) != undisturbed("sft")
    assert json.loads((run / "run.json").read_text())["arguments"]["learning_rate"] == 1e-3


def test_fewer_steps_than_were_taken_are_refused(killed_run, capsys):
    run, argv = killed_run
    assert STAGES["sft"].main([*argv, "--allow_changes", "--max_steps", "3"]) == 1
    assert "holds the checkpoint of step 6; expected --max_steps 6 or more" in capsys.readouterr().err


def test_max_steps_may_be_raised_on_resume(killed_run, capsys):
    run, argv = killed_run
    assert STAGES["sft"].main([*argv, "--allow_changes", "--max_steps", "12"]) == 0
    assert [line["step"] for line in interruptions.lines(run / "metrics.jsonl")] == list(range(1, 13))


def test_options_that_do_not_affect_the_result_may_change(killed_run, undisturbed):
    run, argv = killed_run
    assert STAGES["sft"].main([*argv, "--logging_steps", "1", "--save_steps", "3"]) == 0
    assert fingerprint(run) == undisturbed("sft")


def test_overwrite_output_dir_starts_over(killed_run, undisturbed, capsys):
    run, argv = killed_run
    assert STAGES["sft"].main([*argv, "--overwrite_output_dir"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert fingerprint(run) == undisturbed("sft")


FILES = ("tensors/shard-00001-model-00001-of-00001.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize(
    ("damaged_file", "damage"),
    mark_slow(
        *itertools.product(FILES, ("flipped", "cut", "gone")), quick=lambda d, h: h == "flipped" or d == FILES[0]
    ),
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(killed_run, undisturbed, damaged_file, damage, capsys):
    run, argv = killed_run
    file = run / "checkpoints" / "step-6" / damaged_file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"flipped": content, "cut": content[:-1], "gone": b""}[damage])
    if damage == "gone":
        file.unlink()
    assert STAGES["sft"].main(argv) == 0
    output = capsys.readouterr().out
    assert f"step-6 is damaged and not used: {damaged_file}" in output and "resuming after step 4" in output
    assert fingerprint(run) == undisturbed("sft")


def test_a_damaged_checkpoint_is_deleted_before_an_intact_one(killed_run, undisturbed, monkeypatch):
    """Check that the limit on the number of checkpoints removes it first, although its step is later."""
    run, argv = killed_run
    (run / "checkpoints" / "step-6" / "manifest.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 6)
        STAGES["sft"].main([*argv, "--save_steps", "1"])
    assert sorted(path.name[-1] for path in (run / "checkpoints").iterdir()) == ["4", "5"]
    assert STAGES["sft"].main(argv) == 0
    assert fingerprint(run) == undisturbed("sft")


@pytest.mark.parametrize("reason", ["damaged", "of another version"])
def test_a_run_without_an_intact_checkpoint_stops_and_changes_nothing(
    killed_run, undisturbed, capsys, monkeypatch, reason
):
    """Check that the files stay, because the damage may be temporary, such as a disk that is not mounted."""
    run, argv = killed_run
    manifests = [run / "checkpoints" / state / "manifest.json" for state in ("step-4", "step-6")]
    contents = [file.read_bytes() for file in manifests]
    for file in manifests:
        text = file.read_text()
        file.write_text(text.replace('"version": 2', '"version": 1') if "version" in reason else text[1:])
    assert STAGES["sft"].main(argv) == 1
    output = capsys.readouterr()
    assert "no checkpoint is intact; pass --overwrite_output_dir to start over" in output.err
    assert ("another version of exo wrote it (1; this one reads 2)" in output.out) == ("version" in reason)
    for file, content in zip(manifests, contents, strict=True):
        file.write_bytes(content)
    assert STAGES["sft"].main(argv) == 0
    assert fingerprint(run) == undisturbed("sft")


def test_a_checkpoint_may_span_many_files(inputs, undisturbed, tmp_path, monkeypatch):
    """Check this as for a large model, whose checkpoint is split into files small enough to be in memory twice."""
    monkeypatch.setattr(checkpoint_files, "FILE", 4000)
    argv = interruptions.arguments("sft", inputs, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    assert len(list((tmp_path / "run/checkpoints/step-6/tensors").iterdir())) > 10
    assert STAGES["sft"].main(argv) == 0
    assert fingerprint(tmp_path / "run") == undisturbed("sft")


def test_a_log_that_does_not_match_the_checkpoint_is_an_error(killed_run, capsys):
    run, argv = killed_run
    (run / "metrics.jsonl").write_text("")
    assert STAGES["sft"].main(argv) == 1
    assert "the log is not this checkpoint's" in capsys.readouterr().err


def test_another_batch_size_is_refused_and_the_original_command_still_resumes(killed_run, undisturbed, capsys):
    run, argv = killed_run
    assert STAGES["sft"].main([*argv, "--allow_changes", "--batch_size", "5"]) == 1
    assert "batch_size was 7, and is 5 now" in capsys.readouterr().err
    assert STAGES["sft"].main(argv) == 0
    assert fingerprint(run) == undisturbed("sft")


def test_a_checkpoint_of_another_model_is_refused(killed_run, capsys, monkeypatch):
    run, argv = killed_run
    other = {"weights.other": torch.zeros(3)}
    monkeypatch.setattr(checkpoint.Checkpointer, "_weights", lambda self: other)
    assert STAGES["sft"].main(argv) == 1
    assert "saved from another model" in capsys.readouterr().err


def test_a_checkpoint_of_another_number_of_processes_is_refused(killed_run, capsys):
    run, argv = killed_run
    state = run / "checkpoints" / "step-6"
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(facts | {"processes": 2}))
    (state / "manifest.json").unlink()
    (state / "manifest.json").write_bytes(checkpoint_files._encode_manifest(checkpoint_files._digests(state)))
    assert STAGES["sft"].main(argv) == 1
    expected = "saved by a run with 2 processes; this one has 1 process; pass --allow_changes"
    assert expected in capsys.readouterr().err


def test_the_checkpoint_to_resume_from_may_be_named(killed_run, undisturbed, capsys):
    run, argv = killed_run
    assert STAGES["sft"].main([*argv, f"--resume_from_checkpoint={run / 'checkpoints' / 'step-4'}"]) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert fingerprint(run) == undisturbed("sft")


def test_resuming_from_the_newest_checkpoint_may_be_required(killed_run, undisturbed, capsys):
    run, argv = killed_run
    assert STAGES["sft"].main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert "resuming after step 6" in capsys.readouterr().out
    assert fingerprint(run) == undisturbed("sft")


def test_another_run_may_resume_from_a_checkpoint(killed_run, undisturbed, inputs, tmp_path, capsys):
    """Check that its log begins after the step of the checkpoint and its model has the same bits."""
    run, _ = killed_run
    argv = interruptions.arguments("sft", inputs, tmp_path / "other", "--resume_from_checkpoint")
    assert STAGES["sft"].main([*argv, str(run / "checkpoints" / "step-6")]) == 0
    expected, other = undisturbed("sft"), fingerprint(tmp_path / "other")
    assert other.pop("metrics") == expected["metrics"][6:]
    assert other == {name: value for name, value in expected.items() if name != "metrics"}
    assert (run / "checkpoints" / "step-6").is_dir() and len(interruptions.lines(run / "metrics.jsonl")) == 7


def test_a_named_checkpoint_must_be_intact(killed_run, undisturbed, capsys):
    run, argv = killed_run
    place = run / "checkpoints" / "step-4"
    (place / "state.json").write_text("{}")
    assert STAGES["sft"].main([*argv, "--resume_from_checkpoint", str(place)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--resume_from_checkpoint {place}: the checkpoint is damaged: state.json has 2 bytes" in line
    assert STAGES["sft"].main(argv) == 0
    assert fingerprint(run) == undisturbed("sft")


def test_a_missing_checkpoint_is_an_error(inputs, killed_run, tmp_path, capsys):
    argv = interruptions.arguments("sft", inputs, tmp_path / "new", "--resume_from_checkpoint")
    assert STAGES["sft"].main([*argv, "true"]) == 1
    assert f"--resume_from_checkpoint true: {tmp_path / 'new'} has no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    run, argv = killed_run
    for value, options in (
        ("absent", []),
        ("true", ["--overwrite_output_dir"]),
        (str(run), ["--overwrite_output_dir"]),
    ):
        with pytest.raises(SystemExit) as stop:
            STAGES["sft"].main([*argv, f"--resume_from_checkpoint={value}", *options])
        assert stop.value.code == 2 and "--resume_from_checkpoint: expected" in capsys.readouterr().err
    assert (run / "checkpoints" / "step-6").is_dir()


def test_save_total_limit_limits_the_number_of_checkpoints(killed_run, inputs, tmp_path, monkeypatch):
    run, _ = killed_run
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-4", "step-6"]
    argv = interruptions.arguments("sft", inputs, tmp_path / "more", "--save_total_limit", "3", "--save_steps", "1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, checkpoint.Checkpointer, "mark", lambda self, n, c: n == 7)
        STAGES["sft"].main(argv)
    assert sorted(path.name for path in (tmp_path / "more" / "checkpoints").iterdir()) == ["step-4", "step-5", "step-6"]
