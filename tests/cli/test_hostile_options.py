"""Hostile command lines, YAML files, recipes and records: one line that names the place, exit code 2, no traceback."""

import dataclasses
import importlib
import json

import pytest

from exo import align, score, train
from exo.cli import yaml_files
from exo.cli.errors import ConfigError, RunError
from exo.cli.parse import parse
from exo.data import DataError
from exo.evaluation.judge_prompts import AnswerCache
from exo.experiments import plan as experiment_plan
from exo.experiments import recipe as experiment_recipe
from exo.reporting import reading
from exo.runs import directory as run_directory
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.runs.jsonl import JsonlCache

STAGES = "prepare sft sample score reward align ppo best_of_n evaluate judge label report train".split()
FAST = ("prepare", "sample", "align", "judge", "report", "train")  # the other stages share their options
BASE = ["--model", "tiny", "--data", "rows.jsonl"]


def refused(argv, capsys, stage=align):
    """Return the one line that the parser prints before it exits."""
    with pytest.raises(SystemExit) as stop:
        parse(stage.Config, argv, prog="test", description=None)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and len(printed.splitlines()) == 1 and len(printed) < 700
    return printed


HOSTILE = ["", " ", "\0", "a\nb", "a\x85b", "x" * 5000, "nan", "-inf", "1e300", "1e-320", "9" * 30, "9" * 5000, "٣",
           "-", "..", "[1", "\udc80", "📈", "%s", "1_000"]  # fmt: skip


@pytest.mark.parametrize("stage", [s if s in FAST else pytest.param(s, marks=pytest.mark.slow) for s in STAGES])
def test_every_option_accepts_a_hostile_value_or_refuses_it_in_one_line(stage, capsys):
    module = importlib.import_module(f"exo.{stage}")
    for field in dataclasses.fields(module.Config):
        for value in HOSTILE:
            try:
                parse(module.Config, [f"--{field.name.rstrip('_')}={value}"], prog="test", description=None)
            except SystemExit as stop:
                printed = capsys.readouterr().err
                assert stop.code == 2 and len(printed.splitlines()) == 1 and len(printed) < 700, (field.name, value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--beta_pi=1e300", "--beta_pi: expected a number that fp32 holds"),
        ("--temperature=1e-320", "--temperature: expected a number that fp32 holds"),
        (f"--batch_size={10**30}", "--batch_size: expected a 64-bit integer"),
        ("--output_dir=", "--output_dir: expected a directory"),
        ("--output_dir=a\nb", "--output_dir: expected text without control characters"),
        ("--data= ", "--data: expected a file of preferences or scored completions"),
        ("--max_steps=" + "9" * 5000, "--max_steps: invalid int value"),
    ],
)
def test_unusable_values_are_refused(option, expected, capsys):
    assert expected in refused([*BASE, option], capsys)


