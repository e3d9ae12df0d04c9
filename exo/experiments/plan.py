"""From a recipe to the steps of a run: which stage, with which options, into which directory, after which others.

A recipe is a YAML file: the task, the methods, and the options of each stage by their own names. `plan` is the paper's
experiment: fine-tune, sample, score, train the reward model, align by every method, evaluate, report. Preferences come
with the data or, where the recipe has an oracle, from the oracle's scores; the reward model learns from them and drives
exo-rw, dpo-rw, PPO and Best-of-N. Left out: running the steps (train).
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
from exo.experiments.recipe import METHODS, RECIPES, SHIPPED, Recipe, load
from exo.runs import record as run_record

__all__ = ["METHODS", "RECIPES", "SHIPPED", "Recipe", "Step", "load", "plan"]

SECTIONS = [
    *("prepare", "sft", "classifier", "sample", "density", "bon", "score", "reward", "align", "align.pref", "align.rw"),
    *("ppo", "best_of_n", "evaluate", "report"),
]
PLANNED = {
    "loss",
    "target",
    "model",
    "data",
    "samples",
    "reference",
    "baseline",
    "reward_model",
    "oracle",
    "output_dir",
    "overwrite_output_dir",
    "reference_cache",
}
SWEPT_OTHERWISE = {"seed": "; list them under seeds", "max_completions": "; list them under group_sizes"}
# What the plan sets in these sections alone: a value here would be dropped.
_DRAWN = {"temperature", "top_p", "max_new_tokens", "max_prompt_length", "seed"}
PLANNED_IN = dict.fromkeys(("align", "align.pref", "ppo", "evaluate"), {"seed"})
PLANNED_IN |= {"align.rw": {"seed", "max_completions"}, "bon": _DRAWN | {"k", "prompts", "epochs"}}
PLANNED_IN |= {"density": _DRAWN - {"seed"}}


class Step(NamedTuple):
    """One stage of a run."""

    name: str  # its directory below the run's
    stage: str
    config: Any
    needs: tuple[str, ...]  # names of steps
    facts: dict[str, Any]  # of a method: which, and what was varied; for the report


def plan(recipe: Recipe, directory: Path) -> list[Step]:
    """The steps in an order in which they can run."""
    steps = list(_Planner(recipe, directory).steps())
    names = [step.name for step in steps]
    if len(set(names)) < len(names):
        raise ConfigError(f"recipe: two steps have the name {max(names, key=names.count)}; two values are too alike")
    return steps


class _Planner:
    """What the steps share: the recipe, where they write, and who scores."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory = recipe, directory
        self.names: list[str] = []  # of the steps so far
        self.rewarded = any(method in ("exo-rw", "dpo-rw", "ppo", "bon") for method in recipe.methods)
        self.pairs = self.path("labelled" if recipe.oracle else "data/pairs.jsonl")
        # without an oracle the reward model evaluates, as in the paper's section 4.2
        self.judge: dict[str, Any] = {"reward_model": self.path("classifier" if recipe.oracle else "reward")}
        if recipe.oracle and recipe.oracle != "classifier":
            self.judge = {"oracle": recipe.oracle}
        _check_names(recipe)

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def steps(self) -> Iterator[Step]:
        cutter = self.recipe.model if self.recipe.task in tasks.BY_TOKENS else None
        source = {"task": self.recipe.task, "source": self.recipe.source, "tokenizer": cutter}
        yield self._step("data", "prepare", ["prepare"], **source)
        makes = self.recipe.task in tasks.MODEL_MAKERS
        require(makes or bool(self.recipe.model), "model", "a directory or a hub name to begin with", None)
        base = self.recipe.model or self.path("data/base")
        yield self._step("sft", "sft", ["sft"], model=base, data=self.path("data/sft.jsonl"))
        yield from self._rewards()
        yield from self._reference()
        evaluations = ["evaluation/sft"]
        for method in self.recipe.methods:
            for step in self._best_of_n() if method == "bon" else self._aligned(method):
                yield step
                evaluations += [step.name] if step.stage == "evaluate" else []
        yield self._step("report", "report", ["report"], run=str(self.directory))._replace(needs=tuple(evaluations))

    def _rewards(self) -> Iterator[Step]:
        """Samples of the fine-tuned model, the preferences, the reward model that learns from them, its scores."""
        sft, oracle = self.path("sft"), self.recipe.oracle
        if oracle == "classifier":
            labelled = self.path("data/labelled.jsonl")
            yield self._step("classifier", "reward", ["classifier"], model=sft, labels=True, data=labelled)
        if self.rewarded or oracle:
            yield self._step("samples", "sample", ["sample"], model=sft, data=self.path("data/prompts.jsonl"))
        if oracle:
            yield self._step("labelled", "score", ["score"], data=self.path("samples"), **self.judge)
        if self.rewarded or not oracle:
            yield self._step("reward", "reward", ["reward"], model=sft, data=self.pairs)
        if self.rewarded:
            scorer = {"reward_model": self.path("reward")}
            yield self._step("scored", "score", ["score"], data=self.path("samples"), **scorer)

    def _reference(self) -> Iterator[Step]:
        """The fine-tuned model evaluated, and many of its samples for a few prompts, for the density ratio."""
        drawn, held_out = self.path("density/samples"), self.path("data/test.jsonl")
        # weights pi / pi_ref are those of samples of pi_ref itself: at evaluate's temperature, and all of it
        options = self._evaluated()[1] | {"top_p": 1.0, "model": self.path("sft"), "data": held_out}
        aligned = [method for method in self.recipe.methods if method not in ("ppo", "bon")]
        if aligned:
            yield self._step("density/samples", "sample", ["sample", "density"], **options)
            yield self._step("density/scored", "score", ["score"], data=drawn, **self.judge)
        if self.recipe.oracle and {"exo-rw", "dpo-rw"} & set(aligned):
            # what learns from the reward model has another optimum
            yield self._step("density/rewarded", "score", ["score"], data=drawn, reward_model=self.path("reward"))
        # with random streams of its own: pairs of samples that share theirs would not be independent
        own = max(self.recipe.seeds) + 1
        yield self._evaluation("sft", {"method": "sft"}, model=self.path("sft"), seed=own)

    def _aligned(self, method: str) -> Iterator[Step]:
        """Training and evaluation of a method, for every K, seed and value of the sweep."""
        sizes = self.recipe.group_sizes if method.endswith("-rw") else [None]
        for k, varied, seed in itertools.product(sizes, self._sweep(method), self.recipe.seeds):
            parts = [f"k{k}"] if k else []
            parts += [f"{option}={value:g}" for option, value in varied.items()]
            name = f"{method}/{'-'.join([*parts, f'seed{seed}'])}"
            options = {"model": self.path("sft"), "seed": seed, **varied}
            if method == "ppo":
                options |= {"data": self.path("data/prompts.jsonl"), "reward_model": self.path("reward")}
                yield self._step(name, "ppo", ["ppo"], **options)
            else:
                loss, target = method.split("-")
                options |= {"data": self.path("scored") if target == "rw" else self.pairs, "loss": loss}
                options |= {"target": target} | ({"max_completions": k} if k else {})
                options["reference_cache"] = self.path("reference")
                yield self._step(name, "align", ["align", f"align.{target}"], **options)
            facts = {"method": method, "k": k, "seed": seed, "varied": varied}
            of = {"model": self.path(name), "seed": seed}
            if method != "ppo":
                own = self.recipe.oracle and method.endswith("-rw")
                of["density"] = self.path("density/rewarded" if own else "density/scored")
            yield self._evaluation(name, facts, **of)

    def _best_of_n(self) -> Iterator[Step]:
        """k blocks of N samples a prompt, of which the reward model takes the best."""
        n = _integer("best_of_n", "n", self.recipe.stages.get("best_of_n", {}).get("n", 8))
        evaluated, alike = self._evaluated()
        k = _integer("evaluate", "k", evaluated["k"])
        many = alike | {"k": n * k, "prompts": evaluated["prompts"], "epochs": 1}
        for seed in self.recipe.seeds:
            name, held_out = f"bon/seed{seed}", self.path("data/test.jsonl")
            drawn, scored, best = (self.path(f"{name}/{part}") for part in ("samples", "scored", "best"))
            options = many | {"model": self.path("sft"), "data": held_out, "seed": seed}
            yield self._step(f"{name}/samples", "sample", ["sample", "bon"], **options)
            yield self._step(f"{name}/scored", "score", ["score"], data=drawn, reward_model=self.path("reward"))
            yield self._step(f"{name}/best", "best_of_n", ["best_of_n"], data=scored, n=n)
            facts: dict[str, Any] = {"method": "bon", "k": None, "seed": seed, "varied": {}, "n": n}
            yield self._evaluation(name, facts, samples=best, seed=seed)

    def _evaluated(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of evaluate, and what of them makes sample draw as it does."""
        values: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(_config_of("evaluate"))}
        values |= {name: value for name, value in self.recipe.common.items() if name in values}
        values |= self.recipe.stages.get("evaluate", {})
        alike = {name: values[name] for name in ("temperature", "top_p", "max_new_tokens")}
        length, new = (_integer("evaluate", name, values[name]) for name in ("max_length", "max_new_tokens"))
        require(length > new, "max_length", f"more than max_new_tokens = {new}, for a prompt too", length)
        return values, alike | {"max_prompt_length": length - new}

    def _evaluation(self, name: str, facts: dict[str, Any], **options: Any) -> Step:
        options |= {"reference": self.path("sft"), "data": self.path("data/test.jsonl")} | self.judge
        options |= {} if name == "sft" else {"baseline": self.path("evaluation/sft")}
        if not self.recipe.oracle:
            options["chosen"] = True  # people's answers are there to compare with
        return self._step(f"evaluation/{name}", "evaluate", ["evaluate"], **options)._replace(facts=facts)

    def _sweep(self, method: str) -> Iterator[dict[str, Any]]:
        """Every combination of the swept options that the method's stage has; one empty one without any."""
        has = _options("ppo" if method == "ppo" else "align")
        # to YAML 1e-3 is a text; and what counts is no fraction
        swept = {name: [_number(v) for v in values] for name, values in self.recipe.sweep.items() if name in has}
        for values in itertools.product(*swept.values()):
            yield dict(zip(swept, values, strict=True))

    def _step(self, name: str, stage: str, sections: Sequence[str], **options: Any) -> Step:
        """The recipe's options, common ones first; `options` have the last word. It needs whatever it reads."""
        known = _options(stage)
        values: dict[str, Any] = {name: value for name, value in self.recipe.common.items() if name in known}
        for section in sections:
            for key, value in self.recipe.stages.get(section, {}).items():
                if key not in known:
                    raise ConfigError(f"recipe: {section}: unknown option {key!r}{suggestion(key, known)}")
                values[key] = value
        values |= options | {"output_dir": self.path(name), "overwrite_output_dir": True}
        try:
            config = build(_config_of(stage), values)
        except ConfigError as error:
            raise ConfigError(f"recipe: {name}: {error}") from None
        read = [Path(value) for option in run_record.INPUTS[stage] if (value := getattr(config, option))]
        needs = tuple(n for n in self.names if any(path.is_relative_to(self.directory / n) for path in read))
        self.names.append(name)
        return Step(name, stage, config, needs, {})


def _number(value: Any) -> float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _integer(section: str, name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ConfigError(
            f"recipe: {section}: --{name}: expected an integer; got {shortened(repr(value), 100)}"
        ) from None


def _check_names(recipe: Recipe) -> None:
    """What no step would read is a slip, and would be dropped in silence."""
    for section, options in recipe.stages.items():
        if section not in SECTIONS:
            raise ConfigError(f"recipe: unknown section {section!r}{suggestion(section, set(SECTIONS))}")
        if planned := (PLANNED | PLANNED_IN.get(section, set())) & options.keys():
            raise ConfigError(f"recipe: {section}: {min(planned)} is for the plan to set")
        if process := {"dtype", "device"} & options.keys():
            raise ConfigError(f"recipe: {section}: {min(process)} belongs under common; steps share a process")
    known = {name for stage in run_record.INPUTS if stage not in ("judge", "label") for name in _options(stage)}
    for where, names in (("common", recipe.common), ("sweep", recipe.sweep)):
        for name in names:
            if name in PLANNED or where == "sweep" and name in SWEPT_OTHERWISE:
                raise ConfigError(f"recipe: {where}: {name} is for the plan to set{SWEPT_OTHERWISE.get(name, '')}")
            if name not in (known if where == "common" else _options("align") | _options("ppo")):
                raise ConfigError(f"recipe: {where}: unknown option {name!r}{suggestion(name, known)}")


def _options(stage: str) -> set[str]:
    return {field.name for field in dataclasses.fields(_config_of(stage))}


def _config_of(stage: str) -> Any:
    return importlib.import_module(f"exo.{stage}").Config
