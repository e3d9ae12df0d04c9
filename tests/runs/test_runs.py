"""What a stage finds as its input, what it says when that is missing, half made or of another kind, and what holds."""

import dataclasses
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from exo import data, sample, score
from exo.cli.errors import RunError
from exo.runs import directory as run_directory
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.runs.atomic import write_json
from tests.tasks import PROMPTS, write_model, write_rows

FILES = {"reads": ["source"], "makes": "."}  # as the stage's decorator declares them
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


def is_done(directory, config, stage) -> bool:
    return run_stage.status(directory, config, stage)[0] == "done"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, prompts and the configs of a sampling and a scoring, both run."""
    directory = tmp_path_factory.mktemp("lineage")
    model = write_model(directory / "model")
    prompts = write_rows(directory / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    drawn = sample.Config(
        model=model, data=prompts, k=2, max_new_tokens=4, output_dir=str(directory / "samples"), device="cpu",
        overwrite_output_dir=True,
    )  # fmt: skip
    scored = score.Config(
        data=str(directory / "samples"), oracle="tests.tasks:reward", output_dir=str(directory / "scored"),
        overwrite_output_dir=True, device="cpu",
    )  # fmt: skip
    sample.run(drawn)
    score.run(scored)
    return directory, drawn, scored


def test_a_directory_stands_for_what_its_stage_made(made):
    directory = made[0]
    assert run_inputs.source("data", str(directory / "samples"), "sample") == str(
        directory / "samples" / "samples.jsonl"
    )
    assert run_inputs.source("model", str(directory / "model"), "sft") == str(directory / "model")
    assert run_inputs.source("model", "gpt2", "sft") == "gpt2" and run_inputs.source("model", "a/b", "sft") == "a/b"


def test_a_prepared_directory_stands_for_the_file_that_a_stage_wants(tmp_path):
    (tmp_path / "test.jsonl").write_text("{}")
    write_json(tmp_path / "run.json", {"stage": "prepare", "command": [], "arguments": {}, "finished": "now"} | FILES)
    found = run_inputs.source("data", str(tmp_path), "prepare", prepared="test.jsonl")
    assert found == str(tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match="expected sft.jsonl in it, which this task does not make"):
        run_inputs.source("data", str(tmp_path), "prepare", prepared="sft.jsonl")


def test_a_directory_of_another_run_is_refused_before_any_work_with_what_differs(made, monkeypatch, capsys):
    """Hours of sampling or scoring must not come before the refusal."""
    monkeypatch.setattr(data, "read", None)
    other = write_rows(made[0] / "other.jsonl", [{"prompt": "blue"}])
    for stage, asked, changes, said in (
        (sample, made[1], {"k": 3}, "k 2, now 3"),
        (sample, made[1], {"data": other}, "another data"),
        (score, made[2], {"max_length": 9}, "max_length 1024, now 9"),
    ):
        with pytest.raises(RunError, match=f"holds an earlier run, with {said}; pass --overwrite_output_dir"):
            stage.run(replace(asked, overwrite_output_dir=False, **changes))


def test_the_same_again_is_done_already(made, monkeypatch, capsys):
    monkeypatch.setattr(data, "read", None)
    before = (made[0] / "samples" / "run.json").read_bytes()
    assert sample.run(replace(made[1], overwrite_output_dir=False)) == made[0] / "samples"
    assert "this run has finished" in capsys.readouterr().out
    assert (made[0] / "samples" / "run.json").read_bytes() == before


def test_a_finished_run_whose_files_were_changed_is_not_taken_for_whole(made, tmp_path):
    config = replace(made[1], output_dir=str(tmp_path / "run"), overwrite_output_dir=False)
    file = sample.run(config) / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match="files that are not what it made; pass --overwrite_output_dir"):
        sample.run(config)


def test_two_at_a_time_in_one_directory_are_refused_and_a_refusal_leaves_nothing(tmp_path):
    directory = tmp_path / "run"
    with run_directory.lock(str(directory)):
        with (
            pytest.raises(RunError, match="another process is writing there"),
            run_directory.lock(str(directory)),
        ):
            raise AssertionError("both had it")
        assert directory.exists()
    assert not directory.exists()


def test_a_run_begins_when_it_is_asked_for(made, monkeypatch):
    """Its time and its inputs are those before the work, whatever happens to them meanwhile."""
    times = iter(["before", "after"])
    monkeypatch.setattr(run_record, "now", lambda: next(times))
    score.run(made[2])
    record = json.loads((made[0] / "scored" / "run.json").read_text())
    assert (record["started"], record["finished"]) == ("before", "after")


def test_a_record_that_was_half_written_is_no_obstacle(tmp_path):
    (tmp_path / ".staging-run.json").write_text("{")
    run_directory.check(str(tmp_path), overwrite=False)


def test_what_is_missing_is_said_with_what_makes_it(made):
    for path in (made[0] / "absent.jsonl", made[0] / "absent"):
        with pytest.raises(ValueError, match=r"--data .*absent.*: no such file .*; python -m exo.sample makes"):
            run_inputs.source("data", str(path), "sample")


def test_what_another_stage_made_is_said(made):
    with pytest.raises(ValueError, match=r"what score makes; found a run of sample; python -m exo.score makes"):
        run_inputs.source("data", str(made[0] / "samples"), "score")


def test_what_is_half_made_is_said_with_the_command_that_goes_on(made, tmp_path):
    record = json.loads((made[0] / "samples" / "run.json").read_text())
    del record["finished"]
    write_json(tmp_path / "run.json", record)
    for path in (tmp_path, tmp_path / "samples.jsonl"):
        with pytest.raises(RunError, match=r"resume it: python -m exo.sample --.*$"):
            run_inputs.source("data", str(path), "sample")


def test_a_run_holds_until_options_inputs_or_outputs_change(made, tmp_path):
    directory, drawn, scored = made
    assert is_done(directory / "samples", drawn, "sample") and is_done(directory / "scored", scored, "score")
    assert not is_done(directory / "absent", drawn, "sample")
    assert not is_done(directory / "samples", drawn, "score")
    assert not is_done(directory / "samples", dataclasses.replace(drawn, k=3), "sample")
    elsewhere = dataclasses.replace(drawn, output_dir="x", overwrite_output_dir=False)
    assert is_done(directory / "samples", elsewhere, "sample")
    copy = tmp_path / "prompts.jsonl"
    copy.write_bytes((directory / "prompts.jsonl").read_bytes())
    assert is_done(directory / "samples", dataclasses.replace(drawn, data=str(copy)), "sample"), "a path is no input"
    copy.write_text('{"prompt": "red"}\n')
    assert not is_done(directory / "samples", dataclasses.replace(drawn, data=str(copy)), "sample")


def test_a_run_that_did_not_finish_does_not_hold(made, tmp_path):
    _, drawn, _ = made
    run = sample.run(dataclasses.replace(drawn, output_dir=str(tmp_path / "run")))
    record = json.loads((run / "run.json").read_text())
    assert is_done(run, drawn, "sample")
    for gone in ({"finished"}, {"finished", "outputs"}):
        write_json(run / "run.json", {name: value for name, value in record.items() if name not in gone})
        assert not is_done(run, drawn, "sample")


def test_a_removal_that_is_interrupted_leaves_a_run_that_does_not_hold_and_may_make_room(made, tmp_path, monkeypatch):
    _, drawn, _ = made
    config = dataclasses.replace(drawn, output_dir=str(tmp_path / "run"))
    run = sample.run(config)
    (run / "more").mkdir()

    def killed(path, **how):
        (path / "run.json").unlink(missing_ok=True)  # in a directory the order is any
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            sample.run(config)
    (run / "samples.jsonl").unlink(missing_ok=True)
    assert run_directory.is_run(run) and not is_done(run, config, "sample")
    sample.run(config)
    assert is_done(run, config, "sample") and not (run / "more").exists()


def test_damaged_or_missing_outputs_do_not_hold(made):
    directory, drawn, _ = made
    file = directory / "samples" / "samples.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert not is_done(directory / "samples", drawn, "sample")
    file.unlink()
    assert not is_done(directory / "samples", drawn, "sample")
    file.write_bytes(whole)
    assert is_done(directory / "samples", drawn, "sample")


def test_a_model_is_its_weights_config_and_tokenizer(made, tmp_path):
    before = run_inputs.fingerprint(str(made[0] / "model"))
    assert before == run_inputs.fingerprint(write_model(tmp_path / "same"))
    assert before != run_inputs.fingerprint(write_model(tmp_path / "other", seed=1))
    assert before != run_inputs.fingerprint(write_model(tmp_path / "words", words=["x"]))
    assert run_inputs.fingerprint("owner/name") == "owner/name"


def test_an_unfinished_run_of_an_older_version_is_refused(made, tmp_path):
    """Its checkpoints are in another layout."""
    config = replace(made[1], output_dir=str(tmp_path / "run"), overwrite_output_dir=False)
    record = {"stage": "sample", "command": [], "arguments": dataclasses.asdict(config), "inputs": {}}
    (tmp_path / "run" / "resume" / "step-2").mkdir(parents=True)
    write_json(tmp_path / "run" / "run.json", record)
    with pytest.raises(RunError, match="an unfinished run of an older version; finish it with that version or pass"):
        sample.run(config)
    sample.run(replace(config, overwrite_output_dir=True))
    assert not (tmp_path / "run" / "resume").exists()


def test_every_stage_is_known():
    """A stage is what its decorator says; importing its module is enough."""
    stages = {path.stem for path in (ROOT / "exo").glob("*.py")} - {"__init__", "train", "inspect"}
    for name in stages:
        importlib.import_module(f"exo.{name}")
    assert set(run_record.STAGES) == stages


def test_the_directory_of_a_run_of_an_older_version_is_refused_and_its_file_read(tmp_path):
    """Such a record does not say which file the stage makes."""
    run = tmp_path / "old"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"stage": "scoring", "command": [], "arguments": {}, "finished": "x"}))
    (run / "scored.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="--data .*old: a run of an older version; name the file in it"):
        run_inputs.source("data", str(run), "score")
    assert run_inputs.source("data", str(run / "scored.jsonl"), "score") == str(run / "scored.jsonl")
    (run / "config.json").write_text("{}")
    assert run_inputs.source("model", str(run), "sft") == str(run), "a model directory is a model whoever made it"
