"""Training runs for the tests that interrupt them: all stages, with dropout and micro-batches, ending mid-epoch.

test_resume.py and test_stops.py use them in one process, test_crashes.py in processes that it kills.
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
from tests.tasks import reward as word_reward

STAGES = {"sft": sft, "reward": reward, "align": align, "ppo": ppo}
STEPS = 10
TIMES = ("tokens_per_second",)  # metrics that differ between equal runs


def write_start(directory: Path) -> str:
    """Write a GPT-2 with dropout and a word-level tokenizer; return its directory."""
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
        text = f"{prompt} {WORDS[i % 7]}"
        answers = ["".join([" good"] * j + [f" {WORDS[(i + j) % 5]}"] * (1 + i % 3)) for j in range(2 + i % 3)]
        texts.append({"prompt": text, "completion": answers[0]})
        scored.append({"prompt": text, "completions": answers, "rewards": [word_reward("", a) for a in answers]})
        prompts.append({"prompt": text})
    for name, rows in (("sft", texts), ("reward", scored), ("align", scored), ("ppo", prompts)):
        write_rows(directory / f"{name}.jsonl", rows)


def write_inputs(directory: Path) -> Path:
    """Write a start model and data for every stage to `directory`; return it."""
    write_start(directory / "start")
    write_data(directory)
    return directory


def arguments(stage: str, directory: Path, out: Path, *more: str) -> list[str]:
    """Return the arguments of a run of STEPS steps, which end mid-epoch, on the inputs in `directory`."""
    argv = ["--model", str(directory / "start"), "--data", str(directory / f"{stage}.jsonl"), "--output_dir", str(out)]
    argv += ["--max_steps", str(STEPS), "--learning_rate", "3e-3", "--dropout", "--device", "cpu"]
    argv += ["--max_tokens_per_batch", "48", "--save_steps", "2", "--logging_steps", "100"]
    if stage == "ppo":
        argv += [
            "--oracle",
            "tests.tasks:reward",
            "--rollout_size",
            "16",
            "--batch_size",
            "8",
            "--max_new_tokens",
            "5",
        ]
        return [*argv, "--max_length", "32", "--critic_warmup_steps", "3", "--critic_learning_rate", "1e-3", *more]
    argv += ["--batch_size", "7", "--max_length", "48"]
    if stage == "align":
        argv += ["--eval_steps", "3", "--eval_fraction", "0.2", "--export_steps", "4", "--beta_pi", "0.5"]
        argv += ["--reference_cache", str(directory / "reference")]
    return [*argv, *more]


def fingerprint(run: Path) -> dict[str, object]:
    """Return what an interruption must not change: hashes of all weight files of a run, and its metrics."""
    hashes: dict[str, object] = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(run.rglob("*.safetensors"))
    }
    log = lines(run / "metrics.jsonl")
    return hashes | {"metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in log]}


def undisturbed_runs(directory: Path) -> Callable[[str], dict[str, object]]:
    """Return a function that runs a stage undisturbed, once, and returns the fingerprint of its run."""

    @cache
    def undisturbed(stage: str) -> dict[str, object]:
        assert STAGES[stage].main(arguments(stage, directory, directory / f"undisturbed-{stage}")) == 0
        return fingerprint(directory / f"undisturbed-{stage}")

    return undisturbed


def mark_slow(*cases, quick):
    """Return test parameters; those for which `quick` is false are marked slow."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]
