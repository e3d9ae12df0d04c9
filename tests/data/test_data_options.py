"""The data options of the stages: several files, splits, run records and errors."""

import pytest
from data_files import GOOD, put

from exo import prepare, sft
from exo.cli.errors import ConfigError, RunError
from exo.cli.parse import parse
from exo.data import DataError, read
from exo.evaluation import answers
from exo.runs import inputs as run_inputs


def test_the_fingerprint_covers_the_content_of_every_file(tmp_path):
    a, b = (put(tmp_path, [{**GOOD, "prompt": name}], f"{name}.jsonl") for name in "ab")
    both = f"{a},{b}"
    assert run_inputs.source("data", both, "prepare") == both
    previous = run_inputs.fingerprint(both)
    assert previous != run_inputs.fingerprint(f"{b},{a}") and previous != both
    put(tmp_path, [GOOD], "b.jsonl")
    assert run_inputs.fingerprint(both) != previous
    with pytest.raises(ValueError, match="--data .*c.jsonl: no such file or directory"):
        run_inputs.source("data", f"{a},{tmp_path}/c.jsonl", "prepare")


def test_the_fingerprint_covers_the_content_of_a_split(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        put(tmp_path / "set", [GOOD], f"{name}.jsonl")
    split = f"{tmp_path}/set@test"
    assert run_inputs.source("data", split) == split
    previous = run_inputs.fingerprint(split)
    put(tmp_path / "set", [GOOD, GOOD], "test.jsonl")
    assert run_inputs.fingerprint(split) != previous


def test_a_run_does_not_write_into_any_directory_that_it_reads(tmp_path):
    a = put(tmp_path, [GOOD], "a.jsonl")
    (tmp_path / "out").mkdir()
    inside = put(tmp_path / "out", [GOOD], "b.jsonl")
    with pytest.raises(RunError, match="which this run reads"):
        sft.run(sft.Config(model="tiny", data=f"{a},{inside}", output_dir=str(tmp_path / "out")))


def test_stages_pass_the_data_options_to_the_reader(tmp_path, capsys):
    path = put(tmp_path, [{"ask": "p q", "say": "c", "thoughts": f"x y {i}"} for i in range(2)])
    begin = ["--model", "tiny", "--data", str(path), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert sft.main([*begin, "--columns", "prompt=ask,completion=say"]) == 2
    assert "column 'thoughts'" in capsys.readouterr().err
    assert sft.main([*begin, "--columns", "prompt=ask,completion=say", "--ignore-columns", "all"]) == 0
    assert "columns not used: thoughts" in capsys.readouterr().out


def test_prepare_passes_the_data_options_to_its_source(tmp_path):
    rows = [{"ask": f"p {i}", "chosen": "a", "rejected": "b", "thoughts": f"x y {i}"} for i in range(4)]
    path = put(tmp_path, rows)
    options = {"task": "preferences", "source": str(path), "columns": "prompt=ask", "output_dir": str(tmp_path / "run")}
    with pytest.raises(DataError, match="column 'thoughts'"):
        prepare.run(prepare.Config(**options))
    made = prepare.run(prepare.Config(**options, ignore_columns="thoughts"))
    assert read(made / "pairs.jsonl").examples[0].prompt.startswith("p ")


def test_prepare_has_no_data_weights(capsys):
    for flags in (["--help"], ["--data_weights", "1"]):
        with pytest.raises(SystemExit):
            parse(prepare.Config, flags, prog="test", description=None)
    captured = capsys.readouterr()
    assert "--columns" in captured.out and "data_weights" not in captured.out
    assert "unknown option --data_weights" in captured.err


def test_blanks_around_the_names_of_columns_are_ignored():
    options = sft.Config(
        model="tiny", data="x", columns="prompt = q, completion =b ", ignore_columns=" a, b", data_weights="1, 2"
    )
    assert options.reading()["columns"] == {"prompt": "q", "completion": "b"}
    assert options.reading()["ignore_columns"] == ["a", "b"]
    assert options.mixing() == {"weights": [1.0, 2.0], "seed": 0}
    for wrong in ("prompt= ", " =q", "prompt=a, prompt=b", "prompt=a,", "prompt=a=b", " ", ""):
        with pytest.raises(ConfigError, match="--columns: expected name=column"):
            sft.Config(model="tiny", data="x", columns=wrong)


def test_answers_to_compare_may_have_any_column(tmp_path):
    rows = [{"prompt": f"p {i}", "completion": "a", "reference_answer": f"x y {i}"} for i in range(2)]
    assert len(answers.read(str(put(tmp_path, rows)))) == 2
