"""The quickstart: the whole road on made-up data. Fine-tune, sample K = 4, score, align, evaluate on held-out prompts.

Stages talk through files in the run directory: sft.jsonl -> sft/ -> scored.jsonl -> exo/ -> results.json and a picture.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from exo import align, artifacts, config, console, data, generation, intervals, models, packing, plots, policy, sft
from exo.config import option, require
from exo.quickstart import corpus, prompts, score, vocabulary

K = 4
TEMPERATURE = 0.8
MAX_NEW_TOKENS = 32
PROMPTS_A_STEP = 16
TEXTS_A_STEP = 64


@dataclass(frozen=True)
class Config:
    output_dir: str = option("runs/quickstart", "directory of the run; an earlier quickstart there is replaced")
    loss: Literal["exo", "dpo"] = option("exo", "reverse or forward KL")
    sft_steps: int = option(500, "steps of supervised fine-tuning")
    align_steps: int = option(96, "steps of alignment")
    seed: int = option(0, "seed of every random choice")

    def __post_init__(self) -> None:
        require(self.sft_steps >= 1, "sft_steps", ">= 1", self.sft_steps)
        require(self.align_steps >= 1, "align_steps", ">= 1", self.align_steps)


def run(config: Config) -> Path:
    """Run every stage and return the run directory."""
    directory = artifacts.prepare(config.output_dir, overwrite=artifacts.is_run(Path(config.output_dir), "train"))
    artifacts.write_run(directory, config, "train")
    accelerator = Accelerator(cpu=True)  # smaller than the launch of a GPU kernel is worth
    torch.set_num_threads(1)  # and than waking a second thread is: 18 steps a second against 7

    console.headline("1/4 Fine-tune a small language model on reviews of mixed sentiment")
    _fine_tune(config, directory)
    console.headline(f"2/4 Sample {K} completions a prompt and score their sentiment")
    _sample_and_score(config, directory)
    console.headline(f"3/4 Align with {config.loss.upper()}")
    aligned = align.run(_align_config(config, directory))
    console.headline("4/4 Evaluate on held-out prompts")
    results = _evaluate(config, directory, aligned, accelerator)
    artifacts.update_run(directory, result=results)
    return directory


def _fine_tune(config: Config, directory: Path) -> None:
    texts = corpus(min(config.sft_steps * TEXTS_A_STEP, 8192), seed=config.seed)
    rows = ({"prompt": prompt, "completion": text} for prompt, text in texts)
    data.write_jsonl(directory / "sft.jsonl", rows)
    model, tokenizer = models.word_level(vocabulary(), seed=config.seed)
    models.save(model, tokenizer, directory / "base")
    sft.run(
        sft.Config(
            model=str(directory / "base"), data=str(directory / "sft.jsonl"), output_dir=str(directory / "sft"),
            max_steps=config.sft_steps, batch_size=TEXTS_A_STEP, learning_rate=3e-3, warmup_steps=10,
            logging_steps=max(1, config.sft_steps // 6), seed=config.seed, device="cpu",
        )
    )  # fmt: skip
    shutil.rmtree(directory / "base")


def _sample_and_score(config: Config, directory: Path) -> None:
    model, tokenizer = models.load(directory / "sft")
    wanted = config.align_steps * PROMPTS_A_STEP
    train = prompts("train")
    repeated = (train * (wanted // len(train) + 1))[:wanted]
    groups = _completions(model, tokenizer, repeated, config.seed, "samples")
    rows = [
        {"prompt": prompt, "completions": texts, "rewards": [score(f"{prompt} {text}") for text in texts]}
        for prompt, texts in zip(repeated, groups, strict=True)
        if texts is not None
    ]
    data.write_jsonl(directory / "scored.jsonl", rows)


def _completions(
    model: Any, tokenizer: Any, openings: list[str], seed: int, label: str | None = None
) -> list[list[str] | None]:
    """K texts a prompt; None where one did not end, since its end of sequence was never drawn."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in openings]
    total = len(ids) * K
    progress = console.Progress(label or "", total, every=max(1, total // 4), quiet=label is None)
    samples = generation.sample(
        model, tokenizer, ids, k=K, temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, seed=seed,
        progress=progress.advance,
    )  # fmt: skip
    unfinished = sum(sample.finish == "length" for group in samples for sample in group)
    if unfinished:
        console.say(f"  {unfinished:,} of {total:,} samples did not end in {MAX_NEW_TOKENS} tokens: groups left out")
    return [
        [tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in group]
        if all(sample.finish == "eos" for sample in group)
        else None
        for group in samples
    ]


def _align_config(config: Config, directory: Path) -> align.Config:
    return align.Config(
        model=str(directory / "sft"), data=str(directory / "scored.jsonl"), output_dir=str(directory / config.loss),
        loss=config.loss, beta_pi=0.5, beta_r=0.5, temperature=TEMPERATURE, learning_rate=3e-4,
        batch_size=PROMPTS_A_STEP, max_steps=config.align_steps, eval_fraction=0.05, seed=config.seed, device="cpu",
        logging_steps=max(1, config.align_steps // 6),
    )  # fmt: skip


def _evaluate(config: Config, directory: Path, aligned: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Oracle reward before and after on held-out prompts, KL to the reference, a picture, samples side by side."""
    before, tokenizer = models.load(directory / "sft")
    after, _ = models.load(aligned)
    drawn = [_completions(model, tokenizer, prompts("test"), config.seed + 1) for model in (before, after)]
    whole = [(p, a, b) for p, a, b in zip(prompts("test"), *drawn, strict=True) if a is not None and b is not None]
    if len(whole) < 2:
        raise artifacts.RunError("the models do not end their texts: --sft_steps is too small to learn anything from")
    openings = [opening for opening, _, _ in whole]
    texts = {"before": [a for _, a, _ in whole], "after": [b for _, _, b in whole]}
    rewards = {
        name: [[score(f"{p} {t}") for t in group] for p, group in zip(openings, groups, strict=True)]
        for name, groups in texts.items()
    }
    kl = _kl(openings, texts["after"], after, before, tokenizer, accelerator)
    means = {name: [sum(group) / K for group in groups] for name, groups in rewards.items()}
    rise = [b - a for a, b in zip(means["before"], means["after"], strict=True)]
    results: dict[str, Any] = {
        f"reward_{name}": {"mean": _mean(values), "standard_error": intervals.standard_error(values)}
        for name, values in means.items()
    }
    results["rise"] = {"mean": _mean(rise), "standard_error": intervals.standard_error(rise)}
    results["kl_to_reference"] = {"mean": _mean(kl), "standard_error": intervals.standard_error(kl)}
    artifacts.write_json(directory / "results.json", results | {"prompts": len(openings), "k": K})
    picture = plots.quickstart(directory / "quickstart.png", rewards, results, config.loss, aligned)
    _tell(config, results, texts, openings, aligned, picture)
    return results


def _kl(
    openings: list[str], texts: list[list[str]], policy_model: Any, reference: Any, tokenizer: Any,
    accelerator: Accelerator,
) -> list[float]:  # fmt: skip
    """One value a prompt: mean over its samples of log pi - log pi_ref, at the temperature they were drawn at."""
    rows = [data.Group(p, tuple(group), None, i) for i, (p, group) in enumerate(zip(openings, texts, strict=True))]
    groups, _ = packing.encode(rows, tokenizer, packing.Limits(256, None, "error"), "held-out samples")

    def logps(model: Any) -> list[tuple[float, ...]]:
        scored = policy.score(
            model, groups, accelerator, pad_id=tokenizer.pad_token_id, max_tokens=8192, temperature=TEMPERATURE,
            advance=lambda _: None,
        )  # fmt: skip
        return [group.ref_logps or () for group in scored]

    pairs = zip(logps(policy_model), logps(reference), strict=True)
    return [sum(a) / len(a) - sum(b) / len(b) for a, b in pairs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tell(
    config: Config, results: dict[str, Any], texts: dict[str, list[list[str]]], openings: list[str],
    aligned: Path, picture: Path,
) -> None:  # fmt: skip
    for i in range(min(3, len(openings))):
        console.say(f"  {openings[i]} ...")
        for name in ("before", "after"):
            text = texts[name][i][0]
            console.say(f"    {name:6s} {score(f'{openings[i]} {text}'):+5.2f}  {text}")
    before, after, rise, kl = (results[name] for name in ("reward_before", "reward_after", "rise", "kl_to_reference"))
    errors = rise["mean"] / rise["standard_error"]
    console.say(
        f"\noracle reward on {len(openings)} held-out prompts x {K} samples (standard error over prompts):\n"
        f"  before {before['mean']:+.2f} +- {before['standard_error']:.2f}\n"
        f"  after  {after['mean']:+.2f} +- {after['standard_error']:.2f}   (the most possible is 6)\n"
        f"  it {'rose' if rise['mean'] > 0 else 'fell'} by {abs(rise['mean']):.2f} +- {rise['standard_error']:.2f}: "
        f"{abs(errors):.0f} standard errors\n"
        f"KL(policy || reference), a whole completion: {kl['mean']:.2f} +- {kl['standard_error']:.2f} nats\n"
        f"picture: {picture}\nmodel:   {aligned}"
    )
    console.headline("Finished")


def main(argv: Sequence[str] | None = None) -> int:
    options = config.parse(Config, argv, prog="python -m exo.train", description=__doc__)
    return artifacts.guarded(run, options)
