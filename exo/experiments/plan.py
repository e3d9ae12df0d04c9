"""Turn a recipe into the steps of a run. A step has a stage, its options, a directory and the steps that it needs.

The plan is the paper's experiment: fine-tune, sample, score, train the reward model, align by every method, evaluate,
report. Preferences come with the data or, if the recipe has an oracle, from the oracle's scores. A reward model is
trained on them; exo-rw, dpo-rw, PPO and Best-of-N use its rewards.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exo.cli.errors import ConfigError
from exo.cli.fields import require, shortened
from exo.cli.parse import build
from exo.cli.spelling import suggestion
from exo.experiments import tasks
from exo.experiments.recipe import Recipe
from exo.runs import record as run_record

STAGES = ("prepare", "sft", "sample", "score", "reward", "align", "ppo", "best_of_n", "evaluate", "report")
SECTIONS = {"prepare", "sft", "classifier", "sample", "density", "bon", "score", "reward", "align", "align.pref"}
SECTIONS |= {"align.rw", "ppo", "best_of_n", "evaluate", "report"}
# Options that the plan sets, in all sections or in one: a recipe's value would have no effect.
PLANNED = {"loss", "target", "model", "data", "samples", "reference", "baseline", "reward_model", "oracle"}
PLANNED |= {"output_dir", "overwrite_output_dir", "reference_cache"}
_SAMPLING = {"temperature", "top_p", "max_new_tokens", "max_prompt_length"}
PLANNED_IN = dict.fromkeys(("align", "align.pref", "ppo", "evaluate"), {"seed"})
PLANNED_IN |= {"align.rw": {"seed", "max_completions"}, "bon": _SAMPLING | {"seed", "k", "prompts", "epochs"}}
PLANNED_IN |= {"density": _SAMPLING}
NOT_SWEPT = {"seed": "; list them under seeds", "max_completions": "; list them under group_sizes"}


class Step(NamedTuple):
    """One stage of a run."""

    name: str  # its directory below the run's
    stage: str
    config: Any
    needs: tuple[str, ...]  # names of steps
    facts: dict[str, Any]  # for the report: the method that is evaluated, its seed, K and values of the sweep


def plan(recipe: Recipe, directory: Path) -> list[Step]:
    """Return the steps in an order in which they can run. ConfigError for options that no stage has."""
    _check_sections(recipe)
    steps = list(_Planner(recipe, directory).steps())
    names = [step.name for step in steps]
    if len(set(names)) < len(names):
        raise ConfigError(f"recipe: two steps have the name {max(names, key=names.count)}; two values are too alike")
    return steps


class _Planner:
    """Generates the steps of a recipe, in order."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory = recipe, directory
        self.names: list[str] = []  # of the steps so far
        self.needs_rewards = any(method in ("exo-rw", "dpo-rw", "ppo", "bon") for method in recipe.methods)
        self.pairs = self.path("labelled" if recipe.oracle else "data/pairs.jsonl")
        # Without an oracle the reward model evaluates, as in the paper's section 4.2.
        self.judge: dict[str, Any] = {"reward_model": self.path("classifier" if recipe.oracle else "reward")}
        if recipe.oracle and recipe.oracle != "classifier":
            self.judge = {"oracle": recipe.oracle}

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def steps(self) -> Iterator[Step]:
        recipe = self.recipe
        tokenizer = recipe.model if recipe.task in tasks.BY_TOKENS else None
        yield self._step("data", "prepare", task=recipe.task, source=recipe.source, tokenizer=tokenizer)
        makes_model = recipe.task in tasks.MODEL_MAKERS
        require(makes_model or bool(recipe.model), "model", "a directory or a hub name to start from", None)
        yield self._step("sft", "sft", model=recipe.model or self.path("data/base"), data=self.path("data/sft.jsonl"))
        yield from self._rewards()
        yield from self._references()
        evaluations = ["evaluation/sft"]
        for method in recipe.methods:
            for step in self._best_of_n() if method == "bon" else self._aligned(method):
                yield step
                evaluations += [step.name] if step.stage == "evaluate" else []
        yield self._step("report", "report", run=str(self.directory))._replace(needs=tuple(evaluations))

    def _rewards(self) -> Iterator[Step]:
        """Sample the fine-tuned model, label preferences, train the reward model on them and score with it."""
        sft, oracle = self.path("sft"), self.recipe.oracle
        if oracle == "classifier":
            data = self.path("data/labelled.jsonl")
            yield self._step("classifier", "reward", ["classifier"], model=sft, labels=True, data=data)
        if self.needs_rewards or oracle:
            yield self._step("samples", "sample", model=sft, data=self.path("data/prompts.jsonl"))
        if oracle:
            yield self._step("labelled", "score", data=self.path("samples"), **self.judge)
        if self.needs_rewards or not oracle:
            yield self._step("reward", "reward", model=sft, data=self.pairs)
        if self.needs_rewards:
            yield self._step("scored", "score", data=self.path("samples"), reward_model=self.path("reward"))

    def _references(self) -> Iterator[Step]:
        """Evaluate the fine-tuned model, and sample it many times for a few prompts, for the density ratio."""
        sft, samples = self.path("sft"), self.path("density/samples")
        aligned = [method for method in self.recipe.methods if method not in ("ppo", "bon")]
        if aligned:
            # The weights pi / pi_ref need samples of the full pi_ref, at the temperature of evaluate.
            options = self._sampling() | {"top_p": 1.0, "model": sft, "data": self.path("data/test.jsonl")}
            yield self._step("density/samples", "sample", ["sample", "density"], **options)
            yield self._step("density/scored", "score", data=samples, **self.judge)
        if self.recipe.oracle and {"exo-rw", "dpo-rw"} & set(aligned):
            # The optimum of these methods is that of the reward model, not of the oracle.
            yield self._step("density/rewarded", "score", data=samples, reward_model=self.path("reward"))
        # The seed differs from those of the methods. With the same seed, pairs of samples would not be independent.
        yield self._evaluation("sft", {"method": "sft"}, model=sft, seed=max(self.recipe.seeds) + 1)

    def _aligned(self, method: str) -> Iterator[Step]:
        """Train and evaluate a method for every K, values of the sweep and seed."""
        recipe = self.recipe
        sizes = recipe.group_sizes if method.endswith("-rw") else [None]
        for k, swept, seed in itertools.product(sizes, self._sweep(method), recipe.seeds):
            parts = [f"k{k}"] if k else []
            parts += [f"{option}={value:g}" for option, value in swept.items()]
            name = f"{method}/{'-'.join([*parts, f'seed{seed}'])}"
            options: dict[str, Any] = {"model": self.path("sft"), "seed": seed, **swept}
            evaluated = {"model": self.path(name), "seed": seed}
            if method == "ppo":
                options |= {"data": self.path("data/prompts.jsonl"), "reward_model": self.path("reward")}
                yield self._step(name, "ppo", **options)
            else:
                loss, target = method.split("-")
                options |= {"data": self.path("scored") if target == "rw" else self.pairs, "loss": loss}
                options |= {"target": target, "reference_cache": self.path("reference")}
                options |= {"max_completions": k} if k else {}
                yield self._step(name, "align", ["align", f"align.{target}"], **options)
                rewarded = recipe.oracle and target == "rw"
                evaluated["density"] = self.path("density/rewarded" if rewarded else "density/scored")
            yield self._evaluation(name, {"method": method, "k": k, "seed": seed, "varied": swept}, **evaluated)

    def _best_of_n(self) -> Iterator[Step]:
        """Sample k blocks of N completions per prompt and evaluate the best of each block by the reward model."""
        n = _integer("best_of_n", "n", self.recipe.stages.get("best_of_n", {}).get("n", 8))
        evaluate = self._evaluate_options()
        k = _integer("evaluate", "k", evaluate["k"])
        sampling = self._sampling() | {"k": n * k, "prompts": evaluate["prompts"], "epochs": 1}
        sampling |= {"model": self.path("sft"), "data": self.path("data/test.jsonl")}
        for seed in self.recipe.seeds:
            name = f"bon/seed{seed}"
            samples, scored, best = (self.path(f"{name}/{part}") for part in ("samples", "scored", "best"))
            yield self._step(f"{name}/samples", "sample", ["sample", "bon"], seed=seed, **sampling)
            yield self._step(f"{name}/scored", "score", data=samples, reward_model=self.path("reward"))
            yield self._step(f"{name}/best", "best_of_n", data=scored, n=n)
            facts: dict[str, Any] = {"method": "bon", "k": None, "seed": seed, "varied": {}, "n": n}
            yield self._evaluation(name, facts, samples=best, seed=seed)

    def _evaluate_options(self) -> dict[str, Any]:
        values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(_config_of("evaluate"))}
        values |= {name: value for name, value in self.recipe.common.items() if name in values}
        return values | dict(self.recipe.stages.get("evaluate", {}))

    def _sampling(self) -> dict[str, Any]:
        """Return the options with which sample draws as evaluate does."""
        values = self._evaluate_options()
        length, new = (_integer("evaluate", name, values[name]) for name in ("max_length", "max_new_tokens"))
        require(length > new, "max_length", f"more than max_new_tokens = {new}, for a prompt too", length)
        same = {name: values[name] for name in ("temperature", "top_p", "max_new_tokens")}
        return same | {"max_prompt_length": length - new}

    def _evaluation(self, name: str, facts: dict[str, Any], **options: Any) -> Step:
        options |= {"reference": self.path("sft"), "data": self.path("data/test.jsonl")} | self.judge
        options |= {} if name == "sft" else {"baseline": self.path("evaluation/sft")}
        if not self.recipe.oracle:
            options["chosen"] = True  # compare with the completions that people chose
        return self._step(f"evaluation/{name}", "evaluate", **options)._replace(facts=facts)

    def _sweep(self, method: str) -> Iterator[dict[str, Any]]:
        """Yield every combination of the swept options that the method's stage has; without any, an empty one."""
        options = _options("ppo" if method == "ppo" else "align")
        sweep = {name: [_number(v) for v in values] for name, values in self.recipe.sweep.items() if name in options}
        for values in itertools.product(*sweep.values()):
            yield dict(zip(sweep, values, strict=True))

    def _step(self, name: str, stage: str, sections: Sequence[str] = (), **options: Any) -> Step:
        """Return a step with the options of common, then of the sections (default: the stage's), then `options`.

        The step needs all earlier steps in whose directories its inputs are.
        """
        options_of_stage = _options(stage)
        values: dict[str, Any] = {key: value for key, value in self.recipe.common.items() if key in options_of_stage}
        for section in sections or [stage]:
            for key, value in self.recipe.stages.get(section, {}).items():
                if key not in options_of_stage:
                    raise ConfigError(f"recipe: {section}: unknown option {key!r}{suggestion(key, options_of_stage)}")
                values[key] = value
        values |= options | {"output_dir": self.path(name), "overwrite_output_dir": True}
        try:
            config = build(_config_of(stage), values)
        except ConfigError as error:
            raise ConfigError(f"recipe: {name}: {error}") from None
        inputs = [Path(value) for option in run_record.STAGES[stage].reads if (value := getattr(config, option))]
        needs = tuple(n for n in self.names if any(path.is_relative_to(self.directory / n) for path in inputs))
        self.names.append(name)
        return Step(name, stage, config, needs, {})


