"""Align a causal LM with EXO or DPO, on preferences or rewards.

    python -m exo.align --model DIR_OR_NAME --data FILE

Reference log-probs are computed once, before training. The run directory is the model directory.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from exo.cli import console
from exo.cli.fields import NOT_NEGATIVE, PART, POSITIVE, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import AdapterOptions, DataOptions, Norm, ReferenceMode, SharePrompt
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo import data
    from exo.data import comparison
    from exo.data.collate import Collator
    from exo.data.text.tokenize import TokenizedExample
    from exo.training.evaluator import Evaluator
    from exo.training.loop import Task
    from exo.training.preference import PreferenceLoss

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
    reference_cache: str | None = option(None, "directory of cached log-probs; none: exo/reference in ~/.cache")
    loss: Literal["exo", "dpo"] = option("exo", "exo: reverse KL; dpo: forward KL")
    beta_pi: float = option(0.1, "scale of the policy's log-ratios", POSITIVE)
    beta_r: float = option(0.1, "temperature of the rewards (unused on preferences)", POSITIVE)
    label_smoothing: float | None = option(None, "eps, on preferences only; none: 1e-3 for exo, 0 for dpo")
    temperature: float = option(1.0, "divides the logits; the temperature of the samples", POSITIVE)
    eval_fraction: float = option(0.1, "share of the prompts held out; 0 means none", PART)
    eval_data: str | None = option(None, "a held-out file, instead of eval_fraction")
    export_steps: int = option(
        0, "save a loadable model every N steps, in output_dir/models/step-N (0: only at the end)", NOT_NEGATIVE
    )
    eval_steps: int = option(
        0, "evaluate every N steps and keep the best model in output_dir/models/best (0: at the end)", NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing is None:
            object.__setattr__(self, "label_smoothing", 1e-3 if self.loss == "exo" else 0.0)
        eps = self.label_smoothing
        assert eps is not None
        expected = "in (0, 1) for exo" if self.loss == "exo" else "in [0, 1)"
        require(0 <= eps < 1 and not (eps == 0 and self.loss == "exo"), "label_smoothing", expected, eps)


class Rows(NamedTuple):
    """The rows as tokens, with all their completions, and how the options compare and split them."""

    dataset: data.Dataset  # with rendered prompts
    examples: list[TokenizedExample]
    eval_examples: list[TokenizedExample]  # of --eval_data
    split: comparison.Split
    counts: Counter[str]  # rows cut, dropped or noted, by reason


@stage("align", reads=("model", "ref_model", "data", "eval_data"), makes=".")
def run(config: Config, start: Start) -> Path:
    """Align and return the run directory."""
    import copy

    from exo import models
    from exo.data import comparison, preview
    from exo.data.collate import Collator
    from exo.distributed import fsdp, gather
    from exo.distributed.accelerator import Training, make_accelerator, place, set_seed
    from exo.models import lora
    from exo.models.attention import choose
    from exo.runs import inputs as run_inputs
    from exo.runs import record as run_record
    from exo.training import checks, evaluator, loop, preference, reference, sampler
    from exo.training import run as training_run
    from exo.training.optimizer import OptimizerSettings

    datasets = _read_all(config)
    accelerator = make_accelerator(**config.accelerator(), training=Training(**config.parallel()))
    set_seed(config.seed)

    console.headline("Data")
    console.log("\n".join(dataset.summary() for dataset in datasets))
    console.headline("Model")
    adapter = lora.LoraSettings(**config.lora())
    lora.check(adapter, config.model)
    start_model = run_inputs.source("model", config.model, "sft", "align", "ppo")
    shards = fsdp.is_requested(config.fsdp)
    model, tokenizer = lora.load(start_model, datasets[0].texts, adapter, accelerator, seed=config.seed, sharded=shards)
    dtypes = models.dtypes_of(config.save_dtype, start_model)
    rows = _tokenize(config, datasets, model, tokenizer, gather.template_date(start, accelerator))
    read_model = partial(models.load, mapped=shards)
    all_examples = rows.examples + rows.eval_examples
    mode, other_model = reference.load(config.reference, config.ref_model, all_examples, tokenizer, read_model)
    training_run.describe(
        model, rows.split.train, accelerator, loss=config.loss, batch_size=config.batch_size,
        steps=sampler.total_steps(len(rows.split.train), **config.epochs()), max_tokens=config.max_tokens_per_batch,
        adapter=bool(config.lora_r), second_model=other_model is not None or (mode == "live" and not config.lora_r),
        shards=accelerator.num_processes if shards else 1,
    )  # fmt: skip
    preview.show(rows.split.train, tokenizer, preview.LOSS_AFTER_PREFIX)
    metrics = training_run.begin(start, accelerator, rows.dataset.account(rows.counts))

    console.headline("Reference log-probs")
    if mode == "live" and not config.lora_r:
        other_model = other_model or copy.deepcopy(model)
    policy = lora.apply(model, adapter, start_model)
    scoring_models = [model] if other_model is None else [model, other_model]
    for scoring_model in scoring_models:
        place(scoring_model, accelerator, config.fsdp)
    collator = choose.choose_layout(
        scoring_models, rows.examples, accelerator, Collator(tokenizer.pad_token_id, config.max_tokens_per_batch),
        config.share_prompt, config.temperature, config.dropout,
    )  # fmt: skip
    if accelerator.is_main_process:
        run_record.update_run(Path(config.output_dir), layout=collator.layout, reference=mode)
    cache = Path(config.reference_cache) if config.reference_cache else reference.directory()
    with lora.disabled(policy):
        examples, eval_examples = reference.score_as(
            mode, other_model or model, (rows.examples, rows.eval_examples), accelerator, collator,
            config.temperature, cache,
        )  # fmt: skip
    if mode == "cache":
        checks.warn_of_other_sampler(rows.dataset.examples, examples)
    split = comparison.split_scored_rows(_comparison(config), rows.split.lines, examples, eval_examples)

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
        module, split.held_out, collator, accelerator, metrics, eval_steps=config.eval_steps,
        export_steps=config.export_steps, export=export,
    )  # fmt: skip
    settings = loop.Settings(OptimizerSettings(**config.optimizer()), **config.loop())
    loop.train(_task(config, module, split.train, mode, collator, watch), settings, accelerator, metrics)
    directory = training_run.end(metrics, finish(), tokenizer, accelerator, watch.last, dtypes)
    watch.conclude(directory)
    return directory


def _read_all(config: Config) -> list[data.Dataset]:
    """Read --data and, if there is one, --eval_data; warn if they share texts."""
    from exo.data import split

    datasets = [read(config)]
    if config.eval_data:
        datasets.append(read(config, "eval_data"))
        split.warn_of_leaks(*datasets)
    return datasets


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


def _tokenize(
    config: Config, datasets: Sequence[data.Dataset], model: Any, tokenizer: Any, date: datetime.date
) -> Rows:
    """Render, tokenize and split the rows; print what was cut or dropped, also if an error stops the run."""
    from exo import models
    from exo.data.text import render

    dataset, *others = render.apply(tokenizer, config.chat_template, config.template_kwargs, date, *datasets)
    counts: Counter[str] = Counter()
    try:
        examples, *rest = (tokens(config, part, tokenizer, counts) for part in (dataset, *others))
        eval_examples = rest[0] if rest else []
        models.check_fits(model, examples + eval_examples)
        split = split_rows(config, dataset, examples, eval_examples, counts)
    finally:
        console.counts(counts)
    return Rows(dataset, examples, eval_examples, split, counts)


def _comparison(config: Config) -> comparison.Comparison:
    from exo.data.comparison import Comparison

    return Comparison(config.max_completions, config.target == "pref", config.reward_norm)


def split_rows(
    config: Config,
    dataset: data.Dataset,
    examples: list[TokenizedExample],
    eval_examples: list[TokenizedExample],
    counts: Counter[str],
) -> comparison.Split:
    """Return the rows to train on and to evaluate on, as the options compare them; DataError if there are none."""
    from exo.data import comparison

    return comparison.split_rows(
        _comparison(config), dataset, examples, eval_examples, counts, path=config.data, eval_path=config.eval_data,
        eval_fraction=config.eval_fraction, seed=config.seed,
    )  # fmt: skip


def _task(
    config: Config,
    module: PreferenceLoss,
    examples: list[TokenizedExample],
    mode: str,
    collator: Collator,
    watch: Evaluator,
) -> Task:
    from exo.training import checks, loop, sampler

    first_batch = next(sampler.BatchSampler(examples, 1, config.batch_size, config.seed))
    not_comparable = "another reference" if config.ref_model is not None or mode in ("none", "data") else ""
    return loop.Task.over_epochs(
        module,
        examples,
        collator,
        **config.epochs(),
        seed=config.seed,
        denominator=len,
        shown=SHOWN,
        first=checks.first_loss_check(
            module, first_batch, watch.accelerator.mixed_precision, not_comparable or "dropout" * config.dropout
        ),
        after=watch,
        after_every=(config.eval_steps, config.export_steps),
        parts={"watch": watch},
    )


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
