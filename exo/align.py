"""Alignment: EXO or DPO on preferences or rewards, from a causal LM and a data file to a model directory.

python -m exo.align --model DIR_OR_NAME --data FILE. Reference log-probs are computed once, before training. The run
directory is the model directory. Left out: resuming, adapters, more than the loss's own objectives.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from exo import artifacts, config, console, data, lineage, loop, models, packing, plots, policy, runs, targets
from exo.config import NOT_NEGATIVE, PART, POSITIVE, at_least, named, option, require
from exo.packing import TokenGroup

HEAD_BUDGET = 2**29  # the default memory_budget of the losses on hidden states
SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "acc", "tokens_per_second": "tok/s"}


@dataclass(frozen=True)
class Config(config.DataTraining):
    model: str = option(
        "",
        "directory or hub name of a causal LM; tiny builds a small one on the data",
        named("a directory, a hub name, or tiny"),
    )
    data: str = option(
        "",
        "preferences or scored completions: a file, a directory of shards, a hub name",
        named("a file of preferences or scored completions"),
    )
    target: Literal["auto", "pref", "rw"] = option(
        "auto", "what the data are taken for; pref on rewards sets the best completion of a row against its worst"
    )
    max_completions: int | None = option(None, "use the first so many completions of each row", at_least(2))
    reward_norm: targets.Norm = option(
        "none", "rewards less their mean, over their standard deviation: of each prompt, or of all the data"
    )
    ref_model: str | None = option(None, "the reference, when it is not the starting policy")
    loss: Literal["exo", "dpo"] = option("exo", "reverse or forward KL")
    beta_pi: float = option(0.1, "scale of the policy's log-ratios", POSITIVE)
    beta_r: float = option(0.1, "temperature of the rewards (unused on preferences)", POSITIVE)
    label_smoothing: float | None = option(
        None, "eps on preferences (unused on rewards); none is 1e-3 for exo, 0 for dpo"
    )
    temperature: float = option(1.0, "divides the logits; the one that completions were sampled at", POSITIVE)
    max_prompt_length: int | None = option(
        None, "tokens of a prompt that are used, its last: as many as sample used", at_least(1)
    )
    eval_fraction: float = option(0.1, "share of the prompts held out; 0 means none", PART)
    eval_data: str | None = option(None, "a held-out file, instead of eval_fraction")
    skip_invalid: bool = option(False, "count malformed rows and go on, instead of stopping at the first")
    save_steps: int = option(0, "steps between checkpoints; 0 means none", NOT_NEGATIVE)
    eval_steps: int = option(0, "steps between evaluations, keeping the best; 0 means at the end only", NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing is None:
            object.__setattr__(self, "label_smoothing", 1e-3 if self.loss == "exo" else 0.0)
        eps = self.label_smoothing
        assert eps is not None
        expected = "in (0, 1) for exo" if self.loss == "exo" else "in [0, 1)"
        require(0 <= eps < 1 and not (eps == 0 and self.loss == "exo"), "label_smoothing", expected, eps)


def run(config: Config) -> Path:
    """Align and return the run directory."""
    start = lineage.start(config, "align")
    dataset = _read(config, config.data)
    held_out = _read(config, config.eval_data) if config.eval_data else None
    accelerator = loop.make_accelerator(config)
    set_seed(config.seed)

    console.headline("Data")
    for read in filter(None, (dataset, held_out)):
        console.say(read.summary())
    console.headline("Model")
    model, tokenizer = models.load_or_tiny(
        lineage.source("model", config.model, "sft", "align", "ppo"), dataset.texts, seed=config.seed
    )
    train_groups, eval_groups, counts = _encode(config, dataset, held_out, tokenizer, model)
    loop.refuse_empty_shares(config, len(train_groups), accelerator)
    _describe(config, model, tokenizer, train_groups, accelerator)
    metrics = runs.begin(start, accelerator, dataset.account(counts))

    console.headline("Reference log-probs")
    model.to(accelerator.device)
    train_groups, eval_groups = _reference(config, model, train_groups, eval_groups, accelerator, tokenizer)

    console.headline("Training")
    module = policy.PolicyLoss(
        model, loss=config.loss, beta_pi=config.beta_pi, beta_r=config.beta_r,
        label_smoothing=config.label_smoothing or 0.0, temperature=config.temperature,
    ).train(config.dropout)  # fmt: skip
    watch = _Watch(config, module, tokenizer, eval_groups, accelerator, metrics)
    steps = loop.total_steps(config, len(train_groups))
    loop.train(
        module, loop.batches(train_groups, config, steps), steps, config, accelerator, metrics,
        collate=partial(packing.collate, pad_id=tokenizer.pad_token_id), denominator=len, shown=SHOWN,
        steps_an_epoch=loop.epoch_steps(config, len(train_groups)),
        first=_first_loss_check(config, module, train_groups, accelerator), after=watch,
    )  # fmt: skip
    directory = runs.end(metrics, model, tokenizer, accelerator, watch.last)
    _conclude(directory, watch)
    return directory


def _read(config: Config, path: str) -> data.Dataset:
    path = lineage.source("data", path, "score", "prepare", prepared="pairs.jsonl")
    dataset = data.read(path, skip_invalid=config.skip_invalid)
    if config.target == "rw" and dataset.groups[0].rewards is None:
        raise ValueError(f"--target rw: expected completions with rewards; {path} has preferences")
    return dataset


def _encode(
    config: Config, dataset: data.Dataset, held_out: data.Dataset | None, tokenizer: Any, model: Any
) -> tuple[list[TokenGroup], list[TokenGroup], Counter[str]]:
    """Tokens for training and evaluation; what was cut or dropped is said, what cannot be trained on is an error."""
    limits = packing.Limits(config.max_length, config.max_completion_length, config.truncate, config.max_prompt_length)
    train_rows, counts = _compared(config, dataset.groups)
    eval_rows: list[data.Group] = []
    eval_path = config.eval_data
    if held_out is not None:
        eval_rows, more = _compared(config, held_out.groups)
        counts += more
    elif config.eval_fraction:
        # split by prompt, so that no held-out prompt was trained on with other completions
        prompts = sorted({group.prompt for group in train_rows})
        random.Random(config.seed).shuffle(prompts)
        chosen = set(prompts[: min(len(prompts) - 1, max(1, round(config.eval_fraction * len(prompts))))])
        eval_rows = [group for group in train_rows if group.prompt in chosen]
        train_rows = [group for group in train_rows if group.prompt not in chosen]
    groups, cut = packing.encode(train_rows, tokenizer, limits, config.data)
    eval_groups, cut_too = packing.encode(eval_rows, tokenizer, limits, eval_path or config.data)
    counts = counts + cut + cut_too
    console.counts(counts)
    if not groups:
        raise data.DataError(f"{config.data}: no row is left to train on")
    if eval_rows and not eval_groups:
        raise data.DataError(f"{eval_path or config.data}: no held-out row is left to evaluate on")
    models.check_fits(model, groups + eval_groups)
    return groups, eval_groups, counts


def _compared(config: Config, rows: list[data.Group]) -> tuple[list[data.Group], Counter[str]]:
    """What the options make of the rows: fewer completions, pairs of rewards, rewards on another scale."""
    counts: Counter[str] = Counter()
    if config.max_completions is not None:
        rows, counts = targets.first(rows, config.max_completions)
    if config.target == "pref":
        rows, more = targets.best_against_worst(rows)
        return rows, counts + more
    return targets.normalise(rows, config.reward_norm) if rows else rows, counts


def _describe(config: Config, model: Any, tokenizer: Any, groups: list[TokenGroup], accelerator: Accelerator) -> None:
    """What will be trained on what, before any time is spent on it."""
    kind = "preferences" if groups[0].rewards is None else "rewards"
    parameters = models.parameter_count(model)
    steps = loop.total_steps(config, len(groups))
    sizes = sorted({len(group.completions) for group in groups})
    lengths = sorted(group.longest for group in groups)
    console.say(
        f"{type(model).__name__}, {parameters / 1e6:,.1f}M parameters, {accelerator.device}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}\n"
        f"{config.loss.upper()} on {kind}, K {sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''}, "
        f"{len(groups):,} prompts for training, {steps:,} steps of {config.batch_size}\n"
        f"longest row of a prompt: median {lengths[len(lengths) // 2]} tokens, most {lengths[-1]}\n"
        f"memory: about {_memory(config, model, groups, accelerator) / 2**30:.2f} GiB a process "
        "(weights, gradients, Adam, the head's working memory; activations come on top)"
    )
    for group in groups[:3]:
        prompt = tokenizer.decode(group.prompt[-40:])
        completion = tokenizer.decode(group.completions[0][:40])
        dots = "..." if len(group.prompt) > 40 else ""
        more = "..." if len(group.completions[0]) > 40 else ""
        console.say(f"  line {group.line}: {dots}{prompt!r} -> [[{completion!r}]]{more}")
    console.say("  (the loss is taken between [[ and ]])")


def _memory(config: Config, model: Any, groups: list[TokenGroup], accelerator: Accelerator) -> int:
    """Bytes in a process: fp32 weights, gradients, two moments; the head's budget, or twice the logits of the largest
    micro-batch where that is less; and what autocast keeps of the weights in 16 bits, or a second model that scores,
    whichever is more."""
    widest = max(group.longest * len(group.completions) for group in groups)
    tokens = min(max(config.max_tokens_per_batch, widest), sum(g.longest * len(g.completions) for g in groups))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    beside = 4 if config.ref_model else 0 if accelerator.mixed_precision == "no" else 2
    return (16 + beside) * models.parameter_count(model) + min(HEAD_BUDGET, 2 * 4 * tokens * vocabulary)


def _reference(
    config: Config,
    model: nn.Module,
    train_groups: list[TokenGroup],
    eval_groups: list[TokenGroup],
    accelerator: Accelerator,
    tokenizer: Any,
) -> tuple[list[TokenGroup], list[TokenGroup]]:
    reference = model
    if config.ref_model is not None:
        reference, other = models.load(lineage.source("ref_model", config.ref_model, "sft", "align", "ppo"))
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError("--ref_model: expected the policy's tokenizer; got another vocabulary")
        models.check_fits(reference, train_groups + eval_groups)
        reference.to(accelerator.device)
    everything = [*train_groups, *eval_groups]
    every = max(1, len(everything) // 5)
    progress = console.Progress("prompts", len(everything), every=every)
    scored = policy.score(
        reference, everything, accelerator, pad_id=tokenizer.pad_token_id, advance=progress.advance,
        max_tokens=config.max_tokens_per_batch, temperature=config.temperature,
    )  # fmt: skip
    return scored[: len(train_groups)], scored[len(train_groups) :]


def _first_loss_check(
    config: Config, module: policy.PolicyLoss, groups: list[TokenGroup], accelerator: Accelerator
) -> Any:
    """A function that compares the first loss with what theory says where policy equals reference."""
    first = next(loop.batches(groups, config, 1))
    expected, tolerance = module.expected_first_loss(first, accelerator.mixed_precision)
    most = module.most_mean_square(first, accelerator.mixed_precision)

    def check(seen: float, values: Mapping[str, float]) -> None:
        comparable = config.ref_model is None and not config.dropout
        why = "" if comparable else " (not comparable: " + ("foreign reference)" if config.ref_model else "dropout)")
        console.say(f"first loss: expected {expected:.5f} +- {tolerance:.1g}, seen {seen:.5f}{why}")
        square = values[policy.MEAN_SQUARE]
        if comparable and not (abs(seen - expected) <= tolerance and square <= most):
            raise artifacts.RunError(
                f"the first loss is {seen:.5f}, but where policy equals reference it is {expected:.5f} "
                f"+- {tolerance:.1g}; their log-probs differ by {square**0.5:.2g} nats rms, and {most**0.5:.2g} is the "
                "most that rounding does: a wrong mask, reference, temperature, adapter base or dropout"
            )

    return check


class _Watch:
    """Called after each update: evaluates, checkpoints, keeps the best."""

    def __init__(
        self,
        config: Config,
        module: policy.PolicyLoss,
        tokenizer: Any,
        groups: list[TokenGroup],
        accelerator: Accelerator,
        metrics: artifacts.Metrics,
    ) -> None:
        self.config, self.module, self.tokenizer, self.groups = config, module, tokenizer, groups
        self.model: Any = module.model
        self.accelerator, self.metrics, self.directory = accelerator, metrics, Path(config.output_dir)
        self.best = float("inf")
        self.last: dict[str, float] = {}

    def __call__(self, step: int, last: bool) -> None:
        config = self.config
        if self.groups and (last or (config.eval_steps and step % config.eval_steps == 0)):
            self._evaluate(step)
        if config.save_steps and step % config.save_steps == 0 and self.accelerator.is_main_process:
            models.save_checkpoint(self.model, self.tokenizer, self.directory, f"step-{step}")

    def _evaluate(self, step: int) -> None:
        self.last = policy.evaluate(
            self.module, self.groups, self.accelerator,
            pad_id=self.tokenizer.pad_token_id, max_tokens=self.config.max_tokens_per_batch,
        )  # fmt: skip
        if not self.accelerator.is_main_process:
            return
        self.metrics.write(step=step, **self.last)
        self.accelerator.log(self.last, step=step)
        console.say(f"  evaluation after step {step}: {_summary(self.last, len(self.groups))}")
        if self.config.eval_steps and self.last["eval_loss"] < self.best:
            self.best = self.last["eval_loss"]
            models.save_checkpoint(self.model, self.tokenizer, self.directory, "best")


def _summary(result: dict[str, float], n: int) -> str:
    parts = [f"loss {result['eval_loss']:.4f}"]
    if "eval_rewards/accuracies" in result:
        parts.append(
            f"accuracy {100 * result['eval_rewards/accuracies']:.1f}% "
            f"(95% interval {100 * result['eval_accuracy_low']:.1f} to {100 * result['eval_accuracy_high']:.1f}), "
            f"margin {result['eval_rewards/margins']:+.4f}"
        )
    return ", ".join(parts) + f", {n:,} held-out prompts"


def _conclude(directory: Path, watch: _Watch) -> None:
    console.headline("Done")
    if watch.last:
        console.say(f"held-out: {_summary(watch.last, len(watch.groups))}")
    console.say(f"model: {directory}  (AutoModelForCausalLM.from_pretrained({str(directory)!r}))")
    if watch.best < float("inf"):
        console.say(f"best checkpoint by held-out loss: {directory / 'checkpoints' / 'best'}")
    console.say(f"picture: {directory / plots.TRAINING}")


def main(argv: Sequence[str] | None = None) -> int:
    options = config.parse(Config, argv, prog="python -m exo.align", description=__doc__)
    return artifacts.guarded(run, options)


if __name__ == "__main__":
    raise SystemExit(main())
