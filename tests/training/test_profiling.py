"""`--profile` accounts for all of the time of a step and does not change the run."""

import json

import pytest
import torch

from exo import align
from exo.training import profiler, step
from tests.tasks import PROMPTS, lines, reward, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def aligned(tmp_path, name, *options):
    texts = [" good good", " bad small", " red"]
    rows = [{"prompt": p, "completions": texts, "rewards": [reward(p, t) for t in texts]} for p in PROMPTS * 3]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = write_model(tmp_path / "model", scale=2.0)
    arguments = ["--model", model, "--data", data, "--output_dir", str(tmp_path / name), "--max_steps", "6"]
    assert align.main([*arguments, "--batch_size", "6", "--device", "cpu", *options]) == 0
    return tmp_path / name


def test_a_profile_is_printed_and_does_not_change_the_run(tmp_path, capsys):
    plain = aligned(tmp_path, "plain")
    assert "where a step's time goes" not in capsys.readouterr().out
    profiled = aligned(tmp_path, "profiled", "--profile", "3")
    output = capsys.readouterr().out
    assert "where a step's time goes (3 steps" in output and "tokens/s" in output and "of a matrix product's" in output
    shares = {line.split("%")[0].rsplit(maxsplit=1)[0].strip(): float(line.split("%")[0].split()[-1])
              for line in output.splitlines() if line.startswith("    ") and "%  " in line}  # fmt: skip
    assert {"data", "body", "head and loss", "optimizer"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    names = {event.get("name") for event in json.loads((profiled / "profile/trace.json").read_text())["traceEvents"]}
    assert {"body", "head and loss", "data", "optimizer"} <= names
    assert (plain / "model.safetensors").read_bytes() == (profiled / "model.safetensors").read_bytes()
    assert len(lines(profiled / "metrics.jsonl")) == len(lines(plain / "metrics.jsonl"))


def test_a_run_shorter_than_its_profile_prints_the_steps_it_has(tmp_path, capsys):
    aligned(tmp_path, "run", "--profile", "99")
    assert "where a step's time goes (4 steps" in capsys.readouterr().out
    assert profiler._now is None


def test_activation_memory_excludes_the_parameters(capsys):
    layer = torch.nn.Linear(16, 16, bias=False)
    x = torch.randn(2**16, 16, requires_grad=True)
    with profiler.activations(layer, 7):
        layer(x).relu().sum()
    assert "activations: 8 MiB for a micro-batch of 7 tokens" in capsys.readouterr().out


def test_a_failed_run_stops_its_profiler(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "update", lambda *a: (_ for _ in ()).throw(RuntimeError) if a[4] == 4 else 0.0)
    with pytest.raises(RuntimeError):
        aligned(tmp_path, "run", "--profile", "3")
    assert profiler._now is None