YAML = {
    "an-unclosed-bracket": ("data: [1", "line 1, column"),
    "brackets": ("data: " + "[" * 20_000, "nested too deeply"),
    "a-long-number": ("max_steps: " + "9" * 5000, "--max_steps: invalid int value"),
    "twice": ("seed: 1\nseed: 2", "line 2, column 1: key 'seed' appears twice"),
    "twice-with-dashes": ("max-steps: 1\nmax_steps: 2", "given twice"),
    "an-alias-bomb": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 40)),
                      "at most"),
    "itself": ("a: &a [*a]", "an alias contains itself"),
    "a-tag": ("seed: !!int x", "expected no tag"),
    "a-list-as-key": ("? [a]\n: 1", "expected a text as key"),
    "a-tab": ("\tseed: 1", "cannot start any token"),
    "a-control-character": ('output_dir: "a\\0b"', "text without control characters"),
    "two-documents": ("seed: 1\n---\nseed: 2", "expected a single document"),
    "nothing": ("", "expected a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_hostile_option_files(name, tmp_path, capsys):
    text, expected = YAML[name]
    (tmp_path / "options.yaml").write_text(text)
    assert expected in refused([*BASE, "--config", str(tmp_path / "options.yaml")], capsys)


def test_unreadable_option_files(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name, expected in (("binary", "expected UTF-8"), (".", "Is a directory"), ("absent", "No such file")):
        assert expected in refused([*BASE, "--config", str(tmp_path / name)], capsys)
    assert "expected at most" in refused([*BASE, "--config", "/dev/zero"], capsys)
    assert "expected one file" in refused([*BASE, "--config", "a.yaml", "--config", "b.yaml"], capsys)


def test_yaml_scalars_are_read_as_in_yaml_1_2():
    """Check values that YAML 1.1 reads as 8, 90, False, a date and a text."""
    text = "a: 010\nb: 1:30\nc: no\nd: 2024-01-01\ne: 1e-3\nf: '1'\ng: null\nh: true\ni: -2\nj: .5"
    values = yaml_files.parse(text, typed=True)
    expected = {"a": 10, "b": "1:30", "c": "no", "d": "2024-01-01", "e": 1e-3, "f": "1", "g": None, "h": True, "i": -2}
    assert values == expected | {"j": 0.5}
    assert yaml_files.parse(text, typed=False)["a"] == "010"
    assert yaml_files.parse("\ufeffa: &x [1]\nb: *x", typed=True) == {"a": [1], "b": [1]}


RECIPES = [
    ("title", None), ("title", 5), ("title", []), ("task", ["quickstart"]), ("source", 3), ("model", {}), ("oracle", 1),
    ("methods", "ppo"), ("methods", [1]), ("methods", {"ppo": 1}), ("methods", [["ppo"]]), ("methods", None),
    ("group_sizes", 4), ("group_sizes", ["4"]), ("group_sizes", [1]), ("group_sizes", [True]), ("group_sizes", [2.0]),
    ("seeds", 0), ("seeds", [-1]), ("seeds", [2**32]), ("seeds", ["0"]), ("seeds", []), ("seeds", [None]),
    ("sweep", []), ("sweep", {"beta_pi": 0.1}), ("sweep", {"beta_pi": []}), ("sweep", {"beta_pi": ["x"]}),
    ("sweep", {"beta_pi": [None]}), ("sweep", {"beta_pi": [[1]]}), ("sweep", {"seed": [1]}), ("sweep", {"model": [1]}),
    ("threads", 0), ("threads", "2"), ("threads", 1.5), ("common", []), ("common", {"seed": [1]}),
    ("common", {"output_dir": "x"}), ("common", {"overwrite_output_dir": True}), ("stages", []),
    ("stages", {"sft": None}),
    ("stages", {"sft": 5}), ("stages", {"sft": {"max_steps": [1]}}), ("stages", {"sft": {"max_steps": {}}}),
    ("stages", {"best_of_n": {"n": "x"}}), ("stages", {"best_of_n": {"n": None}}), ("stages", {"align": {"seed": 3}}),
    ("stages", {"evaluate": {"max_length": "x"}}), ("stages", {"evaluate": {"max_length": 2}}),
    ("stages", {"bon": {"k": 3}}), ("stages", {"align.rw": {"max_completions": 2}}), ("full", []), ("full", None),
    ("notes", 3),
]  # fmt: skip


def test_recipes_with_wrong_types(tmp_path):
    text = (experiment_recipe.RECIPES / "quickstart.yaml").read_text(encoding="utf-8")
    values = yaml_files.parse(text, typed=True)
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(values))
    assert experiment_plan.plan(experiment_recipe.load(str(path)), tmp_path)  # JSON is YAML
    for name, value in RECIPES:
        path.write_text(json.dumps(values | {name: value}))
        with pytest.raises(ConfigError) as caught:
            experiment_plan.plan(experiment_recipe.load(str(path)), tmp_path)
        assert len(str(caught.value).splitlines()) == 1, (name, value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("sft.max_steps=[1", "--set sft.max_steps=[1: line 1"),
        ("sft.max_steps=" + "[" * 20_000, "nested too deeply"),
        ("sft.max_steps=" + "9" * 5000, "sft: --max_steps: invalid int value"),
        ("common.output_dir=x", "common: output_dir is set by the plan"),
        ("align.seed=3", "align: seed is set by the plan"),
        ("sft.max_steps=1 sft.max_steps=2", "--set: expected each option once"),
        ("a=[1", "--set: expected stage.option=value"),
        (".x=1", "--set: expected stage.option=value"),
    ],
)
def test_hostile_settings(arguments, expected, tmp_path, capsys):
    assert train.main(["--dry_run", "--output_dir", str(tmp_path / "run"), "--set", arguments]) == 2
    printed = capsys.readouterr().err
    assert expected in printed and len(printed.splitlines()) == 1 and len(printed) < 700


