"""The quickstart, shortened: it runs offline, its reward rises, and what it prints and writes is what it measured."""

import json

import pytest

from exo import artifacts, train
from exo.quickstart import recipe


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    assert train.main(["--output_dir", str(directory), "--sft_steps", "60", "--align_steps", "16"]) == 0
    return directory


def test_the_reward_rises(quickstart):
    rise = json.loads((quickstart / "results.json").read_text())["rise"]
    assert rise["mean"] > 3 * rise["standard_error"]


def test_the_files_of_each_stage_are_there(quickstart):
    for name in ("sft.jsonl", "sft/model.safetensors", "scored.jsonl", "exo/model.safetensors", "quickstart.png"):
        assert (quickstart / name).stat().st_size > 0
    first = json.loads((quickstart / "scored.jsonl").read_text().splitlines()[0])
    assert len(first["completions"]) == len(first["rewards"]) == recipe.K


def test_only_an_earlier_quickstart_is_replaced(quickstart, tmp_path, capsys):
    assert artifacts.is_run(quickstart, "train")
    assert not artifacts.is_run(quickstart / "exo", "train")
    (tmp_path / "notes.txt").write_text("mine")
    assert train.main(["--output_dir", str(tmp_path)]) == 1
    assert "holds files that no run wrote" in capsys.readouterr().err


def test_data_without_a_model_says_what_is_missing(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", "rows.jsonl"])
    assert stop.value.code == 2 and "--model: expected a directory, a hub name, or tiny" in capsys.readouterr().err


def test_an_option_of_alignment_alone_is_not_the_quickstarts(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--learning-rate", "1e-3"])
    assert stop.value.code == 2 and "--model: expected" in capsys.readouterr().err
