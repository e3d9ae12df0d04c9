"""The shipped recipes: each loads and plans with existing options, and an error in a recipe is one line."""

from pathlib import Path

import pytest
import yaml

from exo import train
from exo.experiments import plan, tasks
from exo.experiments import recipe as experiment_recipe

NAMES = experiment_recipe.SHIPPED


def plan_recipe(name: str, tmp_path: Path, **changes) -> dict[str, plan.Step]:
    recipe = experiment_recipe.load(name, **changes)
    if recipe.model is None and recipe.task not in tasks.MODEL_MAKERS:
        recipe = experiment_recipe.load(name, **{"model": "owner/model"} | changes)
    if recipe.source is None and recipe.task != "quickstart":
        recipe = experiment_recipe.load(name, **{"model": recipe.model, "source": "rows.jsonl"} | changes)
    return {step.name: step for step in plan.plan(recipe, tmp_path)}


def test_the_shipped_recipes():
    assert NAMES == ["custom", "hh", "imdb", "instruct", "polarity", "quickstart", "tldr"]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_can_be_planned(name, full, tmp_path):
    recipe = experiment_recipe.load(name)
    steps = plan_recipe(name, tmp_path, full=full)
    assert recipe.title and (recipe.notes or name == "quickstart")
    for method in recipe.methods:
        assert any(step.facts.get("method") == method for step in steps.values())
    names = set(steps)
    assert all(set(step.needs) <= names for step in steps.values())


@pytest.mark.parametrize("name", NAMES)
def test_sampling_training_and_evaluation_agree(name, tmp_path):
    """Check one temperature and one prompt length in every step, and enough samples for the largest K."""
    steps = plan_recipe(name, tmp_path)
    temperatures = {step.config.temperature for step in steps.values() if hasattr(step.config, "temperature")}
    assert len(temperatures) == 1
    common = experiment_recipe.load(name).common
    if "max_prompt_length" in common:  # evaluation and PPO derive it from the other two
        assert common["max_prompt_length"] == common["max_length"] - common["max_new_tokens"]
    limit = steps["sft"].config.max_completion_length
    assert limit is None or limit <= common["max_new_tokens"]
    sizes = [step.facts["k"] for step in steps.values() if step.facts.get("k")]
    assert max(sizes) <= steps["samples"].config.k


@pytest.mark.parametrize("name", NAMES)
def test_every_section_of_a_recipe_is_used(name, tmp_path):
    """Check that a step reads each section, which would otherwise be silently ignored."""
    values = yaml.safe_load((experiment_recipe.RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    read = {"sft", "classifier", "sample", "reward", "score", "align", "align.rw", "align.pref", "ppo", "best_of_n"}
    read |= {"bon", "evaluate", "density", "prepare"}
    for stages in (values["stages"], values.get("full", {}).get("stages", {})):
        assert set(stages) <= read
    configs = [step.config for step in plan_recipe(name, tmp_path).values()]
    for option in values["common"]:
        assert any(hasattr(config, option) for config in configs), option


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_a_dry_run_needs_no_hub(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was used"))
    model = [] if name == "polarity" else ["--model", "owner/model"]
    arguments = ["--recipe", name, "--source", "owner/rows", "--dry-run", "--output_dir", str(tmp_path / "run"), *model]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    assert "] report" in out and ("operations unknown: model 'owner/model'" in out) == bool(model)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "imbd"], "expected one of custom, hh, imdb, instruct, polarity, quickstart, tldr"),
        (["--recipe", "hh", "--set", "align.beta_p=0.5"], "align: unknown option 'beta_p'; did you mean beta_pi?"),
        (["--recipe", "polarity"], "--source: expected the files of the task; got None"),
        (["--recipe", "custom", "--source", "rows.jsonl"], "--model: expected a directory or a hub name to start from"),
        (["--recipe", "hh", "--methods", "exo"], "--methods: expected some of exo-rw"),
    ],
)
def test_an_error_on_the_command_line_is_one_line(arguments, expected, tmp_path, capsys):
    assert train.main([*arguments, "--dry-run", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"stagse": {}}, "unknown key 'stagse'; did you mean stages?"),
        ({"stages": {"sft": {"learning_rat": 1}}}, "sft: unknown option 'learning_rat'; did you mean learning_rate?"),
        (
            {"stages": {"sft": {"checkpoint_steps": 1}}},
            "unknown option 'checkpoint_steps'; it is called save_steps since",
        ),
        ({"stages": {"slign": {"beta_pi": 1}}}, "unknown section 'slign'; did you mean align?"),
        ({"common": {"temprature": 1}}, "common: unknown option 'temprature'; did you mean temperature?"),
        ({"stages": {"sft": {"learning_rate": "fast"}}}, "sft: --learning_rate: invalid float value: 'fast'"),
        ({"stages": {"sft": {"max_steps": 1.5}}}, "sft: --max_steps: invalid int value: '1.5'"),
        ({"stages": {"align": {"loss": "dop"}}}, "align: loss is set by the plan"),
        ({"common": {"max_completion_length": True}}, "sft: --max_completion_length: invalid int value: 'True'"),
        ({"task": "polarty"}, "--task: expected one of quickstart, polarity"),
    ],
)
def test_an_error_in_a_recipe_file_is_one_line(changed, expected, tmp_path, capsys):
    values = {"title": "mine", "task": "polarity", "source": "x", "oracle": "classifier"} | changed
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert train.main(["--recipe", str(path), "--dry-run", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.splitlines()) == 1


def test_numbers_that_yaml_reads_as_text(tmp_path):
    """Check 1e-4, which YAML 1.1 reads as text, because it has no dot."""
    recipe = experiment_recipe.load(
        "quickstart", stages=yaml.safe_load("{sft: {learning_rate: 1e-4, warmup_ratio: 0}}")
    )
    config = plan.plan(recipe, tmp_path)[1].config
    assert config.learning_rate == 1e-4 and type(config.warmup_ratio) is float


def test_common_options_can_be_set(tmp_path, capsys):
    options = train.Config(recipe="quickstart", set="common.temperature=0.7 sft.max_steps=3")
    recipe = train.load_recipe(options)
    assert recipe.common["temperature"] == 0.7 and recipe.common["device"] == "cpu"
    assert recipe.stages["sft"]["max_steps"] == 3