@pytest.mark.parametrize("module", ["..", ".", "a..b", "..x", "\udc80", "x" * 200, " ", "json"])
def test_the_fingerprint_of_an_invalid_oracle(module, tmp_path):
    """Check that an invalid module name raises no error when its source is searched."""
    assert isinstance(run_inputs.fingerprint(f"{module}:x"), str)


@pytest.mark.parametrize("oracle", ["..:x", ".:x", ".module:f"])
def test_an_oracle_by_a_relative_name_is_refused(oracle, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completions": ["a", "b"]}\n')
    options = ["--data", str(tmp_path / "rows.jsonl"), "--oracle", oracle, "--output_dir", str(tmp_path / "run")]
    assert score.main(options) == 2
    assert capsys.readouterr().err == (
        f"error: --oracle {oracle}: expected a module's full name, as in package.module:function\n"
    )


INVALID_RECORDS = [
    "", "[", "[]", "null", "5", "[" * 100_000, '{"stage": 1e999}', "\udc80", "9" * 5000,
    *(
        json.dumps({"stage": "align", "command": ["x"], "arguments": {}} | change)
        for change in (
            {"stage": ["align"]}, {"stage": "a\nb"}, {"command": "x"}, {"command": [1]}, {"arguments": []},
            {"inputs": []}, {"outputs": {"/etc/passwd": "x"}}, {"outputs": {"../x": "y"}}, {"outputs": {"a": 1}},
            {"finished": 5}, {"again": "x"}, {"resume_request": []},
        )
    ),
]  # fmt: skip


def test_invalid_records_are_no_runs(tmp_path):
    for text in INVALID_RECORDS:
        (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
        assert run_record.record(tmp_path) is None, text[:80]
        with pytest.raises(RunError, match="holds files that no run wrote"):
            run_directory.check(str(tmp_path), overwrite=True)
    unknown = {"stage": "unknown", "command": [], "arguments": {}, "finished": "now", "outputs": {}}
    (tmp_path / "run.json").write_text(json.dumps(unknown))
    assert run_record.record(tmp_path) is None


def test_a_finished_run_without_outputs_is_not_done(tmp_path):
    config = align.Config(model="tiny", data="rows.jsonl", output_dir=str(tmp_path))
    run = {"stage": "align", "command": [], "arguments": dataclasses.asdict(config), "finished": "now", "inputs": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert run_stage.status(tmp_path, config, "align")[0] != "done"


def test_invalid_results_are_refused_in_one_line(tmp_path):
    run = {"stage": "train", "command": [], "arguments": {}, "recipe": {}, "plan": []}
    for plan in (5, None, [1], [{}], [{"stage": "align"}], {"a": 1}, [{"stage": "sft", "name": 3}]):
        (tmp_path / "run.json").write_text(json.dumps(run | {"plan": plan}))
        with pytest.raises(ValueError) as caught:
            reading.read(tmp_path)
        assert len(str(caught.value).splitlines()) == 1, plan
    path = tmp_path / "evaluation.json"
    for text in ("[]", "[" * 100_000, "5", "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match="evaluation.json: expected"):
            reading.load_json(path)


@pytest.mark.parametrize(
    "line",
    ['{"key": [], "answer": "A"}', '{"key": "k", "answer": 5}', '{"key": {}, "answer": null}', "[" * 100_000, "5"],
)
def test_invalid_lines_in_a_cache_of_verdicts(line, tmp_path):
    JsonlCache(tmp_path / "cache").put("k", "A")
    with open(tmp_path / "cache", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"cache:2: not a line of a cache of verdicts"):
        AnswerCache(tmp_path / "cache")
