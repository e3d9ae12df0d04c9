"""Evaluation: reward, accuracy, KL to the reference and win rates of a policy's checkpoints, on held-out prompts.

python -m exo.evaluate --model RUN --reference DIR --data PROMPTS --reward_model DIR, or --oracle module:function. Every
checkpoint of the run is sampled, k completions per prompt. --samples FILE evaluates completions that exist (of
Best-of-N) instead. Writes evaluation.json, samples/, and with --density log-probs of the reference's own samples, for
the picture of the density ratio. Chat models and human raters judge with exo.judge and exo.label.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from exo.data import Dataset, Example
    from exo.data.text.limits import Limits
    from exo.distributed.accelerator import Accelerator
    from exo.evaluation.baseline import Settings
    from exo.models.logps import ScoringModels
    from exo.rollouts.samples import Settings as SamplingSettings

from exo.cli import console
from exo.cli.fields import MODEL, POSITIVE, TOP_P, at_least, named, option, require
from exo.cli.main import command
from exo.cli.options import ChatOptions, DataOptions, ScorerOptions, Scoring
from exo.runs.stage import Start, stage


@dataclass(frozen=True)
class Config(Scoring, DataOptions, ChatOptions, ScorerOptions):
    output_dir: str = option("runs/evaluation", "directory of the run")
    model: str | None = option(None, "run whose checkpoints are evaluated, or a causal LM")
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


class Checkpoint(NamedTuple):
    name: str
    step: int | None
    path: str


@stage(
    "evaluate",
    reads=("model", "samples", "reference", "data", "baseline", "density", "reward_model", "oracle"),
    makes="evaluation.json",
)
def run(config: Config, start: Start) -> Path:
    """Evaluate and return the run directory, which has evaluation.json."""
    from exo import data, models
    from exo.data.text import render, tokenize
    from exo.distributed import gather
    from exo.distributed.accelerator import make_accelerator
    from exo.evaluation import baseline
    from exo.evaluation import metrics as evaluation_metrics
    from exo.rollouts import samples, scorers, shards
    from exo.runs import inputs as run_inputs
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_file, write_json

    dataset = _read(config)
    accelerator = make_accelerator(**config.accelerator())
    if config.model:
        reference, known = models.load(run_inputs.source("reference", config.reference or "", "sft", "align", "ppo"))
        (dataset,) = render.apply(
            known, config.chat_template, config.template_kwargs, gather.template_date(start, accelerator), dataset
        )
        usable, dropped = tokenize.usable_prompts(dataset, known, skip_invalid=config.skip_invalid)
        console.counts(dropped)
    else:
        usable = dataset.examples
    prompts = [example.prompt for example in usable[: config.prompts]]
    chosen = usable[: config.prompts] if config.chosen else []
    given = _given(config, prompts) if config.samples else []
    prompts = [example.prompt for example in given] or prompts
    settings = baseline.settings_of(given, config.samples) if config.samples else _settings(config)
    before = _baseline(config, prompts, settings, start)
    dense = _density(config) if config.density else None
    scorer = scorers.load(
        config.reward_model, config.oracle, accelerator, max_length=config.max_length,
        max_prompt_length=config.max_length - config.max_new_tokens, max_tokens_per_batch=config.max_tokens_per_batch,
        chat_template=render.of_another_model(config.chat_template) if config.model else config.chat_template,
        template_kwargs=None if config.model else config.template_kwargs, date=gather.template_date(start, accelerator),
    )  # fmt: skip
    chosen_scores, remarks = shards.score_shared(scorer, chosen, accelerator)
    if config.model:
        reference.to(accelerator.device)
        console.counts(tokenize.sampled_prompts(prompts, known, config.max_length - config.max_new_tokens)[1])
        found = _checkpoints(config, known)
        drawn = _sampled(config, prompts, accelerator, found, reference, gather.template_date(start, accelerator))
    else:
        drawn = iter([(Checkpoint("samples", None, config.samples or ""), given, None)])
    directory, main = Path(config.output_dir), accelerator.is_main_process
    if main:
        run_stage.begin(start)
        (directory / "samples").mkdir()
    shown = "several numbers of" if settings["k"] is None else settings["k"]
    console.log(f"{len(prompts):,} prompts x {shown} completions, scored by {scorer.name}")
    entries = []
    for checkpoint, examples, pair in drawn:
        scores, more = shards.score_shared(scorer, examples, accelerator)
        remarks += more
        entry = {"name": checkpoint.name, "step": checkpoint.step} | evaluation_metrics.of_rewards(
            scores, before, chosen_scores or None
        )
        entry |= samples.describe(examples)
        rows = [
            samples.to_row(replace(example, rewards=values)) for example, values in zip(examples, scores, strict=True)
        ]
        if pair is not None:
            entry |= _kl(config, pair, prompts, examples, rows)
        else:
            entry |= _bound(config)
        if main:
            with atomic_file(directory / "samples" / f"{checkpoint.name}.jsonl") as file:
                data.write_jsonl(file, rows)
        console.log(f"  {checkpoint.name:10s} {_line(entry)}")
        samples.log_cut(examples)
        entries.append(entry)
    console.counts(remarks)
    density = pair.density(*dense) if dense and pair else []
    if not main:
        return directory
    if density:
        with atomic_file(directory / "density.jsonl") as file:
            data.write_jsonl(file, density)
    result = settings | {"scorer": scorer.name, "prompts": len(prompts), "checkpoints": entries}
    write_json(directory / "evaluation.json", result)
    run_stage.finish(directory)
    return directory


def _kl(
    config: Config,
    pair: ScoringModels,
    prompts: Sequence[str],
    examples: Sequence[Example],
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The KL of the whole distribution; each of the rows gets the log-ratios of its completions."""
    from exo.evaluation import metrics as evaluation_metrics

    ratios = pair.log_ratios(examples)
    for row, of_row in zip(rows, ratios, strict=True):
        row["log_ratios"] = [float(tokens.sum()) for tokens in of_row]
    if config.top_p < 1:  # these completions are not of the whole distribution, and their mean would be biased
        ratios = pair.log_ratios(_draw(config, pair.policy, pair.tokenizer, prompts, pair.accelerator, top_p=1.0))
    return {
        name: evaluation_metrics.summary(of(ratios))
        for name, of in (("kl", evaluation_metrics.kl_k1), ("kl_k3", evaluation_metrics.kl_k3))
    }


