"""Measure reward, accuracy, KL to the reference and win rates of the models that a run saved, on held-out prompts.

    python -m exo.evaluate --model RUN --reference DIR --data PROMPTS (--reward_model DIR | --oracle module:function)

It samples k completions per prompt from every model that the run saved. --samples FILE evaluates given completions
instead, such as those of exo.best_of_n. Writes evaluation.json, samples/, and with --density the log-probs of the
reference's samples, from which the report draws the density ratio. For a judge that is a chat model or a person, see
exo.judge and exo.label.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from exo.data import Dataset, Example
    from exo.models.logps import ScoringModels, Tokens
    from exo.rollouts.saved_models import SavedModel, SavedModelSampler
    from exo.rollouts.scorers import Scores

from exo.cli import console
from exo.cli.fields import MODEL, POSITIVE, TOP_P, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import ChatOptions, DataOptions, ScorerOptions, Scoring
from exo.runs.stage import Start, stage


@dataclass(frozen=True)
class Config(Scoring, DataOptions, ChatOptions, ScorerOptions):
    output_dir: str = option("runs/evaluation", "directory of the run")
    model: str | None = option(None, "run whose saved models are evaluated, or a causal LM")
    samples: str | None = option(None, "completions to evaluate instead of a model's")
    reference: str | None = option(None, "the causal LM that the KL is measured to; needed with --model")
    data: str = option("", "held-out prompts: any data file that has them", named("a file of prompts"))
    chosen: bool = option(False, "also compare with the chosen completions, which the data then must have")
    baseline: str | None = option(None, "an evaluation of the reference, to compare with")
    density: str | None = option(None, "scored samples of the reference, many a prompt, for the density ratio")
    prompts: int = option(512, "use at most so many prompts", at_least(2))
    k: int = option(4, "completions a prompt", at_least(1))
    temperature: float = option(1.0, "divides the logits, of policy and reference", POSITIVE)
    top_p: float = option(
        1.0, "draw from the most probable tokens; the KL is of the whole distribution, by further samples of it", TOP_P
    )
    max_new_tokens: int = option(256, "tokens of a completion, its end of sequence included", at_least(1))
    max_length: int = option(1024, "tokens of prompt and completion together; a longer prompt loses its left")
    batch_size: int = option(256, "completions sampled at a time", at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("model", "samples") if getattr(self, name)]
        require(len(given) == 1, "model", "this or --samples, and not both", " and ".join(given) or "neither")
        require(
            not (self.density and self.samples), "density", "none with --samples, which have no model", self.density
        )
        require(bool(self.reference or self.samples), "reference", MODEL.expected, self.reference)
        require(self.max_length > self.max_new_tokens, "max_length", "more than max_new_tokens", self.max_length)


class Inputs(NamedTuple):
    """The prompts, and either a reference model or given completions."""

    prompts: list[str]
    chosen: list[Example]  # with --chosen
    given: list[Example]  # with --samples
    reference: Any  # with --model
    tokenizer: Any


@stage(
    "evaluate",
    reads=("model", "samples", "reference", "data", "baseline", "density", "reward_model", "oracle"),
    makes="evaluation.json",
)
def run(config: Config, start: Start) -> Path:
    """Evaluate and return the run directory, which has evaluation.json."""
    from exo import data
    from exo.distributed import gather
    from exo.distributed.accelerator import make_accelerator
    from exo.evaluation import baseline, metrics
    from exo.rollouts import samples, scorers, shards
    from exo.rollouts.saved_models import SavedModelSampler
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_file, write_json

    dataset = _read(config)
    accelerator = make_accelerator(**config.accelerator())
    date = gather.template_date(start, accelerator)
    inputs = _load_inputs(config, dataset, date)
    sampling = samples.Settings(config.temperature, config.max_new_tokens, config.top_p)
    settings = {"k": config.k} | sampling._asdict()
    if config.samples:
        settings = baseline.settings_of(inputs.given, config.samples)
    baseline_scores = None
    if config.baseline:
        scorer_options = {"oracle": config.oracle, "reward_model": config.reward_model}
        baseline_scores = baseline.read(
            config.baseline, inputs.prompts, settings, scorer_options, start.facts["inputs"]
        )
    density = _read_density(config) if config.density else None
    scorer = scorers.load(config.reward_model, config.oracle, accelerator, **_scorer_options(config), date=date)
    chosen_scores, counts = shards.score_shared(scorer, inputs.chosen, accelerator)
    sampler = SavedModelSampler(
        inputs.prompts,
        sampling,
        accelerator=accelerator,
        **config.values("k seed batch_size max_length max_tokens_per_batch"),
    )
    sampled = _sample(config, inputs, sampler, date)
    directory = Path(config.output_dir)
    if accelerator.is_main_process:
        run_stage.begin(start)
        (directory / "samples").mkdir()
    size = settings["k"] or "several numbers of"
    console.log(f"{len(inputs.prompts):,} prompts x {size} completions, scored by {scorer.name}")
    entries, rows = [], []
    for saved, examples, scoring_models in sampled:
        scores, more_counts = shards.score_shared(scorer, examples, accelerator)
        counts += more_counts
        ratios = sampler.log_ratios(scoring_models, examples) if scoring_models else None
        if accelerator.is_main_process:
            _write_samples(directory / "samples" / f"{saved.name}.jsonl", examples, scores, ratios and ratios[0])
        entry = {"name": saved.name, "step": saved.step}
        entry |= metrics.of_rewards(scores, baseline_scores, chosen_scores or None) | samples.describe(examples)
        entry |= _kl(ratios[1]) if ratios else _kl_bound(config)
        console.log(f"  {saved.name:10s} {_line(entry)}")
        samples.log_cut(examples)
        entries.append(entry)
        if density and scoring_models and saved.name == "final":
            rows = scoring_models.density(*density)
        del scoring_models  # before the next model is loaded
    console.counts(counts)
    if accelerator.is_main_process:
        if rows:
            with atomic_file(directory / "density.jsonl") as file:
                data.write_jsonl(file, rows)
        result = settings | {"scorer": scorer.name, "prompts": len(inputs.prompts), "checkpoints": entries}
        write_json(directory / "evaluation.json", result)
        run_stage.finish(directory)
    return directory


def _read(config: Config) -> Dataset:
    """Read the held-out prompts, with their chosen completions if --chosen compares them."""
    from exo import data
    from exo.runs import inputs as run_inputs

    path = run_inputs.source("data", config.data, "prepare", prepared="test.jsonl")
    dataset = data.read(path, purpose="texts" if config.chosen else "prompts", **config.reading(), **config.mixing())
    console.log(dataset.summary())
    if len(dataset.examples) < 2:
        raise data.DataError(f"{path}: expected at least two prompts, because one has no standard error")
    return dataset


def _load_inputs(config: Config, dataset: Dataset, date: datetime.date) -> Inputs:
    """Load the reference model and render the prompts for it, or read the given completions."""
    from exo import models
    from exo.data.text import render, tokenize
    from exo.runs import inputs as run_inputs

    if config.samples:
        examples = dataset.examples[: config.prompts]
        given = _read_samples(config, [example.prompt for example in examples])
        return Inputs([example.prompt for example in given], examples if config.chosen else [], given, None, None)
    reference, tokenizer = models.load(run_inputs.source("reference", config.reference or "", "sft", "align", "ppo"))
    (dataset,) = render.apply(tokenizer, config.chat_template, config.template_kwargs, date, dataset)
    usable, dropped = tokenize.usable_prompts(dataset, tokenizer, skip_invalid=config.skip_invalid)
    console.counts(dropped)
    examples = usable[: config.prompts]
    prompts = [example.prompt for example in examples]
    return Inputs(prompts, examples if config.chosen else [], [], reference, tokenizer)


def _read_samples(config: Config, prompts: Sequence[str]) -> list[Example]:
    """Read the completions of --samples; ValueError if their prompts are not those of --data, in the same order."""
    from exo import data
    from exo.data import Example
    from exo.data.text import render
    from exo.runs import inputs as run_inputs

    path = run_inputs.source("samples", config.samples or "", "sample", "score", "best_of_n")
    examples = data.read(path, purpose="samples", columns_required=False, **config.reading()).examples[: len(prompts)]
    if isinstance(examples[0].prompt, data.Chat):  # sampled with --chat_template always
        prompts = [render.render(Example(prompt, (), None, 0)).prompt for prompt in prompts]
    if [example.prompt for example in examples] != list(prompts):
        raise ValueError(f"--samples {path}: expected the prompts of --data, in their order; got others")
    return examples


def _read_density(config: Config) -> tuple[list[Example], str]:
    """Return the reference's samples for the density ratio, and their path."""
    from exo import data
    from exo.rollouts import samples
    from exo.runs import inputs as run_inputs

    path = run_inputs.source("density", config.density or "", "score")
    examples = data.read(path, purpose="samples", columns_required=False, **config.reading()).examples
    samples.check_temperature("density", path, examples, config.temperature)
    return examples, path


