"""Alignment: EXO or DPO on preferences or rewards, from a causal LM and a data file to a model directory.

python -m exo.align --model DIR_OR_NAME --data FILE. Reference log-probs are computed once, before training. The run
directory is the model directory. Left out: objectives other than the kernels'.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator

from exo import data, models
from exo.cli import console
from exo.cli.errors import RunError
from exo.cli.fields import NOT_NEGATIVE, PART, POSITIVE, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import AdapterOptions, DataOptions
from exo.data import preview, split, transforms
from exo.data.collate import Collator
from exo.data.text import render, tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import fsdp, gather
from exo.distributed.accelerator import Training, make_accelerator, place, set_seed
from exo.models import lora
from exo.models.attention import choose
from exo.rollouts import samples
from exo.runs import inputs as run_inputs
from exo.runs import plots
from exo.runs import record as run_record
from exo.runs.jsonl import JsonlLog
from exo.runs.stage import Start, stage
from exo.training import checks, loop, preference, reference, sampler
from exo.training import metrics as training_metrics
from exo.training import run as training_run
from exo.training.optimizer import OptimizerSettings
from exo.training.reference import Mode

HEAD_BUDGET = 2**29  # the default memory_budget of the losses on hidden states
SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "acc", "tokens_per_second": "tok/s"}


@dataclass(frozen=True)
class Config(AdapterOptions, DataOptions):
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
    reward_norm: transforms.Norm = option(
        "none", "rewards less their mean, over their standard deviation: of each prompt, or of all the data"
    )
    share_prompt: choose.SharePrompt = option(
        "auto", "encode a prompt once for all its completions; auto does where it saves tokens and the model bears it"
    )
    ref_model: str | None = option(None, "the reference, when it is not the starting policy")
    reference: Mode = option(
        "auto",
        "log-probs of the reference: cache makes them once and keeps them, live makes them in every step, none does "
        "without; auto takes those that the data have, or else the cache",
    )
    reference_cache: str | None = option(
        None, "directory of kept log-probs (default: exo/reference in the user's cache)"
    )
    loss: Literal["exo", "dpo"] = option("exo", "reverse or forward KL")
    beta_pi: float = option(0.1, "scale of the policy's log-ratios", POSITIVE)
    beta_r: float = option(0.1, "temperature of the rewards (unused on preferences)", POSITIVE)
    label_smoothing: float | None = option(
        None, "eps on preferences (unused on rewards); none is 1e-3 for exo, 0 for dpo"
    )
    temperature: float = option(1.0, "divides the logits; the one that completions were sampled at", POSITIVE)
    eval_fraction: float = option(0.1, "share of the prompts held out; 0 means none", PART)
    eval_data: str | None = option(None, "a held-out file, instead of eval_fraction")
    export_steps: int = option(
        0, "save a loadable model every N steps, in output_dir/models/step-N (0: only at the end)", NOT_NEGATIVE
    )
    eval_steps: int = option(
        0,
        "evaluate every N steps and keep the best model in output_dir/models/best (0: evaluate at the end only)",
        NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing is None:
            object.__setattr__(self, "label_smoothing", 1e-3 if self.loss == "exo" else 0.0)
        eps = self.label_smoothing
        assert eps is not None
        expected = "in (0, 1) for exo" if self.loss == "exo" else "in [0, 1)"
        require(0 <= eps < 1 and not (eps == 0 and self.loss == "exo"), "label_smoothing", expected, eps)


@stage("align", reads=("model", "ref_model", "data", "eval_data"), makes=".")
def run(config: Config, start: Start) -> Path:
    """Align and return the run directory."""
    dataset = read(config)
    held_out = read(config, "eval_data") if config.eval_data else None
    if held_out is not None:
        split.warn_of_leaks(dataset, held_out)
    accelerator = make_accelerator(**config.accelerator(), training=Training(**config.parallel()))
    set_seed(config.seed)

    console.headline("Data")
    for part in filter(None, (dataset, held_out)):
        console.log(part.summary())
    console.headline("Model")
    lora.check(config, config.model)
    start_model = run_inputs.source("model", config.model, "sft", "align", "ppo")
    model, tokenizer = lora.load(config, start_model, dataset.texts, accelerator)
    dtypes = models.dtypes_of(config.save_dtype, start_model)
    dataset, *rest = render.apply(
        config, tokenizer, gather.template_date(start, accelerator), *filter(None, (dataset, held_out))
    )
    counts: Counter[str] = Counter()
    try:
        examples, *other = (tokens(config, rows, tokenizer, counts) for rows in (dataset, *rest))
        others = other[0] if other else []
        models.check_fits(model, examples + others)
        train_examples, _, held_out_lines = parted(config, dataset, examples, others, counts)
    finally:
        console.counts(counts)
    read_model = partial(models.load, mapped=fsdp.is_requested(config.fsdp))
    mode, other_model = reference_model(config, examples + others, tokenizer, read_model)
    _describe(config, model, tokenizer, train_examples, accelerator)
    metrics = training_run.begin(start, accelerator, dataset.account(counts))

    console.headline("Reference log-probs")
    if mode == "live" and not config.lora_r:
        other_model = other_model or copy.deepcopy(model)
    trained = lora.apply(model, config, start_model)
    seeing = [model] if other_model is None else [model, other_model]
    for one in seeing:
        place(one, accelerator, config.fsdp)
    collator = choose.choose_layout(
        seeing,
        examples,
        accelerator,
        Collator(tokenizer.pad_token_id, config.max_tokens_per_batch),
        config.share_prompt,
        config.temperature,
        config.dropout,
    )
    if accelerator.is_main_process:
        run_record.update_run(Path(config.output_dir), layout=collator.layout, reference=mode)
    with lora.disabled(trained):
        scored = _scored(config, mode, other_model or model, examples + others, accelerator, collator)
    if mode == "cache":
        checks.warn_of_other_sampler(dataset.examples, scored[: len(examples)])
    train_examples, eval_examples, _ = parted(
        config, dataset, scored[: len(examples)], scored[len(examples) :], Counter(), held_out_lines
    )

    console.headline("Training")
    live = None if mode != "live" else other_model or model
    module = preference.PreferenceLoss(
        trained, loss=config.loss, beta_pi=config.beta_pi, beta_r=config.beta_r,
        label_smoothing=config.label_smoothing or 0.0, temperature=config.temperature, reference=live,
    ).train(config.dropout)  # fmt: skip
    watch = _Watch(config, module, tokenizer, eval_examples, accelerator, metrics, collator, dtypes)
    steps = sampler.total_steps(**config.steps(len(train_examples)))
    task = loop.Task(
        module,
        sampler.BatchSampler(train_examples, steps, config.batch_size, config.seed),
        steps,
        collator,
        denominator=len,
        shown=SHOWN,
        steps_per_epoch=sampler.steps_per_epoch(len(train_examples), config.batch_size),
        first=_first_loss_check(config, mode, module, train_examples, accelerator),
        after=watch,
        after_every=(config.eval_steps, config.export_steps),
        parts={"watch": watch},
    )
    settings = loop.Settings(OptimizerSettings(**config.optimizer()), **config.loop())
    loop.train(task, settings, accelerator, metrics)
    finished = lora.merged(trained, config, accelerator)
    directory = training_run.end(metrics, finished, tokenizer, accelerator, watch.last, dtypes)
    _conclude(directory, watch)
    return directory


def read(config: Config, option: str = "data") -> data.Dataset:
    """Read the file of --data or --eval_data."""
    path = run_inputs.source(option, getattr(config, option), "score", "prepare", prepared="pairs.jsonl")
    dataset = data.read(path, **config.reading_of(option))
    samples.check_temperature(option, path, dataset.examples, config.temperature)
    if config.target == "rw" and dataset.examples[0].rewards is None:
        raise ValueError(f"--target rw: expected completions with rewards; {path} has preferences")
    return dataset


def tokens(config: Config, dataset: data.Dataset, tokenizer: Any, counts: Counter[str]) -> list[TokenizedExample]:
    """Return every row of a file as tokens, whatever the options will make of it: the reference scores it once.

    `counts` gets what was cut, dropped or noted.
    """
    examples, cut = tokenize.encode(
        dataset.examples, tokenizer, Limits(**config.limits()), dataset.path, skip_invalid=config.skip_invalid
    )
    counts.update(cut)
    return [tokenize.factor_prefix(example) for example in examples]


class Parts(NamedTuple):
    train: list[TokenizedExample]
    held_out: list[TokenizedExample]
    lines: frozenset[int]  # of the rows that eval_fraction holds out


def parted(
    config: Config,
    dataset: data.Dataset,
    examples: list[TokenizedExample],
    others: list[TokenizedExample],  # of --eval_data
    counts: Counter[str],
    lines: frozenset[int] | None = None,
) -> Parts:
    """Return the rows to train on and to evaluate on, as the options compare them; DataError if there are none.

    `lines` are those of an earlier result for the same rows; without them the rows to hold out are chosen.
    """
    train, held_out = _compared(config, examples, counts), _compared(config, others, counts)
    if lines is None:
        lines = _held_out_lines(config, dataset, train)
    if lines:
        held_out = [example for example in train if example.line in lines]
        train = [example for example in train if example.line not in lines]
    if not train:
        raise data.DataError(f"{config.data}: no row is left to train on")
    if config.eval_data and not held_out:
        raise data.DataError(f"{config.eval_data}: no held-out row is left to evaluate on")
    return Parts(train, held_out, lines)


def _held_out_lines(config: Config, dataset: data.Dataset, rows: list[TokenizedExample]) -> frozenset[int]:
    """Choose the share of the rows that eval_fraction holds out; warn if they share texts with the others."""
    if config.eval_data is not None:
        return frozenset()
    by_line = {example.line: example for example in dataset.examples}
    examples = [by_line[row.line] for row in rows]
    return frozenset(rows[i].line for i in split.hold_out(examples, config.eval_fraction, config.seed, config.data))


def _compared(config: Config, rows: list[TokenizedExample], counts: Counter[str]) -> list[TokenizedExample]:
    """What the options make of the rows: fewer completions, pairs of rewards, rewards on another scale."""
    if config.max_completions is not None:
        rows, skipped = transforms.take_first(rows, config.max_completions)
        counts.update(skipped)
    if config.target == "pref":
        rows, skipped = transforms.to_pairs(rows)
        counts.update(skipped)
        return rows
    return transforms.normalize_rewards(rows, config.reward_norm) if rows else rows


def _describe(
    config: Config, model: Any, tokenizer: Any, examples: list[TokenizedExample], accelerator: Accelerator
) -> None:
    """What will be trained on what, before any time is spent on it."""
    kind = "preferences" if examples[0].rewards is None else "rewards"
    parameters = models.parameter_count(model)
    steps = sampler.total_steps(**config.steps(len(examples)))
    sizes = sorted({len(example.completions) for example in examples})
    lengths = sorted(example.longest for example in examples)
    console.log(
        f"{type(model).__name__}, {parameters / 1e6:,.1f}M parameters, {accelerator.device}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}\n"
        f"{config.loss.upper()} on {kind}, K {sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''}, "
        f"{len(examples):,} prompts for training, {steps:,} steps of {config.batch_size}\n"
        f"longest row of a prompt: median {lengths[len(lengths) // 2]} tokens, most {lengths[-1]}\n"
        f"memory: about {_memory(config, model, examples, accelerator) / 2**30:.2f} GiB a process "
        "(weights, gradients, Adam, the head's working memory; activations come on top)"
    )
    preview.show(examples, tokenizer, preview.LOSS_OF_DIFFERENCE)


def _memory(config: Config, model: Any, examples: list[TokenizedExample], accelerator: Accelerator) -> int:
    """Bytes in a process: the weights; gradients and two moments where they are trained, which of LoRA's is next to
    nothing; what autocast keeps of the weights in 16 bits, or a second model that scores, whichever is more; of all
    these a share where they are in shards; and the head's budget, or twice the logits of the largest micro-batch where
    that is less."""
    widest = max(example.longest * len(example.completions) for example in examples)
    tokens = min(max(config.max_tokens_per_batch, widest), sum(g.longest * len(g.completions) for g in examples))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    second = config.ref_model or (config.reference == "live" and not config.lora_r)
    beside = 4 if second else 0 if accelerator.mixed_precision == "no" else 2
    trained = 0 if config.lora_r else 12
    weights = sum(parameter.numel() * (1 if parameter.dtype == torch.uint8 else 4) for parameter in model.parameters())
    whole = weights + (trained + beside) * models.parameter_count(model)
    share = accelerator.num_processes if fsdp.is_requested(config.fsdp) else 1
    return whole // share + min(HEAD_BUDGET, 2 * 4 * tokens * vocabulary)


def reference_model(
    config: Config, examples: list[TokenizedExample], tokenizer: Any, read_model: Callable[[str], tuple[Any, Any]]
) -> tuple[str, Any]:
    """Return how the reference is used (reference.mode), and its model; None if it is the start of the policy.

    `read_model` reads the model and its tokenizer by name.
    """
    mode = reference.mode(config.reference, examples)
    if config.ref_model is None:
        return mode, None
    if mode in ("none", "data"):
        raise ValueError(f"--ref_model: expected --reference cache or live; with {mode} no model is asked")
    model, other = read_model(run_inputs.source("ref_model", config.ref_model, "sft", "align", "ppo"))
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError("--ref_model: expected the policy's tokenizer; got another vocabulary")
    models.check_fits(model, examples)
    return mode, model


def _scored(
    config: Config,
    mode: str,
    model: Any,
    examples: list[TokenizedExample],
    accelerator: Accelerator,
    collator: Collator,
) -> list[TokenizedExample]:
    """The groups with the reference's log-probs, as the mode has it."""
    if mode == "live":
        return examples
    if mode == "none":
        return [replace(example, ref_logps=(0.0,) * len(example.completions)) for example in examples]
    if mode == "data":
        return examples
    keep = Path(config.reference_cache) if config.reference_cache else reference.directory()
    return reference.score(model, examples, accelerator, collator, config.temperature, keep)