def _read(config: Config) -> Dataset:
    """Read held-out prompts, with their chosen completions if those are compared."""
    from exo import data
    from exo.runs import inputs as run_inputs

    path = run_inputs.source("data", config.data, "prepare", prepared="test.jsonl")
    dataset = data.read(path, purpose="texts" if config.chosen else "prompts", **config.reading(), **config.mixing())
    console.log(dataset.summary())
    if len(dataset.examples) < 2:
        raise data.DataError(f"{path}: expected two prompts at least, or no mean has an error")
    return dataset


def _settings(config: Config) -> Settings:
    return {"k": config.k} | _sampling(config)._asdict()


def _sampling(config: Config) -> SamplingSettings:
    from exo.rollouts import samples

    return samples.Settings(config.temperature, config.max_new_tokens, config.top_p)


def _baseline(config: Config, prompts: Sequence[str], settings: Settings, start: Start) -> Any:
    from exo.evaluation import baseline

    if config.baseline is None:
        return None
    scorer = {name: getattr(config, name) for name in ("oracle", "reward_model")}
    return baseline.read(config.baseline, prompts, settings, scorer, start.facts["inputs"])


def checkpoints(model: str) -> list[Checkpoint]:
    """Those that a run left, in order of their steps, and what it ended with, once."""
    from exo import data

    directory = Path(model)
    log = directory / "metrics.jsonl"
    steps = [row["step"] for _, row in data.read_jsonl(log)] if log.exists() else []
    last = max(steps, default=None)
    found = [Checkpoint(path.name, int(path.name[5:]), str(path)) for path in directory.glob("models/step-*")]
    before = sorted((c for c in found if c.step != last), key=lambda c: c.step or 0)
    return [*before, Checkpoint("final", last, model)]


