"""No file that is read can run code: no pickles, no modelling code, no YAML objects; and no secret is printed.

The tests of models check that pickled weights and modelling code are refused.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import exo_kernels
from exo import align, judge, models
from tests.tasks import write_model, write_rows

ROOT = Path(exo_kernels.__file__).parents[1]
SOURCES = sorted([*(ROOT / "exo").rglob("*.py"), *(ROOT / "exo_kernels").rglob("*.py")])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_code_from_files(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "marshal", "shelve", "dill", "joblib"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system", "os.popen"), (
                called
            )
            assert not called.endswith(
                (".extractall", ".gather_object", ".broadcast_object_list", ".all_gather_object")
            )
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("shell", "False") == "False" and keywords.get("trust_remote_code", "False") == "False"
            assert keywords.get("weights_only", "True") == "True" and keywords.get("allow_pickle", "False") == "False"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": "red", "chosen": f" good {w}", "rejected": " bad"} for w in ("big", "small", "round", "square")]
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_yaml_builds_no_objects(model_path, data, tmp_path, capsys):
    canary = tmp_path / "canary"
    (tmp_path / "options.yaml").write_text(f"max_steps: !!python/object/apply:os.mkdir ['{canary}']\n")
    with pytest.raises(SystemExit):
        align.main(["--model", model_path, "--data", data, "--config", str(tmp_path / "options.yaml")])
    (error,) = capsys.readouterr().err.splitlines()
    assert "expected no tag; got tag:yaml.org,2002:python/object/apply:os.mkdir" in error and not canary.exists()


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/hostname", "sub/x.safetensors"])
def test_shards_are_files_of_the_model_itself(model_path, tmp_path, shard):
    """Check that an index cannot name files outside the directory of the model."""
    model, tokenizer = models.load(model_path)
    models.save(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "other.safetensors")
    names = dict.fromkeys(model.state_dict(), shard)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match="expected shards beside their index"):
        models.load(str(tmp_path / "model"))


def test_no_secret_is_printed_or_written(model_path, data, tmp_path):
    """Check that tokens and keys of the environment are in no file and in no output of a run."""
    secrets = {"HF_TOKEN": "hf_CANARYCANARYCANARY", "OPENAI_API_KEY": "sk-CANARYCANARY", "MY_SECRET": "CANARY-of-mine"}
    command = [
        sys.executable,
        "-m",
        "exo.align",
        "--model",
        model_path,
        "--data",
        data,
        "--max_steps",
        "2",
        "--device",
        "cpu",
    ]
    command += ["--output_dir", str(tmp_path / "run"), "--batch_size", "2"]
    for options in ([], ["--seed", "9"], ["--nonsense", "1"]):  # the second is refused, and the third is no option
        child = subprocess.run([*command, *options], capture_output=True, env=os.environ | secrets, timeout=120)
        assert b"CANARY" not in child.stdout + child.stderr
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 5 and not any(b"CANARY" in file.read_bytes() for file in files)


def test_a_key_in_the_endpoint_is_refused_and_not_printed(capsys):
    with pytest.raises(SystemExit):
        judge.main(
            [
                "--template",
                "dialogue",
                "--a",
                "x",
                "--b",
                "y",
                "--model",
                "m",
                "--endpoint",
                "http://user:CANARY@host/v1",
            ]
        )
    error = capsys.readouterr().err
    assert "--endpoint: expected" in error and "CANARY" not in error
