"""Inputs and records of stages: how inputs are resolved, errors if they are unusable, and when a run is done."""

import dataclasses
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from exo import best_of_n, data, sample, score, sft
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
def finished(tmp_path_factory):
    """Run a sampling and a scoring; return their parent directory and the two configs."""
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


def test_a_run_directory_stands_for_the_output_of_its_stage(finished):
    directory = finished[0]
    assert run_inputs.source("data", str(directory / "samples"), "sample") == str(
        directory / "samples" / "samples.jsonl"
    )
    assert run_inputs.source("model", str(directory / "model"), "sft") == str(directory / "model")
    assert run_inputs.source("model", "gpt2", "sft") == "gpt2" and run_inputs.source("model", "a/b", "sft") == "a/b"


def test_a_prepared_directory_stands_for_the_file_that_a_stage_reads(tmp_path):
    (tmp_path / "test.jsonl").write_text("{}")
    write_json(tmp_path / "run.json", {"stage": "prepare", "command": [], "arguments": {}, "finished": "now"} | FILES)
    path = run_inputs.source("data", str(tmp_path), "prepare", prepared="test.jsonl")
    assert path == str(tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match="expected sft.jsonl in it, which this task does not make"):
        run_inputs.source("data", str(tmp_path), "prepare", prepared="sft.jsonl")


def test_the_directory_of_another_run_is_refused_before_any_work(finished, monkeypatch, capsys):
    """Check that the error names the difference, and that it comes before hours of sampling or scoring."""
    monkeypatch.setattr(data, "read", None)
    other = write_rows(finished[0] / "other.jsonl", [{"prompt": "blue"}])
    for stage, config, changes, message in (
        (sample, finished[1], {"k": 3}, "k 2, now 3"),
        (sample, finished[1], {"data": other}, "another data"),
        (score, finished[2], {"max_length": 9}, "max_length 1024, now 9"),
    ):
        with pytest.raises(RunError, match=f"holds an earlier run, with {message}; pass --overwrite_output_dir"):
            stage.run(replace(config, overwrite_output_dir=False, **changes))


def test_a_finished_run_is_not_repeated(finished, monkeypatch, capsys):
    monkeypatch.setattr(data, "read", None)
    record = (finished[0] / "samples" / "run.json").read_bytes()
    assert sample.run(replace(finished[1], overwrite_output_dir=False)) == finished[0] / "samples"
    assert "this run has finished" in capsys.readouterr().out
    assert (finished[0] / "samples" / "run.json").read_bytes() == record


def test_a_finished_run_whose_files_changed_is_refused(finished, tmp_path):
    config = replace(finished[1], output_dir=str(tmp_path / "run"), overwrite_output_dir=False)
    file = sample.run(config) / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match="files that are not what it made; pass --overwrite_output_dir"):
        sample.run(config)


def test_a_second_run_in_a_locked_directory_is_refused(tmp_path):
    directory = tmp_path / "run"
    with run_directory.lock(str(directory)):
        with (
            pytest.raises(RunError, match="another process is writing there"),
            run_directory.lock(str(directory)),
        ):
            raise AssertionError("both processes have the lock")
        assert directory.exists()
    assert not directory.exists()


def test_the_start_time_is_taken_before_the_work(finished, monkeypatch):
    """Check that the recorded times are those before and after the work."""
    times = iter(["before", "after"])
    monkeypatch.setattr(run_record, "now", lambda: next(times))
    score.run(finished[2])
    record = json.loads((finished[0] / "scored" / "run.json").read_text())
    assert (record["started"], record["finished"]) == ("before", "after")


def test_a_half_written_record_is_ignored(tmp_path):
    (tmp_path / ".staging-run.json").write_text("{")
    run_directory.check(str(tmp_path), overwrite=False)