def _first_loss_check(
    config: Config,
    mode: str,
    module: preference.PreferenceLoss,
    examples: list[TokenizedExample],
    accelerator: Accelerator,
) -> Any:
    """A function that compares the first loss with what theory says where policy equals reference."""
    first = next(sampler.BatchSampler(examples, 1, config.batch_size, config.seed))
    expected, tolerance = module.expected_first_loss(first, accelerator.mixed_precision)
    most = module.max_rounding_error(first, accelerator.mixed_precision)

    def check(seen: float, values: Mapping[str, float]) -> None:
        foreign = config.ref_model is not None or mode in ("none", "data")
        comparable = not foreign and not config.dropout
        why = "" if comparable else " (not comparable: " + ("foreign reference)" if foreign else "dropout)")
        console.log(f"first loss: expected {expected:.5f} +- {tolerance:.1g}, seen {seen:.5f}{why}")
        square = values[training_metrics.MEAN_SQUARE]
        if comparable and not (abs(seen - expected) <= tolerance and square <= most):
            raise RunError(
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
        module: preference.PreferenceLoss,
        tokenizer: Any,
        examples: list[TokenizedExample],
        accelerator: Accelerator,
        metrics: JsonlLog,
        collator: Collator,
        dtypes: models.Dtypes,
    ) -> None:
        self.config, self.module, self.tokenizer, self.examples = config, module, tokenizer, examples
        self.model: Any = module.model
        self.accelerator, self.metrics, self.collator = accelerator, metrics, collator
        self.directory, self.dtypes = Path(config.output_dir), dtypes
        self.best = float("inf")
        self.last: dict[str, float] = {}

    def __call__(self, step: int, last: bool) -> None:
        config = self.config
        if self.examples and (last or (config.eval_steps and step % config.eval_steps == 0)):
            self._evaluate(step)
        if config.export_steps and step % config.export_steps == 0:
            self._save(f"step-{step}")

    def state(self) -> dict[str, float | None]:
        return {"best": self.best if self.best < float("inf") else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best = float("inf") if state["best"] is None else state["best"]

    def _evaluate(self, step: int) -> None:
        self.last = preference.evaluate(self.module, self.examples, self.accelerator, self.collator)
        if self.accelerator.is_main_process:
            self.metrics.write(step=step, **self.last)
            self.accelerator.log(self.last, step=step)
        console.log(f"  evaluation after step {step}: {_summary(self.last, len(self.examples))}")
        if self.config.eval_steps and self.last["eval_loss"] < self.best:
            self.best = self.last["eval_loss"]
            self._save("best")

    def _save(self, name: str) -> None:
        finished = lora.merged(self.model, self.config, self.accelerator)
        if self.accelerator.is_main_process:
            models.export_model(finished, self.tokenizer, self.directory, name, self.dtypes)


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
        console.log(f"held-out: {_summary(watch.last, len(watch.examples))}")
    console.log(f"model: {directory}  (AutoModelForCausalLM.from_pretrained({str(directory)!r}))")
    if watch.best < float("inf"):
        console.log(f"best model by held-out loss: {directory / 'models' / 'best'}")
    console.log(f"picture: {directory / plots.TRAINING}")


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