def _checkpoints(config: Config, known: Any) -> list[Checkpoint]:
    """Those of the model; ValueError where the reference's tokenizer, `known`, is another: there is no KL then."""
    from exo import models
    from exo.runs import inputs as run_inputs

    name = run_inputs.source("model", config.model or "", "sft", "align", "ppo")
    if models.load_tokenizer(name).get_vocab() != known.get_vocab():
        raise ValueError(
            f"--reference {config.reference}: expected the tokenizer of --model {name}; got another; name the model "
            "that it was trained from"
        )
    return checkpoints(name)


def _sampled(
    config: Config,
    prompts: Sequence[str],
    accelerator: Accelerator,
    found: Sequence[Checkpoint],
    reference: Any,
    date: datetime.date,
) -> Iterator[tuple[Checkpoint, list[Example], ScoringModels | None]]:
    """(checkpoint, its samples, its model with the reference), each loaded when its turn comes."""
    from exo import models
    from exo.data.text import render
    from exo.models.logps import ScoringModels

    for checkpoint in found:
        model, tokenizer = models.load(checkpoint.path)
        render.configure(tokenizer, config.chat_template, config.template_kwargs, date)
        model.to(accelerator.device)
        examples = _draw(config, model, tokenizer, prompts, accelerator, top_p=config.top_p)
        yield (
            checkpoint,
            examples,
            ScoringModels(
                model,
                reference,
                tokenizer,
                accelerator,
                config.max_tokens_per_batch,
                _limits(config),
                config.temperature,
            ),
        )


def _draw(
    config: Config, model: Any, tokenizer: Any, prompts: Sequence[str], accelerator: Accelerator, *, top_p: float
) -> list[Example]:
    from exo.rollouts import samples, shards

    with accelerator.autocast():
        return samples.draw(
            model, tokenizer, prompts, _sampling(config)._replace(top_p=top_p), k=config.k,
            max_prompt_length=config.max_length - config.max_new_tokens, seed=config.seed,
            batch_size=config.batch_size, run=partial(shards.sample_shared, accelerator=accelerator),
        )  # fmt: skip


def _given(config: Config, prompts: Sequence[str]) -> list[Example]:
    """The completions of a file, for the prompts of the data and in their order."""
    from exo import data
    from exo.data import Example
    from exo.data.text import render
    from exo.runs import inputs as run_inputs

    assert config.samples is not None
    path = run_inputs.source("samples", config.samples, "sample", "score", "best_of_n")
    examples = data.read(path, purpose="samples", columns_required=False, **config.reading()).examples[: len(prompts)]
    if isinstance(examples[0].prompt, data.Chat):  # sampled with --chat_template always
        prompts = [render.render(Example(prompt, (), None, 0)).prompt for prompt in prompts]
    if [example.prompt for example in examples] != list(prompts):
        raise ValueError(f"--samples {path}: expected the prompts of --data, in their order; got others")
    return examples


def _limits(config: Config) -> Limits:
    """Of what was sampled: log-probs are conditional on as much of a prompt as its completions were."""
    from exo.data.text.limits import Limits

    return Limits(config.max_length, None, "prompt-left", config.max_length - config.max_new_tokens)


def _bound(config: Config) -> dict[str, Any]:
    """The KL that the maker of the samples knows, where it does."""
    from exo.runs import record as run_record

    run = run_record.record(Path(config.samples or "")) or run_record.record(Path(config.samples or "").parent) or {}
    return {name: value for name, value in run.get("result", {}).items() if name in ("kl_bound", "n")}


def _density(config: Config) -> tuple[list[Example], str]:
    """The reference's samples for the density ratio, and their file."""
    from exo import data
    from exo.rollouts import samples
    from exo.runs import inputs as run_inputs

    path = run_inputs.source("density", config.density or "", "score")
    examples = data.read(path, purpose="samples", columns_required=False, **config.reading()).examples
    samples.check_temperature("density", path, examples, config.temperature)
    return examples, path


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
