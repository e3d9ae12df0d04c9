"""Whatever is combined, a run is the plain run: shared prompts, kept or live references, LoRA, checkpointing, small
micro-batches, two processes. Every pair of settings meets in some row; each row says by what it ran that it did.
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
ROWS = ["111110", "110001", "101010", "011101", "100111", "001011", "010110", "000000", "001101"]  # of OTHER


def test_every_pair_of_settings_meets():
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
    """The metrics of a run with the settings of a row, after seeing that they took place."""
    *settings, ranks = [(OTHER if bit == "1" else PLAIN)[i] for i, bit in enumerate(row)]
    asked = dict(zip(NAMES, settings, strict=False))
    arguments = ["--model", start[0], "--data", start[1], "--output_dir", str(directory), "--max_steps", "3"]
    arguments += ["--batch_size", "6", "--learning_rate", "1e-3", "--device", "cpu", "--beta_pi", "0.5", "--seed", "1"]
    arguments += [f"--{name}={value}" for name, value in asked.items()]
    paths = {}
    if ranks == 1:
        with rank_worker.watched(paths):
            assert align.main(arguments) == 0
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        command += ["tests.rank_worker", *arguments]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = capfd.readouterr().out
    paths = paths or json.loads(said.rpartition("paths: ")[2])
    assert paths["ranks"] == ranks
    assert (paths["micro_batches"] > 1) == (asked["max_tokens_per_batch"] == 48)
    assert bool(paths["checkpoints"]) == asked["gradient_checkpointing"]
    assert paths["reference"] == ["ref_hidden" if asked["reference"] == "live" else "ref_logps"]
    assert paths["layouts"] == ["several texts a row" if asked["share_prompt"] == "on" else "padded"]
    assert ("deferred" in paths["schedules"]) == bool(asked["lora_r"]), (
        "fused, by the schedule for a frozen head or not"
    )
    assert ("each prompt is encoded once" in said) == (asked["share_prompt"] == "on")
    assert ("LoRA of rank 4" in said) == bool(asked["lora_r"])
    assert ("prompts 18/18" in said) == (asked["reference"] == "cache")
    return [line for line in lines(directory / "metrics.jsonl") if "loss" in line]


QUICK = ("111110", "101010")


@pytest.mark.parametrize("row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS])
def test_together_they_are_the_plain_run(row, start, tmp_path, capfd):
    """The plain one with or without LoRA, whose gradient is another."""
    plain = run(start, tmp_path / "plain", f"00{row[2]}000", capfd)
    found = run(start, tmp_path / "found", row, capfd)
    for mine, theirs in zip(found, plain, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "log_ratios/mean_square", "tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-5), (name, mine["step"])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 4])
def test_a_compiled_body_gives_the_plain_run(start, tmp_path, capfd, lora):
    found = []
    for compiled in (False, True):
        arguments = ["--model", start[0], "--data", start[1], "--output_dir", str(tmp_path / str(compiled))]
        arguments += ["--max_steps", "3", "--batch_size", "6", "--learning_rate", "1e-3", "--device", "cpu"]
        assert align.main([*arguments, f"--compile={compiled}", f"--lora_r={lora}", "--share_prompt=on"]) == 0
        found.append([line for line in lines(tmp_path / str(compiled) / "metrics.jsonl") if "loss" in line])
    for mine, theirs in zip(*found, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3)
