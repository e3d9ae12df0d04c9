"""Recipes and plans: the steps of a run, the steps that it skips, and the errors of wrong recipes."""

import os

import pytest
import yaml

from exo import train
from exo.cli.errors import ConfigError
from exo.experiments import plan as experiment_plan
from exo.experiments import recipe as experiment_recipe
from exo.experiments import run as experiment_run
from exo.runs import record as run_record
from exo.runs import stage as run_stage


def plan_quickstart(tmp_path, **changes):
    recipe = experiment_recipe.load("quickstart", **changes)
    return {step.name: step for step in experiment_plan.plan(recipe, tmp_path)}


@pytest.mark.parametrize("full", [False, True])
def test_every_step_comes_after_the_steps_it_needs_and_reads_only_their_files(tmp_path, full):
    steps = experiment_plan.plan(experiment_recipe.load("quickstart", full=full), tmp_path)
    earlier = set()
    for step in steps:
        assert set(step.needs) <= earlier, step.name
        read = {getattr(step.config, name) for name in run_record.STAGES[step.stage].reads if name != "oracle"} - {None}
        for path in read - {str(tmp_path)}:
            owners = {
                need for need in step.needs if path == str(tmp_path / need) or path.startswith(f"{tmp_path / need}/")
            }
            assert owners, f"{step.name} reads {path} and needs {step.needs}"
        earlier.add(step.name)
    assert len({step.name for step in steps}) == len(steps)


def test_the_reward_model_learns_from_the_oracle_and_scores_for_all_but_preferences(tmp_path):
    steps = plan_quickstart(tmp_path)
    assert steps["labelled"].config.oracle == "exo.experiments.quickstart:reward"
    assert steps["reward"].config.data == str(tmp_path / "labelled")
    assert steps["exo-rw/k4-seed0"].config.data == steps["dpo-rw/k4-seed0"].config.data == str(tmp_path / "scored")
    assert steps["scored"].config.reward_model == str(tmp_path / "reward")
    assert steps["ppo/seed0"].config.reward_model == str(tmp_path / "reward")
    assert steps["exo-pref/seed0"].config.data == str(tmp_path / "labelled")
    assert steps["exo-pref/seed0"].config.target == "pref" and steps["exo-pref/seed0"].config.max_completions == 2
    assert all(step.config.oracle for step in steps.values() if step.stage == "evaluate")


def test_best_of_n_uses_the_reward_model_and_is_evaluated_by_the_oracle(tmp_path):
    steps = plan_quickstart(tmp_path, seeds=[0, 5])
    for seed in (0, 5):
        drawn, scored, best = (steps[f"bon/seed{seed}/{part}"].config for part in ("samples", "scored", "best"))
        assert drawn.model == str(tmp_path / "sft") and drawn.seed == seed
        assert scored.data == drawn.output_dir and scored.reward_model == str(tmp_path / "reward")
        assert scored.oracle is None and best.data == scored.output_dir
        evaluation = steps[f"evaluation/bon/seed{seed}"].config
        assert evaluation.samples == best.output_dir and evaluation.oracle and not evaluation.model


def test_evaluation_data_are_never_trained_on(tmp_path):
    held_out = str(tmp_path / "data" / "test.jsonl")
    for step in plan_quickstart(tmp_path).values():
        data = getattr(step.config, "data", None)
        if step.stage in ("sft", "reward", "align", "ppo") or step.name == "samples":
            assert data != held_out
        if step.stage == "evaluate" or step.name.endswith("/samples"):
            assert data == held_out


def test_all_methods_have_the_same_settings(tmp_path):
    steps = plan_quickstart(tmp_path)
    fair = ("learning_rate", "batch_size", "max_steps", "beta_pi", "beta_r", "temperature", "export_steps", "model")
    aligned = [step.config for step in steps.values() if step.stage == "align"]
    assert len(aligned) == 4
    for name in fair:
        assert len({getattr(config, name) for config in aligned}) == 1, name
    grid = experiment_recipe.load("quickstart", full=True).sweep["learning_rate"]
    full = experiment_plan.plan(experiment_recipe.load("quickstart", full=True), tmp_path)
    for method in ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref", "ppo"):
        runs = [s for s in full if s.name.startswith(f"{method}/") and s.stage in ("align", "ppo")]
        assert {s.config.learning_rate for s in runs} == set(grid) and {s.config.seed for s in runs} == {0, 1, 2}


