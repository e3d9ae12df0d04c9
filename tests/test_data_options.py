"""What the stages do with --data: several files, splits and options, their records and their errors."""

import pytest
from data_files import GOOD, put

from exo import lineage, sft
from exo.artifacts import RunError


def test_the_record_knows_the_content_of_every_file(tmp_path):
    a, b = (put(tmp_path, [{**GOOD, "prompt": name}], f"{name}.jsonl") for name in "ab")
    both = f"{a},{b}"
    assert lineage.source("data", both, "prepare") == both
    before = lineage.fingerprint(both)
    assert before != lineage.fingerprint(f"{b},{a}") and before != both
    put(tmp_path, [GOOD], "b.jsonl")
    assert lineage.fingerprint(both) != before
    with pytest.raises(ValueError, match="--data .*c.jsonl: no such file or directory"):
        lineage.source("data", f"{a},{tmp_path}/c.jsonl", "prepare")


def test_the_record_knows_the_content_of_a_split(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        put(tmp_path / "set", [GOOD], f"{name}.jsonl")
    split = f"{tmp_path}/set@test"
    assert lineage.source("data", split) == split
    before = lineage.fingerprint(split)
    put(tmp_path / "set", [GOOD, GOOD], "test.jsonl")
    assert lineage.fingerprint(split) != before


def test_a_run_does_not_write_into_any_directory_that_it_reads(tmp_path):
    a = put(tmp_path, [GOOD], "a.jsonl")
    (tmp_path / "out").mkdir()
    inside = put(tmp_path / "out", [GOOD], "b.jsonl")
    with pytest.raises(RunError, match="which this run reads"):
        sft.run(sft.Config(model="tiny", data=f"{a},{inside}", output_dir=str(tmp_path / "out")))


def test_stages_have_the_options_of_data_and_hand_them_on(tmp_path, capsys):
    path = put(tmp_path, [{"ask": "p q", "say": "c", "thoughts": f"x y {i}"} for i in range(2)])
    begin = ["--model", "tiny", "--data", str(path), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert sft.main([*begin, "--columns", "prompt=ask,completion=say"]) == 2
    assert "column 'thoughts'" in capsys.readouterr().err
    assert sft.main([*begin, "--columns", "prompt=ask,completion=say", "--ignore-columns", "all"]) == 0
    assert "columns not used: thoughts" in capsys.readouterr().out