def test_the_error_of_a_missing_input_names_the_stage_that_makes_it(finished):
    for path in (finished[0] / "absent.jsonl", finished[0] / "absent"):
        with pytest.raises(ValueError, match=r"--data .*absent.*: no such file .*; python -m exo.sample makes"):
            run_inputs.source("data", str(path), "sample")


def test_the_output_of_another_stage_is_refused(finished):
    with pytest.raises(ValueError, match=r"what score makes; found a run of sample; python -m exo.score makes"):
        run_inputs.source("data", str(finished[0] / "samples"), "score")


def test_the_error_of_an_unfinished_input_names_the_command_that_resumes_it(finished, tmp_path):
    record = json.loads((finished[0] / "samples" / "run.json").read_text())
    del record["finished"]
    write_json(tmp_path / "run.json", record)
    for path in (tmp_path, tmp_path / "samples.jsonl"):
        with pytest.raises(RunError, match=r"resume it: python -m exo.sample --.*$"):
            run_inputs.source("data", str(path), "sample")


def test_a_run_is_done_until_options_inputs_or_outputs_change(finished, tmp_path):
    directory, drawn, scored = finished
    assert is_done(directory / "samples", drawn, "sample") and is_done(directory / "scored", scored, "score")
    assert not is_done(directory / "absent", drawn, "sample")
    assert not is_done(directory / "samples", drawn, "score")
    assert not is_done(directory / "samples", dataclasses.replace(drawn, k=3), "sample")
    elsewhere = dataclasses.replace(drawn, output_dir="x", overwrite_output_dir=False)
    assert is_done(directory / "samples", elsewhere, "sample")
    copy = tmp_path / "prompts.jsonl"
    copy.write_bytes((directory / "prompts.jsonl").read_bytes())
    assert is_done(directory / "samples", dataclasses.replace(drawn, data=str(copy)), "sample"), (
        "a path is not compared"
    )
    copy.write_text('{"prompt": "red"}\n')
    assert not is_done(directory / "samples", dataclasses.replace(drawn, data=str(copy)), "sample")


def test_an_unfinished_run_is_not_done(finished, tmp_path):
    _, drawn, _ = finished
    run = sample.run(dataclasses.replace(drawn, output_dir=str(tmp_path / "run")))
    record = json.loads((run / "run.json").read_text())
    assert is_done(run, drawn, "sample")
    for missing in ({"finished"}, {"finished", "outputs"}):
        write_json(run / "run.json", {name: value for name, value in record.items() if name not in missing})
        assert not is_done(run, drawn, "sample")


def test_a_run_whose_removal_was_interrupted_is_not_done_and_can_be_replaced(finished, tmp_path, monkeypatch):
    _, drawn, _ = finished
    config = dataclasses.replace(drawn, output_dir=str(tmp_path / "run"))
    run = sample.run(config)
    (run / "more").mkdir()

    def interrupted_rmtree(path, **options):
        (path / "run.json").unlink(missing_ok=True)  # files are removed in any order
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.shutil, "rmtree", interrupted_rmtree)
        with pytest.raises(KeyboardInterrupt):
            sample.run(config)
    (run / "samples.jsonl").unlink(missing_ok=True)
    assert run_directory.is_run(run) and not is_done(run, config, "sample")
    sample.run(config)
    assert is_done(run, config, "sample") and not (run / "more").exists()


def test_a_run_with_damaged_or_missing_outputs_is_not_done(finished):
    directory, drawn, _ = finished
    file = directory / "samples" / "samples.jsonl"
    intact = file.read_bytes()
    file.write_bytes(intact[:-1])
    assert not is_done(directory / "samples", drawn, "sample")
    file.unlink()
    assert not is_done(directory / "samples", drawn, "sample")
    file.write_bytes(intact)
    assert is_done(directory / "samples", drawn, "sample")