def test_the_baseline_has_a_separate_seed(tmp_path):
    steps = plan_quickstart(tmp_path, seeds=[0, 1])
    others = {step.config.seed for name, step in steps.items() if step.stage == "evaluate" and name != "evaluation/sft"}
    assert others == {0, 1} and steps["evaluation/sft"].config.seed not in others


def test_a_sweep_varies_only_the_options_that_a_stage_has(tmp_path):
    steps = plan_quickstart(
        tmp_path, methods=["exo-pref", "ppo"], sweep={"beta_pi": [0.1, 0.5], "learning_rate": [1e-4]}
    )
    names = {name for name in steps if name.startswith(("exo-pref", "ppo"))}
    assert names == {
        "exo-pref/beta_pi=0.1-learning_rate=0.0001-seed0", "exo-pref/beta_pi=0.5-learning_rate=0.0001-seed0",
        "ppo/learning_rate=0.0001-seed0",
    }  # fmt: skip
    assert steps["exo-pref/beta_pi=0.1-learning_rate=0.0001-seed0"].config.beta_pi == 0.1


def test_a_sweep_accepts_integer_options(tmp_path):
    steps = plan_quickstart(tmp_path, methods=["exo-pref"], sweep={"max_steps": [10.0, 200.0], "beta_pi": [1.0]})
    configs = {n: s.config for n, s in steps.items() if n.startswith("exo-pref")}
    assert [(n, c.max_steps, c.beta_pi) for n, c in configs.items()] == [
        ("exo-pref/max_steps=10-beta_pi=1-seed0", 10, 1.0), ("exo-pref/max_steps=200-beta_pi=1-seed0", 200, 1.0),
    ]  # fmt: skip


def test_best_of_n_and_density_sample_with_the_options_of_the_evaluation(tmp_path):
    """Check that the options of the samples to train on have no effect."""
    stages = {"evaluate": {"temperature": 0.5, "top_p": 0.9, "k": 3, "max_length": 50}, "best_of_n": {"n": 5},
              "sample": {"temperature": 1.5, "top_p": 0.7, "max_new_tokens": 9}}  # fmt: skip
    steps = plan_quickstart(tmp_path, stages=stages)
    bon, drawn = steps["evaluation/bon/seed0"].config, steps["bon/seed0/samples"].config
    for config in (drawn, steps["density/samples"].config):
        assert (config.temperature, config.max_new_tokens) == (bon.temperature, bon.max_new_tokens) == (0.5, 32)
        assert config.max_prompt_length == 50 - 32
    assert drawn.top_p == 0.9 and drawn.k == 15 and drawn.prompts == bon.prompts
    assert steps["density/samples"].config.top_p == 1
    recipe = experiment_recipe.Recipe(title="t", task="quickstart", model="m", common={"k": 7, "top_p": 0.8})
    steps = {step.name: step for step in experiment_plan.plan(recipe, tmp_path)}
    assert steps["evaluation/bon/seed0"].config.k == 7 and steps["bon/seed0/samples"].config.k == 7 * 8
    assert steps["bon/seed0/samples"].config.top_p == 0.8


def test_preferences_of_people_need_no_oracle(tmp_path):
    recipe = experiment_recipe.Recipe(title="t", task="quickstart", model="m")
    steps = {step.name: step for step in experiment_plan.plan(recipe, tmp_path)}
    assert "labelled" not in steps
    assert steps["reward"].config.data == steps["exo-pref/seed0"].config.data == str(tmp_path / "data" / "pairs.jsonl")
    assert all(s.config.reward_model == str(tmp_path / "reward") for s in steps.values() if s.stage == "evaluate")


def test_pairs_need_no_reward_model_if_an_oracle_evaluates(tmp_path):
    steps = plan_quickstart(tmp_path, methods=["exo-pref"])
    assert "reward" not in steps and "scored" not in steps and "samples" in steps


