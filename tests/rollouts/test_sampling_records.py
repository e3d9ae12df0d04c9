"""Samples record how they were drawn; align and evaluate refuse or warn about samples that do not fit."""

import json

import pytest

from exo import align, evaluate, models, sample, score
from exo.cli import console
from tests.tasks import PROMPTS, lines, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def reset_warnings(monkeypatch):
    """Reset the printed warnings, which are printed once per process."""
    monkeypatch.setattr(console, "_warned", set())


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Return (directory, sampling model, file of scored samples drawn at temperature 0.4)."""
    directory = tmp_path_factory.mktemp("records")
    model = write_model(directory / "model", scale=2.0)
    prompts = write_rows(directory / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS * 2])
    options = {"model": model, "data": prompts, "k": 4, "max_new_tokens": 5, "temperature": 0.4}
    drawn = sample.run(sample.Config(output_dir=str(directory / "drawn"), **options))
    run = score.run(score.Config(data=str(drawn), oracle="tests.tasks:length", output_dir=str(directory / "scored")))
    return directory, model, run / "scored.jsonl"


def run_align(scored, tmp_path, path, *more):
    arguments = ["--model", scored[1], "--data", str(path), "--max_steps", "1", "--device", "cpu", *more]
    return align.main([*arguments, "--output_dir", str(tmp_path / "run")])


def change_rows(scored, tmp_path, **values):
    """Write the scored rows with changed values, where None removes the entry; return the file."""
    rows = [{k: v for k, v in (row | values).items() if v is not None} for row in lines(scored[2])]
    return write_rows(tmp_path / "changed.jsonl", rows)


def test_every_row_records_its_sampling_settings(scored):
    for row in lines(scored[2]):
        assert (row["temperature"], row["top_p"], row["max_new_tokens"]) == (0.4, 1.0, 5)


def test_samples_of_another_temperature_are_refused_in_one_line(scored, tmp_path, capsys):
    assert run_align(scored, tmp_path, scored[2]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--data" in error and "expected samples drawn at --temperature 1; these were drawn at 0.4" in error
    assert not (tmp_path / "run").exists()
    assert run_align(scored, tmp_path, scored[2], "--temperature", "0.4") == 0


def test_samples_without_a_temperature_or_with_top_p_give_a_warning(scored, tmp_path, capsys, reset_warnings):
    without_settings = change_rows(scored, tmp_path, temperature=None, top_p=None)
    assert run_align(scored, tmp_path, without_settings, "--temperature", "0.4") == 0
    out = capsys.readouterr().out
    assert out.count("the samples do not record their temperature; it must be --temperature 0.4") == 1
    truncated = change_rows(scored, tmp_path, top_p=0.9)
    assert run_align(scored, tmp_path, truncated, "--temperature", "0.4", "--overwrite_output_dir") == 0
    assert "were drawn with top_p 0.9, so they are not of the full distribution" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["hot", 0, -1.0, True, [1.0]])
def test_an_invalid_temperature_is_refused_with_its_line(scored, tmp_path, capsys, bad):
    assert run_align(scored, tmp_path, change_rows(scored, tmp_path, temperature=bad)) == 2
    assert "changed.jsonl:1: temperature must be" in capsys.readouterr().err


def test_samples_of_another_policy_than_the_reference_give_a_warning(scored, tmp_path, capsys, reset_warnings):
    """Check this with --ref_model; samples of the reference itself give no warning."""
    other = write_model(tmp_path / "other", seed=5, scale=2.0)
    temperature = ("--temperature", "0.4")
    assert run_align(scored, tmp_path, scored[2], *temperature) == 0
    assert "another policy" not in capsys.readouterr().out
    assert run_align(scored, tmp_path, scored[2], *temperature, "--ref_model", other, "--overwrite_output_dir") == 0
    assert capsys.readouterr().out.count("drawn by another policy than the reference: their log-probs differ by") == 1


def test_the_density_ratio_requires_samples_of_its_temperature(scored, tmp_path, capsys):
    arguments = ["--model", scored[1], "--reference", scored[1], "--data", str(scored[0] / "prompts.jsonl")]
    arguments += ["--oracle", "tests.tasks:reward", "--max_new_tokens", "5", "--max_length", "16", "--device", "cpu"]
    arguments += ["--density", str(scored[2]), "--output_dir", str(tmp_path / "x")]
    assert evaluate.main(arguments) == 2
    assert "--density" in (error := capsys.readouterr().err) and "these were drawn at 0.4" in error
    assert evaluate.main([*arguments, "--temperature", "0.4"]) == 0
    settings = json.loads((tmp_path / "x" / "evaluation.json").read_text())
    assert settings["temperature"] == 0.4


def test_nonfinite_logits_are_a_one_line_error_and_leave_no_file(scored, tmp_path, capsys):
    model, tokenizer = models.load(scored[1])
    model.model.norm.weight.data.fill_(3e38)  # finite, because NaN weights are refused on loading
    models.save(model, tokenizer, tmp_path / "broken")
    prompts, broken = str(scored[0] / "prompts.jsonl"), str(tmp_path / "broken")
    options = ["--data", prompts, "--device", "cpu", "--max_new_tokens", "4"]
    evaluate_options = [*options, "--oracle", "tests.tasks:reward", "--max_length", "16"]
    for stage, arguments, message in (
        (sample, ["--model", broken, *options], "expected finite logits; got NaN after prompt 1"),
        (evaluate, ["--model", broken, "--reference", scored[1], *evaluate_options], "got NaN after prompt 1"),
        (
            evaluate,
            ["--model", scored[1], "--reference", broken, *evaluate_options],
            "log-probs; got NaN or inf in row",
        ),
    ):
        assert stage.main([*arguments, "--output_dir", str(tmp_path / "run"), "--overwrite_output_dir"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"model {broken}: expected finite" in line and message in line
        assert not [file for file in (tmp_path / "run").rglob("*.json*") if "NaN" in file.read_text()]
