"""From a recipe to the steps of a run: which stage, with which options, into which directory, after which others.

A recipe is a YAML file: the task, the methods, and the options of each stage by their own names. `plan` is the paper's
experiment: fine-tune, sample, score, train the reward model, align by every method, evaluate, report. Preferences come
with the data or, where the recipe has an oracle, from the oracle's scores; the reward model learns from them and drives
exo-rw, dpo-rw, PPO and Best-of-N. Left out: running the steps (train).
"""

import dataclasses
import importlib
import itertools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from exo import tasks
from exo.config import ConfigError, require, suggestion

METHODS = ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref", "ppo", "bon")
RECIPES = Path(__file__).parent / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# The sections of a recipe's `stages`, and whose options they hold.
SECTIONS = {
    "prepare": "prepare", "sft": "sft", "classifier": "reward", "sample": "sample", "density": "sample",
    "bon": "sample", "score": "score", "reward": "reward", "align": "align", "align.rw": "align",
    "align.pref": "align", "ppo": "ppo", "best_of_n": "best_of_n", "evaluate": "evaluate", "report": "report",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    title: str
    task: str
    source: str | None = None  # of the task's data
    model: str | None = None  # to begin with; none: the task makes one
    oracle: str | None = None  # module:function, or "classifier": one trained on the task's labelled texts
    methods: Sequence[str] = METHODS
    group_sizes: Sequence[int] = (4,)  # K of exo-rw and dpo-rw
    seeds: Sequence[int] = (0,)  # of alignment and of the samples that evaluate it
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of options of the methods' stages
    threads: int | None = None
    common: Mapping[str, Any] = field(default_factory=dict)  # options of every stage that has them
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)  # what the long form changes
    notes: str = ""  # where the paper and its published scripts differ

    def __post_init__(self) -> None:
        for method in self.methods:
            require(method in METHODS, "methods", f"some of {','.join(METHODS)}", method)
        require(len(self.seeds) > 0, "seeds", "one at least", self.seeds)


class Step(NamedTuple):
    """One stage of a run."""

    name: str  # its directory below the run's
    stage: str
    config: Any
    needs: tuple[str, ...]  # names of steps
    facts: dict[str, Any]  # of a method: which, and what was varied; for the report


def load(name: str, *, full: bool = False, **changes: Any) -> Recipe:
    """The recipe of that name, or of a YAML file of one's own; `changes` that are None change nothing."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"--recipe {name}: expected one of {', '.join(SHIPPED)}, or a YAML file of your own")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--recipe {path}: {' '.join(str(error).split())}") from None
    known = {f.name for f in dataclasses.fields(Recipe)}
    if not isinstance(values, dict) or not {"title", "task"} <= values.keys():
        raise ConfigError(f"--recipe {path}: expected a mapping with title and task")
    if full:
        values = _merged(values, values.get("full", {}))
    for key in values:
        if key not in known:
            raise ConfigError(f"--recipe {path}: unknown key {key!r}{suggestion(str(key), known)}")
    values = _merged(values, {key: value for key, value in changes.items() if value is not None})
    try:
        return Recipe(**values)
    except TypeError as error:
        raise ConfigError(f"--recipe {path}: {error}") from None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge, anything else replaces; a sweep replaces a sweep."""
    merged = dict(below)
    for key, value in above.items():
        deeper = isinstance(value, Mapping) and isinstance(below.get(key), Mapping) and key != "sweep"
        merged[key] = _merged(below[key], value) if deeper else value
    return merged


def plan(recipe: Recipe, directory: Path) -> list[Step]:
    """The steps in an order in which they can run."""
    _check_names(recipe)
    return list(_Planner(recipe, directory).steps())


def _check_names(recipe: Recipe) -> None:
    """What no step would read is a slip, and would be dropped in silence."""
    for section in recipe.stages:
        if section not in SECTIONS:
            raise ConfigError(f"recipe: unknown section {section!r}{suggestion(section, set(SECTIONS))}")
    options = {f.name for stage in SECTIONS.values() for f in dataclasses.fields(_config_of(stage))}
    for key in recipe.common:
        if key not in options:
            raise ConfigError(f"recipe: common: unknown option {key!r}{suggestion(key, options)}")