def _number(value: Any) -> float:
    """Return a number of a sweep, as an int if it is one. To YAML, 1e-3 is a text."""
    number = float(value)
    return int(number) if number.is_integer() else number


def _integer(section: str, name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        got = shortened(repr(value), 100)
        raise ConfigError(f"recipe: {section}: --{name}: expected an integer; got {got}") from None


def _check_sections(recipe: Recipe) -> None:
    """Raise ConfigError for sections and options that no step reads."""
    for section, options in recipe.stages.items():
        if section not in SECTIONS:
            raise ConfigError(f"recipe: unknown section {section!r}{suggestion(section, SECTIONS)}")
        if planned := (PLANNED | PLANNED_IN.get(section, set())) & options.keys():
            raise ConfigError(f"recipe: {section}: {min(planned)} is set by the plan")
        if shared := {"dtype", "device"} & options.keys():
            raise ConfigError(f"recipe: {section}: {min(shared)} belongs under common; steps share a process")
    all_options = {name for stage in STAGES for name in _options(stage)}
    for section, names in (("common", recipe.common), ("sweep", recipe.sweep)):
        for name in names:
            if name in PLANNED or section == "sweep" and name in NOT_SWEPT:
                raise ConfigError(f"recipe: {section}: {name} is set by the plan{NOT_SWEPT.get(name, '')}")
            if name not in (all_options if section == "common" else _options("align") | _options("ppo")):
                raise ConfigError(f"recipe: {section}: unknown option {name!r}{suggestion(name, all_options)}")


def _options(stage: str) -> set[str]:
    return {field.name for field in dataclasses.fields(_config_of(stage))}


def _config_of(stage: str) -> Any:
    return importlib.import_module(f"exo.{stage}").Config