def test_numbers_that_yaml_reads_as_text(tmp_path):
    steps = plan_quickstart(tmp_path, stages={"align": {"learning_rate": "1e-3"}}, sweep={"beta_pi": ["2e-1"]})
    config = steps["exo-pref/beta_pi=0.2-seed0"].config
    assert config.learning_rate == 1e-3 and config.beta_pi == 0.2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": {"sft": {"max_stepz": 3}}}, "sft: unknown option 'max_stepz'; did you mean max_steps?"),
        ({"stages": {"sftt": {"max_steps": 3}}}, "unknown section 'sftt'; did you mean sft?"),
        ({"common": {"temprature": 1}}, "common: unknown option 'temprature'; did you mean temperature?"),
        ({"methods": ["exo"]}, "--methods: expected some of"),
        ({"sweep": {"beta": [1]}}, "sweep: unknown option 'beta'"),
        ({"stages": {"align": {"max_steps": "many"}}}, "--max_steps: invalid int value"),
        ({"common": {"dtype": "float8"}}, "--dtype: invalid choice: 'float8'"),
        ({"stages": {"align": {"dtype": "bfloat16"}}}, "align: dtype belongs under common"),
        ({"seeds": [0, 1, 0]}, "--seeds: expected each once; got '0,1,0'"),
        ({"sweep": {"beta_pi": [0.1, 0.1000001]}}, "two steps have the name exo-rw/k4-beta_pi=0.1-seed0"),
        ({"titel": "x"}, "unknown key 'titel'; did you mean title?"),
        ({"stages": {"align": {"beta_pi": -1}}}, "--beta_pi: expected a finite number > 0"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path, change, message):
    values = yaml.safe_load((experiment_recipe.RECIPES / "quickstart.yaml").read_text())
    values = experiment_recipe.merge(values, change) if "sweep" not in change else values | change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        experiment_plan.plan(experiment_recipe.load(str(path)), tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "quickstartt"], "--recipe quickstartt: expected one of"),
        (["--set", "max_steps=3"], "--set: expected stage.option=value"),
        (["--seeds", "0,x"], "--seeds: expected numbers separated by commas; got 'x'"),
        (["--from", "smaples"], "--from: expected one of"),
        (["--jobs", "0"], "--jobs: expected >= 1"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, arguments, message):
    try:
        code = train.main([*arguments, "--output_dir", str(tmp_path / "x"), "--dry_run"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_from_selects_a_step_and_all_steps_that_depend_on_it(tmp_path):
    steps = list(plan_quickstart(tmp_path).values())
    rerun = experiment_run.names_from(steps, "reward")
    assert {"reward", "scored", "exo-rw/k4-seed0", "evaluation/ppo/seed0", "report"} <= rerun
    assert not {"sft", "labelled", "exo-pref/seed0", "evaluation/sft"} & rerun
    assert [step.name for step in experiment_run.steps_up_to(steps, "samples")][-1] == "samples"


def test_a_dry_run_prints_the_plan_and_runs_nothing(tmp_path, capsys):
    assert train.main(["--dry_run", "--output_dir", str(tmp_path / "x")]) == 0
    output = capsys.readouterr().out
    assert (
        "exo-rw/k4-seed0" in output and "trains on at most 2,048,000 tokens" in output and not (tmp_path / "x").exists()
    )


def test_a_dry_run_includes_the_steps_that_depend_on_a_change(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        run_stage, "status", lambda directory, config, stage: ("new" if stage == "reward" else "done", [])
    )
    assert train.main(["--dry_run", "--output_dir", str(tmp_path / "x")]) == 0
    plan = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    finished = {line.split()[0] for line in plan if line.endswith("up to date")}
    assert {"sft", "labelled", "exo-pref/seed0"} <= finished
    assert not finished & {"reward", "scored", "exo-rw/k4-seed0", "evaluation/ppo/seed0", "report"}


def test_a_missing_source_is_refused_before_planning(tmp_path, capsys):
    arguments = ["--recipe", "hh", "--source", "absent.jsonl", "--model", "gpt2", "--dry_run"]
    assert train.main([*arguments, "--output_dir", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "error: --source absent.jsonl: no such file or directory\n"


def test_best_of_n_alone_needs_no_density(tmp_path):
    assert not [name for name in plan_quickstart(tmp_path, methods=["bon", "ppo"]) if name.startswith("density")]


def test_a_recipe_needs_a_single_process(tmp_path, capsys, monkeypatch):
    """Check that a launcher is refused, under which each process would write the same steps."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["--output_dir", str(tmp_path / "x")]) == 2
    assert "--recipe: expected one process" in capsys.readouterr().err and not (tmp_path / "x").exists()


def _kill_process(step, rerun, execute):
    os._exit(9)


def test_a_step_whose_process_dies_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment_run, "_timed", _kill_process)
    assert train.main(["--output_dir", str(tmp_path / "x"), "--jobs", "2", "--to", "data"]) == 1
    assert "error: data: the process of one of them was killed" in capsys.readouterr().err