def _scorer_options(config: Config) -> dict[str, Any]:
    from exo.data.text import render

    template = render.second_model_option(config.chat_template) if config.model else config.chat_template
    return config.values("max_length max_tokens_per_batch") | {
        "max_prompt_length": config.max_length - config.max_new_tokens,
        "chat_template": template,
        "template_kwargs": None if config.model else config.template_kwargs,
    }


def _sample(
    config: Config, inputs: Inputs, sampler: SavedModelSampler, date: datetime.date
) -> Iterable[tuple[SavedModel, list[Example], ScoringModels | None]]:
    """Return an iterator over saved models and their samples; ValueError if the reference has other tokens."""
    from exo import models
    from exo.data.text import tokenize
    from exo.rollouts.saved_models import SavedModel, list_saved_models
    from exo.runs import inputs as run_inputs

    if not config.model:
        return [(SavedModel("samples", None, config.samples or ""), inputs.given, None)]
    model = run_inputs.source("model", config.model, "sft", "align", "ppo")
    if models.load_tokenizer(model).get_vocab() != inputs.tokenizer.get_vocab():
        raise ValueError(
            f"--reference {config.reference}: expected the tokenizer of --model {model}; got another; pass the model "
            "that it was trained from"
        )
    inputs.reference.to(sampler.accelerator.device)
    max_prompt_length = config.max_length - config.max_new_tokens
    console.counts(tokenize.sampled_prompts(inputs.prompts, inputs.tokenizer, max_prompt_length)[1])
    template = config.values("chat_template template_kwargs")
    return sampler.sample(list_saved_models(model), inputs.reference, date=date, **template)


