"""Options: flags, YAML files below flags, dashes, suggestions and ranges; every error is one line, exit code 2."""

import pytest

from exo import align, train
from exo.cli.parse import as_flags, command_line, parse

BASE = ["--model", "tiny", "--data", "rows.jsonl"]


def config(*argv: str) -> align.Config:
    return parse(align.Config, [*BASE, *argv], prog="test", description=None)


def test_dashes_and_underscores_are_the_same():
    assert config("--learning-rate", "1e-3") == config("--learning_rate=1e-3")


def test_types_follow_the_fields():
    read = config(
        "--dropout", "--max_steps", "7", "--max_completion_length", "9", "--save_steps=2", "--dtype", "float16"
    )
    assert read.dropout is True and read.max_steps == 7 and read.max_completion_length == 9
    assert (read.save_steps, read.dtype) == (2, "float16")
    assert config("--dropout", "false").dropout is False
    assert config("--max_completion_length=none").max_completion_length is None


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 2.0e-4\nbeta_pi: 0.3\nref_model: null\ndropout: true\n")
    read = config("--config", str(file), "--beta-pi", "0.7")
    assert (read.learning_rate, read.beta_pi, read.ref_model, read.dropout) == (2e-4, 0.7, None, True)


@pytest.mark.parametrize(("loss", "eps"), [("exo", 1e-3), ("dpo", 0.0)])
def test_label_smoothing_default_follows_the_loss(loss, eps):
    assert config("--loss", loss).label_smoothing == eps


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "did you mean learning_rate?"),
        (["--checkpoint-steps", "5"], "unknown option --checkpoint_steps; it is called save_steps since 0.2"),
        (["--learning_rate", "-1"], "--learning_rate: expected a finite number > 0; got -1.0"),
        (["--beta_pi", "nan"], "--beta_pi: expected a finite number > 0; got nan"),
        (["--loss", "ipo"], "invalid choice: 'ipo'"),
        (["--label_smoothing", "0"], "--label_smoothing: expected in (0, 1) for exo; got 0.0"),
        (["--batch_size", "many"], "invalid int value: 'many'"),
        (["--dropout", "perhaps"], "expected true or false"),
        (["--eval_fraction", "1"], "--eval_fraction: expected in [0, 1); got 1.0"),
        (["--max_steps", "0"], "--max_steps: expected >= 1, or -1; got 0"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_errors_are_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        config(*argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betapi: 1", "unknown option 'betapi'; did you mean beta_pi?"),
        ("checkpoint_steps: 5", "unknown option 'checkpoint_steps'; it is called save_steps since 0.2"),
        ("- 1", "expected a mapping"),
        ("beta_pi: [1]", "beta_pi: expected one value"),
        ("!!python/object/apply:os.getcwd []", "expected no tag; got tag:yaml.org,2002:python/object/apply:os.getcwd"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_bad_files_are_one_line(text, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        config("--config", str(file))
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize("given", ["in a flag", "in a file", "not"])
def test_a_note_explains_the_new_meaning_of_save_steps(given, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("save_steps: 5")
    options = {"in a flag": ["--save_steps=5"], "in a file": ["--config", str(tmp_path / "run.yaml")], "not": []}
    config(*options[given])
    note = "--save_steps saves resumable checkpoints since 0.2; --export_steps writes loadable models"
    assert (note in capsys.readouterr().out) == (given != "not")


def test_missing_required_options_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(align.Config, ["--model", "tiny"], prog="test", description=None)
    assert stop.value.code == 2 and "--data: expected a file" in capsys.readouterr().err


def test_the_driver_reads_the_option_files_of_alignment(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("model: tiny\ndata: absent.jsonl\n")
    assert train.main(["--config", str(file), "--output_dir", str(tmp_path / "run")]) == 2
    assert "absent.jsonl: no such file" in capsys.readouterr().err
    file.write_text("recipe: absent\nmodel: tiny\n")
    assert train.main(["--config", str(file), "--output_dir", str(tmp_path / "run")]) == 2
    assert "--recipe absent: expected one of" in capsys.readouterr().err


def test_flags_are_the_options_that_differ_from_their_defaults():
    options = config("--learning_rate=1e-3", "--max_completion_length=9", "--overwrite_output_dir")
    flags = ["--output_dir=runs/align", "--model=tiny", "--data=rows.jsonl", "--learning_rate=0.001"]
    flags += ["--label_smoothing=0.001"]  # resolved from --loss
    assert sorted(as_flags(options)) == sorted([*flags, "--max_completion_length=9"])
    assert command_line(options) == [*as_flags(options), "--overwrite_output_dir"]
    assert parse(align.Config, command_line(options), prog="test", description=None) == options
    assert command_line(config()) == as_flags(config())
