"""Align a causal LM with EXO or DPO, on preferences or rewards.

python -m exo.align --model DIR_OR_NAME --data FILE. Reference log-probs are computed once, before training. The run
directory is the model directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exo.cli import console
from exo.cli.fields import NOT_NEGATIVE, PART, POSITIVE, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import AdapterOptions, DataOptions, Norm, ReferenceMode, SharePrompt
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo import data
    from exo.data.text.tokenize import TokenizedExample
    from exo.training import examples as training_examples

SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "acc", "tokens_per_second": "tok/s"}


@dataclass(frozen=True)
class Config(AdapterOptions, DataOptions):
    output_dir: str = option("runs/align", "directory of the run")
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
        "auto", 'train on preferences or rewards; "pref" pairs the best with the worst completion of scored rows'
    )
    max_completions: int | None = option(None, "use the first so many completions of each row", at_least(2))
    reward_norm: Norm = option("none", "standardize the rewards (mean 0, deviation 1), per prompt or over all the data")
    share_prompt: SharePrompt = option(
        "auto", "encode a prompt once for all its completions; auto: when it saves tokens and the model supports it"
    )
    ref_model: str | None = option(None, "the reference model, if it is not the starting policy")
    reference: ReferenceMode = option(
        "auto",
        "log-probs of the reference: cache computes them once, live in every step, none omits them; auto uses those in "
        "the data if there are any, else the cache",
    )
    reference_cache: str | None = option(
        None, "directory of cached log-probs (default: exo/reference in the user's cache)"
    )
    loss: Literal["exo", "dpo"] = option("exo", "exo: reverse KL; dpo: forward KL")
    beta_pi: float = option(0.1, "scale of the policy's log-ratios", POSITIVE)
    beta_r: float = option(0.1, "temperature of the rewards (unused on preferences)", POSITIVE)
    label_smoothing: float | None = option(
        None, "eps on preferences (unused on rewards); none: 1e-3 for exo, 0 for dpo"
    )
    temperature: float = option(1.0, "divides the logits; the temperature of the samples", POSITIVE)
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
    import copy

    from exo import models
    from exo.data import preview, split
    from exo.data.collate import Collator
    from exo.data.text import render
    from exo.distributed import fsdp, gather
    from exo.distributed.accelerator import Training, make_accelerator, place, set_seed
    from exo.models import lora
    from exo.models.attention import choose
    from exo.runs import inputs as run_inputs
    from exo.runs import record as run_record
    from exo.training import checks, evaluator, loop, preference, reference, sampler, summary
    from exo.training import examples as training_examples
    from exo.training import run as training_run
    from exo.training.optimizer import OptimizerSettings

    dataset = read(config)
    eval_dataset = read(config, "eval_data") if config.eval_data else None
    if eval_dataset is not None:
        split.warn_of_leaks(dataset, eval_dataset)
    accelerator = make_accelerator(**config.accelerator(), training=Training(**config.parallel()))
    set_seed(config.seed)

    console.headline("Data")
    datasets = [part for part in (dataset, eval_dataset) if part is not None]
    for part in datasets:
        console.log(part.summary())
    console.headline("Model")
    adapter = lora.LoraSettings(**config.lora())
    lora.check(adapter, config.model)
    start_model = run_inputs.source("model", config.model, "sft", "align", "ppo")
    model, tokenizer = lora.load(
        start_model, dataset.texts, adapter, accelerator, seed=config.seed, sharded=fsdp.is_requested(config.fsdp)
    )
    dtypes = models.dtypes_of(config.save_dtype, start_model)
    date = gather.template_date(start, accelerator)
    dataset, *others = render.apply(tokenizer, config.chat_template, config.template_kwargs, date, *datasets)
    counts: Counter[str] = Counter()
    try:
        examples, *rest = (tokens(config, part, tokenizer, counts) for part in (dataset, *others))
        eval_examples = rest[0] if rest else []
        models.check_fits(model, examples + eval_examples)
        rows = parted(config, dataset, examples, eval_examples, counts)
    finally:
        console.counts(counts)
    read_model = partial(models.load, mapped=fsdp.is_requested(config.fsdp))
    mode, other_model = reference_model(config, examples + eval_examples, tokenizer, read_model)
    steps = sampler.total_steps(**config.steps(len(rows.train)))
    memory = summary.estimate_memory(
        model, rows.train, accelerator, max_tokens=config.max_tokens_per_batch, adapter=bool(config.lora_r),
        second_model=bool(config.ref_model or (config.reference == "live" and not config.lora_r)),
        shards=accelerator.num_processes if fsdp.is_requested(config.fsdp) else 1,
    )  # fmt: skip
    summary.describe(
        model, rows.train, accelerator, loss=config.loss, steps=steps, batch_size=config.batch_size, memory=memory
    )
    preview.show(rows.train, tokenizer, preview.LOSS_OF_DIFFERENCE)
    metrics = training_run.begin(start, accelerator, dataset.account(counts))

    console.headline("Reference log-probs")
    if mode == "live" and not config.lora_r:
        other_model = other_model or copy.deepcopy(model)
    policy = lora.apply(model, adapter, start_model)
    scoring_models = [model] if other_model is None else [model, other_model]
    for scoring_model in scoring_models:
        place(scoring_model, accelerator, config.fsdp)
    collator = choose.choose_layout(
        scoring_models, examples, accelerator, Collator(tokenizer.pad_token_id, config.max_tokens_per_batch),
        config.share_prompt, config.temperature, config.dropout,
    )  # fmt: skip
    if accelerator.is_main_process:
        run_record.update_run(Path(config.output_dir), layout=collator.layout, reference=mode)
    scored = examples + eval_examples
    if mode == "none":
        scored = [replace(example, ref_logps=(0.0,) * len(example.completions)) for example in scored]
    elif mode == "cache":
        cache = Path(config.reference_cache) if config.reference_cache else reference.directory()
        with lora.disabled(policy):
            scored = reference.score(other_model or model, scored, accelerator, collator, config.temperature, cache)
        checks.warn_of_other_sampler(dataset.examples, scored[: len(examples)])
    rows = training_examples.apply(_comparison(config), rows.lines, scored[: len(examples)], scored[len(examples) :])

    console.headline("Training")
    module = preference.PreferenceLoss(
        policy, loss=config.loss, beta_pi=config.beta_pi, beta_r=config.beta_r,
        label_smoothing=config.label_smoothing or 0.0, temperature=config.temperature,
        reference=(other_model or model) if mode == "live" else None,
    ).train(config.dropout)  # fmt: skip
    finish = partial(lora.merged, policy, adapter, accelerator)
    export = partial(
        evaluator.export, directory=Path(config.output_dir), finish=finish, tokenizer=tokenizer, dtypes=dtypes,
        is_main=accelerator.is_main_process,
    )  # fmt: skip
    watch = evaluator.Evaluator(
        module, rows.held_out, collator, accelerator, metrics, eval_steps=config.eval_steps,
        export_steps=config.export_steps, export=export,
    )  # fmt: skip
    not_comparable = "another reference" if config.ref_model is not None or mode in ("none", "data") else ""
    first_batch = next(sampler.BatchSampler(rows.train, 1, config.batch_size, config.seed))
    task = loop.Task(
        module,
        sampler.BatchSampler(rows.train, steps, config.batch_size, config.seed),
        steps,
        collator,
        denominator=len,
        shown=SHOWN,
        steps_per_epoch=sampler.steps_per_epoch(len(rows.train), config.batch_size),
        first=checks.first_loss_check(
            module, first_batch, accelerator.mixed_precision, not_comparable or "dropout" * config.dropout
        ),
        after=watch,
        after_every=(config.eval_steps, config.export_steps),
        parts={"watch": watch},
    )
    settings = loop.Settings(OptimizerSettings(**config.optimizer()), **config.loop())
    loop.train(task, settings, accelerator, metrics)
    directory = training_run.end(metrics, finish(), tokenizer, accelerator, watch.last, dtypes)
    watch.conclude(directory)
    return directory


def read(config: Config, option: str = "data") -> data.Dataset:
    """Read the file of --data or --eval_data."""
    from exo import data
    from exo.rollouts import samples
    from exo.runs import inputs as run_inputs

    path = run_inputs.source(option, getattr(config, option), "score", "prepare", prepared="pairs.jsonl")
    dataset = data.read(path, **config.reading_of(option))
    samples.check_temperature(option, path, dataset.examples, config.temperature)
    if config.target == "rw" and dataset.examples[0].rewards is None:
        raise ValueError(f"--target rw: expected completions with rewards; {path} has preferences")
    return dataset


def tokens(config: Config, dataset: data.Dataset, tokenizer: Any, counts: Counter[str]) -> list[TokenizedExample]:
    """Return every row of a file as tokens, with all its completions, because the reference scores each of them once.

    `counts` gets the rows that are cut, dropped or noted.
    """
    from exo.data.text import tokenize
    from exo.data.text.limits import Limits

    examples, cut = tokenize.encode(
        dataset.examples, tokenizer, Limits(**config.limits()), dataset.path, skip_invalid=config.skip_invalid
    )
    counts.update(cut)
    return [tokenize.factor_prefix(example) for example in examples]


def _comparison(config: Config) -> training_examples.Comparison:
    from exo.training.examples import Comparison

    return Comparison(config.max_completions, config.target == "pref", config.reward_norm)


def parted(
    config: Config,
    dataset: data.Dataset,
    examples: list[TokenizedExample],
    eval_examples: list[TokenizedExample],
    counts: Counter[str],
) -> training_examples.Split:
    """Return the rows to train on and to evaluate on, as the options compare them; DataError if there are none."""
    from exo.training import examples as training_examples

    return training_examples.choose(
        _comparison(config), dataset, examples, eval_examples, counts, path=config.data, eval_path=config.eval_data,
        eval_fraction=config.eval_fraction, seed=config.seed,
    )  # fmt: skip


def reference_model(
    config: Config, examples: list[TokenizedExample], tokenizer: Any, read_model: Callable[[str], tuple[Any, Any]]
) -> tuple[str, Any]:
    """Return how the reference is used, and its model; None if it is the policy's start."""
    from exo.training import reference

    return reference.load(config.reference, config.ref_model, examples, tokenizer, read_model)


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