def _kl(ratios: Tokens) -> dict[str, Any]:
    from exo.evaluation import metrics

    return {"kl": metrics.summary(metrics.kl_k1(ratios)), "kl_k3": metrics.summary(metrics.kl_k3(ratios))}


def _kl_bound(config: Config) -> dict[str, Any]:
    """Return the bound on the KL that the stage behind --samples recorded, if it did."""
    from exo.runs import record

    path = Path(config.samples or "")
    run = record.record(path) or record.record(path.parent) or {}
    return {name: value for name, value in run.get("result", {}).items() if name in ("kl_bound", "n")}


def _write_samples(path: Path, examples: Sequence[Example], scores: Scores, ratios: Tokens | None) -> None:
    """Write completions with their rewards and, if there are any, their log-ratios."""
    from exo import data
    from exo.rollouts import samples
    from exo.runs.atomic import atomic_file

    rows = [samples.to_row(replace(example, rewards=row)) for example, row in zip(examples, scores, strict=True)]
    for row, per_completion in zip(rows, ratios or [], strict=bool(ratios)):
        row["log_ratios"] = [float(tokens.sum()) for tokens in per_completion]
    with atomic_file(path) as file:
        data.write_jsonl(file, rows)


def _line(entry: dict[str, Any]) -> str:
    def shown(value: dict[str, float], form: str) -> str:
        return f"{value['mean']:{form}} +- {value['standard_error']:.2f}"

    parts = [f"reward {shown(entry['reward'], '+.2f')}"]
    if "kl" in entry:
        parts.append(f"KL {shown(entry['kl'], '.2f')} nats")
    if "kl_bound" in entry:
        parts.append(f"KL <= {entry['kl_bound']:.2f} nats")
    parts += [f"{100 * rate['mean']:.0f}% over {name}" for name, rate in entry["win_rate"].items()]
    return "  ".join(parts)


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
