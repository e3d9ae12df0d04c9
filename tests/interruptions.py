"""Runs to be interrupted: every stage that trains, with dropout, mid-epoch, in micro-batches; and what must be equal.

Shared by test_resume.py and test_stops.py (in one process) and test_crashes.py (processes that are killed).
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from exo import align, models, ppo, reward, sft
from tests.tasks import PROMPTS, WORDS, lines, write_rows
from tests.tasks import reward as worth

STAGES = {"sft": sft, "reward": reward, "align": align, "ppo": ppo}
STEPS = 10
TIMES = ("tokens_per_second",)  # what a line of metrics may differ in


def write_start(directory: Path) -> str:
    """A GPT-2 that drops out, with a tokenizer of words."""
    _, tokenizer = models.word_level(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.2,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    models.save(model, tokenizer, directory)
    return str(directory)


def write_data(directory: Path) -> None:
    texts, scored, prompts = [], [], []
    for i, prompt in enumerate(PROMPTS * 4):
        asked = f"{prompt} {WORDS[i % 7]}"
        answers = ["".join([" good"] * j + [f" {WORDS[(i + j) % 5]}"] * (1 + i % 3)) for j in range(2 + i % 3)]
        texts.append({"prompt": asked, "completion": answers[0]})
        scored.append({"prompt": asked, "completions": answers, "rewards": [worth("", a) for a in answers]})
        prompts.append({"prompt": asked})
    for name, rows in (("sft", texts), ("reward", scored), ("align", scored), ("ppo", prompts)):
        write_rows(directory / f"{name}.jsonl", rows)


def given(directory: Path) -> Path:
    """A start and data for every stage, in the directory."""
    write_start(directory / "start")
    write_data(directory)
    return directory


def arguments(stage: str, directory: Path, out: Path, *more: str) -> list[str]:
    """Of a run of STEPS steps, in epochs that end in the middle, on the data and the start in `directory`."""
    found = ["--model", str(directory / "start"), "--data", str(directory / f"{stage}.jsonl"), "--output_dir", str(out)]
    found += ["--max_steps", str(STEPS), "--learning_rate", "3e-3", "--dropout", "--device", "cpu"]
    found += ["--max_tokens_per_batch", "48", "--save_steps", "2", "--logging_steps", "100"]
    if stage == "ppo":
        found += [
            "--oracle",
            "tests.tasks:reward",
            "--rollout_size",
            "16",
            "--batch_size",
            "8",
            "--max_new_tokens",
            "5",
        ]
        return [*found, "--max_length", "32", "--critic_warmup_steps", "3", "--critic_learning_rate", "1e-3", *more]
    found += ["--batch_size", "7", "--max_length", "48"]
    if stage == "align":
        found += ["--eval_steps", "3", "--eval_fraction", "0.2", "--export_steps", "4", "--beta_pi", "0.5"]
        found += ["--reference_cache", str(directory / "reference")]
    return [*found, *more]


def made(run: Path) -> dict[str, object]:
    """What an interruption must not change: every weight that the run left, and every number of its log."""
    found: dict[str, object] = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(run.rglob("*.safetensors"))
    }
    log = lines(run / "metrics.jsonl")
    return found | {"metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in log]}


def undisturbed(directory: Path) -> Callable[[str], dict[str, object]]:
    """What each stage makes of what is in the directory when nothing happens to it; made once."""

    @cache
    def of(stage: str) -> dict[str, object]:
        assert STAGES[stage].main(arguments(stage, directory, directory / f"whole-{stage}")) == 0
        return made(directory / f"whole-{stage}")

    return of


def sampled(*cases, quick):
    """Those that `quick` holds for, and the others for the long lane."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]