class _Planner:
    """What the steps share: the recipe, where they write, and who scores."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory = recipe, directory
        self.rewarded = any(method in ("exo-rw", "dpo-rw", "ppo", "bon") for method in recipe.methods)
        self.preferred = any(method.endswith("-pref") for method in recipe.methods)
        # without an oracle the reward model evaluates, as in the paper's section 4.2
        self.judge: dict[str, Any] = self._oracle() if recipe.oracle else {"reward_model": self.path("reward")}
        self.judges = ("classifier",) if recipe.oracle == "classifier" else () if recipe.oracle else ("reward",)
        chosen = not recipe.oracle and recipe.task != "quickstart"
        self.held_out: dict[str, Any] = {"data": self.path("data/test.jsonl"), "chosen": chosen}

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def _oracle(self) -> dict[str, Any]:
        if self.recipe.oracle == "classifier":
            return {"reward_model": self.path("classifier")}
        return {"oracle": str(self.recipe.oracle)}

    def steps(self) -> Iterator[Step]:
        cutter = self.recipe.model if self.recipe.task in tasks.BY_TOKENS else None
        yield self._step("data", "prepare", ["prepare"], task=self.recipe.task, source=self.recipe.source,
                         tokenizer=cutter)  # fmt: skip
        makes = self.recipe.task in tasks.MODEL_MAKERS
        require(makes or bool(self.recipe.model), "model", "a directory or a hub name to begin with", None)
        base = self.recipe.model or self.path("data/base")
        yield self._step("sft", "sft", ["sft"], "data", model=base, data=self.path("data/sft.jsonl"))
        yield from self._preferences()
        if self.rewarded:
            yield self._step("scored", "score", ["score"], "samples", "reward", data=self.path("samples"),
                             reward_model=self.path("reward"))  # fmt: skip
        evaluations = ["evaluation/sft"]
        yield from self._reference_samples()
        yield self._evaluation("sft", "sft", seed=0, facts={"method": "sft"})
        for method in self.recipe.methods:
            for step in self._best_of_n() if method == "bon" else self._aligned(method):
                yield step
                evaluations += [step.name] if step.stage == "evaluate" else []
        yield self._step("report", "report", ["report"], *evaluations, run=str(self.directory))

    def _preferences(self) -> Iterator[Step]:
        """Samples of the fine-tuned model, the preferences, and the reward model that learns from them."""
        if self.recipe.oracle == "classifier":
            yield self._step("classifier", "reward", ["classifier"], "sft", model=self.path("sft"), labels=True,
                             data=self.path("data/labelled.jsonl"))  # fmt: skip
        if self.rewarded or self.recipe.oracle:
            yield self._step("samples", "sample", ["sample"], "sft", model=self.path("sft"),
                             data=self.path("data/prompts.jsonl"))  # fmt: skip
        if self.recipe.oracle:
            yield self._step("labelled", "score", ["score"], "samples", *self.judges, data=self.path("samples"),
                             **self.judge)  # fmt: skip
        if self.rewarded or not self.recipe.oracle:
            needs = "labelled" if self.recipe.oracle else "sft"
            yield self._step("reward", "reward", ["reward"], needs, model=self.path("sft"), data=self._pairs())

    def _pairs(self) -> str:
        return self.path("labelled" if self.recipe.oracle else "data/pairs.jsonl")

    def _reference_samples(self) -> Iterator[Step]:
        """Many samples of the reference for a few prompts: where the density ratio is measured."""
        yield self._step("density/samples", "sample", ["sample", "density"], "sft", model=self.path("sft"),
                         data=self.path("data/test.jsonl"))  # fmt: skip
        yield self._step("density/scored", "score", ["score"], "density/samples", *self.judges,
                         data=self.path("density/samples"), **self.judge)  # fmt: skip

    def _aligned(self, method: str) -> Iterator[Step]:
        """Training and evaluation of a method, for every K, seed and value of the sweep."""
        sizes = self.recipe.group_sizes if method.endswith("-rw") else [None]
        for k, varied, seed in itertools.product(sizes, self._sweep(method), self.recipe.seeds):
            facts = {"method": method, "k": k, "seed": seed, "varied": varied}
            parts = [method, *([f"k{k}"] if k else []), *(f"{n}={v:g}" for n, v in varied.items()), f"seed{seed}"]
            name = "/".join([parts[0], "-".join(parts[1:])])
            if method == "ppo":
                rewarded: dict[str, Any] = {
                    "data": self.path("data/prompts.jsonl"),
                    "reward_model": self.path("reward"),
                }
                yield self._step(name, "ppo", ["ppo"], "sft", "reward", "data", model=self.path("sft"), seed=seed,
                                 **rewarded, **varied)  # fmt: skip
            else:
                yield self._alignment(name, method, k, seed, varied)
            yield self._evaluation(name, name, seed=seed, facts=facts)

    def _alignment(self, name: str, method: str, k: int | None, seed: int, varied: Mapping[str, Any]) -> Step:
        loss, target = method.split("-")
        source = self.path("scored") if target == "rw" else self._pairs()
        needs = "scored" if target == "rw" else "labelled" if self.recipe.oracle else "data"
        wanted: dict[str, Any] = {"target": target} if target == "rw" or self.recipe.oracle else {}
        wanted |= {"max_completions": k} if k else {}
        return self._step(name, "align", ["align", f"align.{target}"], "sft", needs, model=self.path("sft"),
                          data=source, loss=loss, seed=seed, **wanted, **varied)  # fmt: skip

    def _best_of_n(self) -> Iterator[Step]:
        """k blocks of N samples a prompt, of which the reward model takes the best."""
        n = self.recipe.stages.get("best_of_n", {}).get("n", 8)
        evaluated = {"k": 4, "prompts": 512} | dict(self.recipe.stages.get("evaluate", {}))
        for seed in self.recipe.seeds:
            name = f"bon/seed{seed}"
            yield self._step(f"{name}/samples", "sample", ["sample", "bon"], "sft", model=self.path("sft"),
                             k=n * evaluated["k"], prompts=evaluated["prompts"], data=self.path("data/test.jsonl"),
                             epochs=1, seed=seed + 1)  # fmt: skip
            yield self._step(f"{name}/scored", "score", ["score"], f"{name}/samples", "reward",
                             data=self.path(f"{name}/samples"), reward_model=self.path("reward"))  # fmt: skip
            yield self._step(f"{name}/best", "best_of_n", ["best_of_n"], f"{name}/scored",
                             data=self.path(f"{name}/scored"), n=n)  # fmt: skip
            facts = {"method": "bon", "k": None, "seed": seed, "varied": {}, "n": n}
            yield self._evaluation(name, f"{name}/best", seed=seed, facts=facts, samples=self.path(f"{name}/best"))

    def _evaluation(self, name: str, of: str, *, seed: int, facts: dict[str, Any], samples: str | None = None) -> Step:
        options: dict[str, Any] = {"samples": samples} if samples else {"model": self.path(of)}
        needs = ["data", "sft", of, *self.judges]
        if of != "sft":
            options |= {"baseline": self.path("evaluation/sft")}
            needs.append("evaluation/sft")
        if of != "sft" and not samples:
            options |= {"density": self.path("density/scored")}
            needs.append("density/scored")
        return self._step(f"evaluation/{name}", "evaluate", ["evaluate"], *needs, reference=self.path("sft"),
                          seed=seed, facts=facts, **self.held_out, **self.judge, **options)  # fmt: skip

    def _sweep(self, method: str) -> Iterator[dict[str, Any]]:
        """Every combination of the swept options that the method's stage has; one empty one without any."""
        has = {f.name for f in dataclasses.fields(_config_of("ppo" if method == "ppo" else "align"))}
        swept = {name: values for name, values in self.recipe.sweep.items() if name in has}
        for values in itertools.product(*swept.values()):
            yield dict(zip(swept, values, strict=True))

    def _step(
        self, name: str, stage: str, sections: Sequence[str], *needs: str, facts: dict[str, Any] | None = None,
        **options: Any,
    ) -> Step:  # fmt: skip
        """The recipe's options, common ones first; `options` have the last word."""
        config = _config_of(stage)
        known = {f.name for f in dataclasses.fields(config)}
        values: dict[str, Any] = {
            name: _typed(config, f"common.{name}", value) for name, value in self.recipe.common.items() if name in known
        }
        for section in sections:
            for key, value in self.recipe.stages.get(section, {}).items():
                if key not in known:
                    raise ConfigError(f"recipe: {section}: unknown option {key!r}{suggestion(key, known)}")
                values[key] = _typed(config, f"{section}.{key}", value)
        values |= options | {"output_dir": self.path(name), "overwrite_output_dir": True}
        return Step(name, stage, config(**values), tuple(dict.fromkeys(needs)), facts or {})


def _typed(config: Any, name: str, value: Any) -> Any:
    """The value as the option's type has it. To YAML 1e-4 is a text; with a dot, 1.0e-4, it is a number."""
    hint = typing.get_type_hints(config)[name.rpartition(".")[2]]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        elif kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
    shown = " or ".join(", ".join(typing.get_args(k)) if typing.get_origin(k) is Literal else k.__name__ for k in kinds)
    raise ConfigError(f"recipe: {name}: expected {shown.replace('NoneType', 'null')}; got {value!r}")


def _config_of(stage: str) -> Any:
    return importlib.import_module(f"exo.{stage}").Config
