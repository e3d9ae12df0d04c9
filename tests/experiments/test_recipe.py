"""The quickstart, shortened: rewards rise, finished steps are not repeated, and an interrupted run resumes."""

import json

import pytest
import torch

from exo import data, train
from exo.runs import stage as run_stage
from tests.tasks import lines

SHORT = (
    "sft.max_steps=150 sample.epochs=4 reward.max_steps=40 align.max_steps=48 align.export_steps=0 "
    "align.rw.export_steps=24 align.learning_rate=3e-4 ppo.max_steps=6 ppo.critic_warmup_steps=2 ppo.export_steps=0 "
    "evaluate.prompts=64 density.prompts=1 density.k=16 best_of_n.n=8"
)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    threads = torch.get_num_threads()
    assert train.main(["--output_dir", str(directory), "--set", SHORT]) == 0
    torch.set_num_threads(threads)
    return directory


def evaluations(directory):
    checkpoints = {}
    for step in json.loads((directory / "run.json").read_text())["plan"]:
        if step["stage"] == "evaluate":
            evaluation = json.loads((directory / step["name"] / "evaluation.json").read_text())
            checkpoints[step["method"]] = evaluation["checkpoints"]
    return checkpoints


def digests(directory):
    return {
        str(path.parent.relative_to(directory)): json.loads(path.read_text())["outputs"]
        for path in directory.rglob("run.json")
        if path.parent != directory
    }


def test_every_method_is_trained_and_evaluated(quickstart):
    checkpoints = evaluations(quickstart)
    assert set(checkpoints) == {"sft", "exo-rw", "dpo-rw", "exo-pref", "dpo-pref", "ppo", "bon"}
    assert [entry["step"] for entry in checkpoints["exo-rw"]] == [24, 48]
    for method in ("exo-pref", "dpo-pref", "bon"):  # the reward model learns too little for the others
        rise = checkpoints[method][-1]["rise"]
        assert rise["mean"] > 3 * rise["standard_error"], method


def test_the_first_losses_have_their_theoretical_values(quickstart):
    first = {name: lines(quickstart / name / "metrics.jsonl")[0]["loss"] for name in
             ("exo-pref/seed0", "dpo-pref/seed0", "dpo-rw/k4-seed0")}  # fmt: skip
    assert first["exo-pref/seed0"] == pytest.approx(2.76123, abs=1e-3)
    assert first["dpo-pref/seed0"] == pytest.approx(0.693147, abs=1e-3)
    assert first["dpo-rw/k4-seed0"] == pytest.approx(1.386294, abs=1e-3)


def test_metrics_include_the_sharpness_of_the_target(quickstart):
    rows = lines(quickstart / "exo-rw" / "k4-seed0" / "metrics.jsonl")
    row = [row for row in rows if "loss" in row][-1]
    assert 0 <= row["target/entropy"] <= 1.3863 and 1 <= row["target/ess"] <= 4
    assert 0 <= row["rewards/stuck"] <= 1 and row["clipped"] in (0, 1)


def test_held_out_prompts_are_not_trained_on(quickstart):
    names = {name: {g.prompt for g in data.read(quickstart / "data" / f"{name}.jsonl", purpose="prompts").examples}
             for name in ("prompts", "test")}  # fmt: skip
    assert names["prompts"].isdisjoint(names["test"])


def test_the_same_command_reruns_only_the_report(quickstart, capsys):
    previous = digests(quickstart)
    assert train.main(["--output_dir", str(quickstart), "--set", SHORT]) == 0
    record = json.loads((quickstart / "run.json").read_text())
    assert record["steps_run"] == 1 and capsys.readouterr().out.count("up to date") == len(record["plan"]) - 1
    current = digests(quickstart)
    assert {name: current[name] for name in previous if name != "report"} == {
        n: b for n, b in previous.items() if n != "report"
    }


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_artifacts(quickstart, tmp_path, monkeypatch):
    """Stop between stages, and once within a stage, whose partial directory is then replaced."""
    arguments = ["--output_dir", str(tmp_path / "run"), "--set", SHORT, "--methods", "exo-pref"]
    assert train.main([*arguments, "--to", "samples"]) == 0
    finish = run_stage.finish

    def interrupted_finish(directory, **facts):
        if directory.name == "labelled":
            raise KeyboardInterrupt
        finish(directory, **facts)

    monkeypatch.setattr(run_stage, "finish", interrupted_finish)
    assert train.main([*arguments, "--to", "labelled"]) == 130
    monkeypatch.undo()
    assert train.main([*arguments, "--to", "exo-pref"]) == 0
    undisturbed, resumed = digests(quickstart), digests(tmp_path / "run")
    assert {"data", "sft", "samples", "labelled", "exo-pref/seed0"} <= set(resumed)
    for name, outputs in resumed.items():
        assert outputs == undisturbed[name], name


@pytest.mark.slow
def test_two_jobs_make_the_same_artifacts(quickstart, tmp_path):
    arguments = ["--output_dir", str(tmp_path / "run"), "--set", SHORT, "--methods", "exo-pref,dpo-pref", "--jobs", "2"]
    assert train.main(arguments) == 0
    sequential, parallel = digests(quickstart), digests(tmp_path / "run")
    for name in ("sft", "samples", "exo-pref/seed0", "dpo-pref/seed0", "evaluation/exo-pref/seed0"):
        assert parallel[name] == sequential[name], name


def test_a_directory_that_no_run_wrote_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert train.main(["--output_dir", str(tmp_path)]) == 1
    assert "holds files that no run wrote" in capsys.readouterr().err


def test_data_without_a_model_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", "rows.jsonl"])
    assert stop.value.code == 2 and "--model: expected a directory, a hub name, or tiny" in capsys.readouterr().err


def test_the_quickstart_refuses_options_of_alignment(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--learning-rate", "1e-3"])
    assert stop.value.code == 2 and "--model: expected" in capsys.readouterr().err