def test_the_fingerprint_of_a_model_covers_weights_config_and_tokenizer(finished, tmp_path):
    fingerprint = run_inputs.fingerprint(str(finished[0] / "model"))
    assert fingerprint == run_inputs.fingerprint(write_model(tmp_path / "same"))
    assert fingerprint != run_inputs.fingerprint(write_model(tmp_path / "other", seed=1))
    assert fingerprint != run_inputs.fingerprint(write_model(tmp_path / "words", words=["x"]))
    assert run_inputs.fingerprint("owner/name") == "owner/name"


def test_an_unfinished_run_of_an_older_version_is_refused(finished, tmp_path):
    """Check that it is refused, because its checkpoints have another layout."""
    config = replace(finished[1], output_dir=str(tmp_path / "run"), overwrite_output_dir=False)
    record = {"stage": "sample", "command": [], "arguments": dataclasses.asdict(config), "inputs": {}}
    (tmp_path / "run" / "resume" / "step-2").mkdir(parents=True)
    write_json(tmp_path / "run" / "run.json", record)
    with pytest.raises(RunError, match="an unfinished run of an older version; finish it with that version or pass"):
        sample.run(config)
    sample.run(replace(config, overwrite_output_dir=True))
    assert not (tmp_path / "run" / "resume").exists()


def test_every_stage_is_registered():
    """Check that the decorator registers a stage when its module is imported."""
    stages = {path.stem for path in (ROOT / "exo").glob("*.py")} - {"__init__", "train", "inspect"}
    for name in stages:
        importlib.import_module(f"exo.{name}")
    assert set(run_record.STAGES) == stages


def test_the_directory_of_an_older_version_is_refused_and_its_file_is_read(tmp_path):
    """Check a record of an older version, which does not name the file that the stage made."""
    run = tmp_path / "old"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"stage": "scoring", "command": [], "arguments": {}, "finished": "x"}))
    (run / "scored.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="--data .*old: a run of an older version; name the file in it"):
        run_inputs.source("data", str(run), "score")
    assert run_inputs.source("data", str(run / "scored.jsonl"), "score") == str(run / "scored.jsonl")
    (run / "config.json").write_text("{}")
    assert run_inputs.source("model", str(run), "sft") == str(run), "a model directory may be of any version"


def test_a_finished_run_does_not_offer_to_resume(finished, tmp_path):
    """Check that only an unfinished training run offers --allow_changes."""
    with pytest.raises(RunError) as error:
        sample.run(replace(finished[1], overwrite_output_dir=False, k=3))
    assert "--allow_changes" not in str(error.value)
    directory = tmp_path / "run"
    directory.mkdir()
    config = sft.Config(model=finished[1].model, data=finished[1].data, output_dir=str(directory))
    run_record.write_run(directory, config, "sft", started="now", inputs={})
    (directory / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunError, match="unfinished, with .*; pass --allow_changes to resume nevertheless, or pass"):
        sft.run(replace(config, max_steps=3))
    run_record.update_run(directory, finished="now")
    with pytest.raises(RunError) as error:
        sft.run(replace(config, max_steps=3))
    assert "--allow_changes" not in str(error.value)


def test_a_stage_of_one_process_refuses_several(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="best_of_n: runs in one process; got 2"):
        best_of_n.run(best_of_n.Config(data="x.jsonl", output_dir=str(tmp_path / "run")))


def test_the_fingerprint_of_a_function_covers_its_module_and_its_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "oracle_to_hash.py"
    module.write_text("def reward(prompt, completion):\n    return 0\n")
    first, other = (run_inputs.fingerprint(f"oracle_to_hash:{name}") for name in ("reward", "other"))
    module.write_text("def reward(prompt, completion):\n    return 12\n")
    assert len({first, other, run_inputs.fingerprint("oracle_to_hash:reward")}) == 3


def test_a_command_with_unprintable_characters_is_escaped():
    run = {"command": ["python", "-m", "exo.sft", "--data=a\u2028b"]}
    assert run_record.command(run) == "python -m exo.sft '--data=a\\u2028b'"
