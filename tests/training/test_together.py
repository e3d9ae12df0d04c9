"""Runs with combined settings match the plain run.

The settings are shared prompts, cached or live references, LoRA, gradient checkpointing, small micro-batches and two
ranks. Every pair of values occurs in some row, and each run must report that its settings took effect.
"""

import json
import os
import subprocess
import sys
from itertools import combinations

import pytest

from exo import align
from tests import rank_worker
from tests.tasks import PROMPTS, WORDS, lines, reward, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft")

NAMES = ("share_prompt", "reference", "lora_r", "gradient_checkpointing", "max_tokens_per_batch", "ranks")
PLAIN = ("off", "cache", 0, False, 8192, 1)
OTHER = ("on", "live", 4, True, 48, 2)
# 1: the value of OTHER, 0: of PLAIN
ROWS = ["111110", "110001", "101010", "011101", "100111", "001011", "010110", "000000", "001101"]


def test_rows_cover_every_pair_of_settings():
    for a, b in combinations(range(len(NAMES)), 2):
        assert {(row[a], row[b]) for row in ROWS} == {("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")}, (
            NAMES[a],
            NAMES[b],
        )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("together")
    rows = []
    for i, prompt in enumerate(PROMPTS * 3):
        texts = [f" {WORDS[i % 5]} good", " good good small", f" bad {WORDS[(i + 2) % 5]}", " big"][: 2 + i % 3]
        row = {"prompt": f"red green blue round {prompt} {WORDS[i % 7]}", "completions": texts}
        rows.append(row | {"rewards": [reward("", text) for text in texts]})
    return write_model(directory / "model", scale=2.0), write_rows(directory / "rows.jsonl", rows)


def run(start, directory, row, capfd):
    """Run with the settings of a row, check that they took effect, and return the metrics."""
    *settings, ranks = [(OTHER if bit == "1" else PLAIN)[i] for i, bit in enumerate(row)]
    values = dict(zip(NAMES, settings, strict=False))
    arguments = ["--model", start[0], "--data", start[1], "--output_dir", str(directory), "--max_steps", "3"]
    arguments += ["--batch_size", "6", "--learning_rate", "1e-3", "--device", "cpu", "--beta_pi", "0.5", "--seed", "1"]
    arguments += [f"--{name}={value}" for name, value in values.items()]
    paths = {}
    if ranks == 1:
        with rank_worker.record_paths(paths):
            assert align.main(arguments) == 0
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        command += ["tests.rank_worker", *arguments]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    output = capfd.readouterr().out
    paths = paths or json.loads(output.rpartition("paths: ")[2])
    assert paths["ranks"] == ranks
    assert (paths["micro_batches"] > 1) == (values["max_tokens_per_batch"] == 48)
    assert bool(paths["checkpoints"]) == values["gradient_checkpointing"]
    assert paths["reference"] == ["ref_hidden" if values["reference"] == "live" else "ref_logps"]
    assert paths["layouts"] == ["several texts a row" if values["share_prompt"] == "on" else "padded"]
    assert ("deferred" in paths["schedules"]) == bool(values["lora_r"]), "a frozen head uses the deferred schedule"
    assert ("each prompt is encoded once" in output) == (values["share_prompt"] == "on")
    assert ("LoRA of rank 4" in output) == bool(values["lora_r"])
    assert ("prompts 18/18" in output) == (values["reference"] == "cache")
    return [line for line in lines(directory / "metrics.jsonl") if "loss" in line]


QUICK = ("111110", "101010")


@pytest.mark.parametrize("row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS])
def test_combined_settings_match_the_plain_run(row, start, tmp_path, capfd):
    """Compare with a plain run that has LoRA if the row has it, because LoRA changes the gradient."""
    plain = run(start, tmp_path / "plain", f"00{row[2]}000", capfd)
    combined = run(start, tmp_path / "combined", row, capfd)
    for line, plain_line in zip(combined, plain, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "log_ratios/mean_square", "tokens"):
            assert line[name] == pytest.approx(plain_line[name], rel=1e-4, abs=2e-5), (name, line["step"])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 4])
def test_a_compiled_body_matches_the_plain_run(start, tmp_path, capfd, lora):
    metrics = []
    for compiled in (False, True):
        arguments = ["--model", start[0], "--data", start[1], "--output_dir", str(tmp_path / str(compiled))]
        arguments += ["--max_steps", "3", "--batch_size", "6", "--learning_rate", "1e-3", "--device", "cpu"]
        assert align.main([*arguments, f"--compile={compiled}", f"--lora_r={lora}", "--share_prompt=on"]) == 0
        metrics.append([line for line in lines(tmp_path / str(compiled) / "metrics.jsonl") if "loss" in line])
    for plain_line, compiled_line in zip(*metrics, strict=True):
        assert plain_line["loss"] == pytest.approx(compiled_line["loss"], rel=1e-3)
        assert plain_line["grad_norm"] == pytest.approx(compiled_line["grad_norm"], rel=2e-3)
