"""The classes of cases of the fuzz harness. See tests/fuzz.py."""

import functools
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import fuzz_files
import torch
from budget import check_loss, check_tokens
from cases import DTYPES, layouts, make_case
from fuzz import Case
from refusals import ALL_LOSSES, LOSSES, ON_LOGITS, N, T, V, good

import exo_kernels
from exo import align, data, models
from exo.cli import yaml_files
from exo.cli.errors import ConfigError, RunError
from exo.cli.parse import _Parser, parse
from exo.experiments import plan
from exo.experiments import recipe as experiment_recipe
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record
from exo.runs.atomic import write_json


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message and len(message.splitlines()) == 1 and len(message) < 5000, f"not one line: {message[:300]!r}"
    return "refused"


# exo_kernels


def valid_call(rng: random.Random, folder: Path) -> str:
    """Compare a fused loss or token log-probs with the fp64 reference, within the budget of tests/budget.py."""
    torch.set_num_threads(1)
    seed, dtype, vocab = rng.randrange(2**31), rng.choice(DTYPES), rng.choice([1, 2, 3, 17, 64, 257, 1201])
    temperature = rng.choice([1.0, 0.25, 0.7, 3.0])
    sizes = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
    k = rng.choice([1, 2, 3])
    ragged = rng.random() < 0.5
    n = sum(sizes) if ragged else k * rng.randint(1, 3)
    options: dict[str, Any] = {"temperature": temperature, "group_size": torch.tensor(sizes) if ragged else k}
    packed = rng.random() < 0.4
    if packed:
        options["lengths"] = [rng.randint(1, 6) for _ in range(n)]
    else:
        options["shift"] = rng.choice([None, True, False])
    objective = rng.choice(["exo", "dpo"])
    case = make_case(
        n, rng.randint(2, 6), vocab, dtype, seed=seed, objective=objective, rewards=rng.random() < 0.5,
        per_token_ref=rng.random() < 0.5, beta_pi=rng.choice([0.05, 0.5, 2.0]), beta_r=rng.choice([0.1, 1.0]),
        reduction=rng.choice(["mean", "sum"]), **options,
    )  # fmt: skip
    view = _view(rng, case.logits) if not packed else (lambda x: x)
    if rng.random() < 0.5:
        check_loss(case, "chunked", "cpu", view)
    else:
        layout = {name: value for name, value in case.layout().items() if name != "cu_seqlens"}
        check_tokens(case.logits, case.labels, "chunked", "cpu", view, entropy=rng.random() < 0.5, **layout)
    return "right"


def _view(rng: random.Random, logits: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    names = [name for name, _ in layouts(logits)]
    chosen = rng.choice([None, *names])
    return (lambda x: x) if chosen is None else (lambda x: dict(layouts(x))[chosen])


_HOSTILE: list[Any] = [
    None, True, "x", "", [0.0], {}, object(), 1j, math.nan, math.inf, -1, -1.0, 10**400, 10**5000, 2**63, 1e300, 1e-320,
    b"x", torch.zeros(2, 2, 2, 2), torch.zeros(N, dtype=torch.complex64), torch.zeros(N, device="meta"),
    torch.zeros(N, T, V).to_sparse(), torch.zeros(N).to_mkldnn(), torch.full((N, T), 2**40), torch.zeros(0),
    torch.full((N,), math.nan), torch.full((N,), 10**6),
]  # fmt: skip
_TENSORS = ("logits", "labels", "ref_logps", "policy_logps", "rewards", "hidden", "weight", "bias", "cu_seqlens")
_OPTIONS = ["temperature", "ignore_index", "impl", "shift", "cu_seqlens"]
_OF_LOSSES = ["group_size", "rewards", "beta_pi", "beta_r", "label_smoothing", "reduction", "num_groups", "compat"]
_OF_HEADS = ["bias", "logit_scale", "softcap", "memory_budget", "schedule"]
_LINEAR = [
    exo_kernels.linear_token_logps, exo_kernels.linear_sequence_logps, exo_kernels.fused_linear_exo_loss,
    exo_kernels.fused_linear_dpo_loss, exo_kernels.explain,
]  # fmt: skip


def hostile_call(rng: random.Random, folder: Path) -> str:
    """Replace one argument: expect a one-line ValueError or TypeError, or a result if the value is allowed."""
    function = rng.choice([*ON_LOGITS, *ALL_LOSSES, *_LINEAR])
    if function in _LINEAR:
        arguments = {"hidden": torch.zeros(N, T, 5), "weight": torch.zeros(V, 5)}
        arguments["labels"] = torch.ones(N, T, dtype=torch.long)
        names = [*arguments, *_OPTIONS, *_OF_HEADS]
        if "loss" in function.__name__:
            arguments["ref_logps"] = torch.zeros(N)
            names += [*_OF_LOSSES, "ref_logps", "ref_hidden", "ref_weight", "return_stats"]
    else:
        arguments = good(function, packed=function in ON_LOGITS and rng.random() < 0.3)
        names = list(arguments)
        if function in ON_LOGITS:
            names += _OPTIONS
        if function in ALL_LOSSES:
            names += _OF_LOSSES
        if function in LOSSES:
            names += ["inplace_backward", "return_stats"]
    name, value = rng.choice(names), rng.choice(_HOSTILE)
    try:
        result = function(**arguments | {name: value})
    except (ValueError, TypeError) as error:
        one_line(error)
        assert isinstance(error, TypeError) or str(error).startswith(tuple(names) + ("labels",)), str(error)
        return "refused"
    result = result[0] if isinstance(result, tuple) and not hasattr(result, "schedule") else result
    assert name not in _TENSORS or value is None or isinstance(value, torch.Tensor), f"{name}={value!r} passed"
    if name in ("policy_logps", "logits", "hidden", "weight") and not torch.as_tensor(value).isfinite().all():
        assert not result.isfinite().all(), f"{name}={value!r}: the result hides a NaN of the policy"
        return "allowed"
    assert hasattr(result, "schedule") or result.device.type == "meta" or result.isfinite().all(), f"{name}={value!r}"
    return "allowed"


# exo.data


def data_file(rng: random.Random, folder: Path) -> str:
    """Read a mutated file of valid rows: expect a DataError that names the file, or all rows read or skipped."""
    path, rows, purpose, mutated = fuzz_files.data_file(rng, folder)
    skip = rng.random() < 0.5
    try:
        loaded = data.read(path, purpose=purpose, skip_invalid=skip)
    except data.DataError as error:
        assert path.name in str(error), f"names no file: {error}"
        assert mutated, f"valid rows refused: {error}"
        return one_line(error)
    assert loaded.rows == len(loaded.examples) + sum(loaded.skipped.values())
    assert mutated or loaded.rows == rows, f"{loaded.rows} of {rows} rows"
    return "skipped some" if loaded.skipped else "right"


# exo.models


@functools.cache
def _model() -> tuple[Path, torch.Tensor]:
    """Return the directory of a tiny model, and its logits."""
    import tempfile

    from tasks import write_model

    directory = Path(tempfile.mkdtemp(prefix="exo-fuzz-model-"))
    write_model(directory)
    return directory, _logits(directory)


def _logits(directory: Path) -> torch.Tensor:
    model, tokenizer = models.load(str(directory))
    with torch.no_grad():
        return model(torch.tensor([tokenizer("red green good big").input_ids])).logits.double()


def model_directory(rng: random.Random, folder: Path) -> str:
    """Load a mutated model directory: expect a one-line ValueError, or the logits of the original model."""
    source, expected = _model()
    directory = folder / "model"
    shutil.copytree(source, directory)
    mutation = fuzz_files.model_directory(rng, directory)
    try:
        logits = _logits(directory)
    except ValueError as error:
        return one_line(error)
    if logits.shape == expected.shape and torch.equal(logits, expected):
        return "right"
    assert mutation == "changed", f"{mutation}, and other logits"
    return "another model"  # a changed number in the config or the weights can give a valid model


# YAML and recipes


def yaml_file(rng: random.Random, folder: Path) -> str:
    """Parse options from a mutated YAML file: expect a Config, or an exit with a one-line message."""
    path = folder / "options.yaml"
    fuzz_files.write_yaml(rng, path, "model: tiny\ndata: rows.jsonl\nbeta_pi: 0.5\nmax_steps: 10\ndropout: true\n")
    error: list[str] = []
    with patch.object(_Parser, "exit", lambda self, status, message: (_ for _ in ()).throw(_Exit(message))):
        try:
            parsed = parse(align.Config, ["--config", str(path)], prog="fuzz", description=None)
        except _Exit as stop:
            error = str(stop).splitlines()
    if error:
        assert len(error) == 1 and len(error[0]) < 1000, error[:2]
        return "refused"
    assert parsed.max_steps == -1 or parsed.max_steps >= 1
    return "right"


class _Exit(Exception):
    pass


def recipe_file(rng: random.Random, folder: Path) -> str:
    """Plan a mutated recipe: expect a plan, or a one-line ConfigError."""
    path = folder / "recipe.yaml"
    text = (experiment_recipe.RECIPES / f"{rng.choice(['quickstart', 'polarity'])}.yaml").read_text(encoding="utf-8")
    if rng.random() < 0.5:
        fuzz_files.write_yaml(rng, path, text)
    else:
        values = yaml_files.parse(text, typed=True)
        fuzz_files.replace_somewhere(rng, values)
        path.write_text(json.dumps(values), encoding="utf-8", errors="surrogateescape")
    try:
        steps = plan.plan(
            experiment_recipe.load(str(path), source="rows.jsonl" if "polarity" in text else None), folder
        )
    except ConfigError as error:
        return one_line(error)
    assert steps[-1].stage == "report"
    return "planned"


# faults


def fault(rng: random.Random, folder: Path) -> str:
    """Raise OSError at the n-th file system call: expect the complete old or new file, and no other file."""
    run, old, new = folder / "run", {"a": 1}, {"a": 2, "b": "x" * rng.choice([1, 10_000])}
    run.mkdir()
    write_json(run / "file.json", old)
    calls, failing = [0], rng.randint(1, 6)

    def failing_call(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == failing:
                raise OSError(rng.choice([28, 5, 122]), "injected", str(folder))
            return real(*arguments, **options)

        return call

    names = ["fsync", "replace", "open"]
    patches = [patch.object(os, name, failing_call(getattr(os, name))) for name in names]
    try:
        for patcher in patches:
            patcher.start()
        write_json(run / "file.json", new)
        outcome = "written"
    except OSError as error:
        assert "injected" in str(error)
        outcome = "failed"
    finally:
        for patcher in patches:
            patcher.stop()
    assert json.loads((run / "file.json").read_text()) in (old, new)
    assert [entry.name for entry in run.iterdir()] == ["file.json"], "something is left behind"
    return outcome


def record(rng: random.Random, folder: Path) -> str:
    """Read a mutated run.json: expect None, or a record with the right types."""
    values: Any = {
        "stage": "align", "command": ["python"], "arguments": {"seed": 0}, "started": "now", "inputs": {"data": "x"},
        "outputs": {"model.safetensors": "x"}, "finished": "now", "again": ["now"],
    }  # fmt: skip
    fuzz_files.replace_somewhere(rng, values)
    text = json.dumps(values)
    if rng.random() < 0.3:
        text = fuzz_files.mutated_text(rng, text)
    (folder / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    run = run_record.read_run(folder)
    if run is None:
        return "refused"
    assert isinstance(run["stage"], str) and isinstance(run["arguments"], dict)
    assert run_record.command(run).isprintable()  # because messages show it
    if run["stage"] in run_record.STAGES:  # call the functions that the next stage calls
        run_record.changed(run, {"seed": 1})
        try:
            run_inputs.source("data", str(folder), run["stage"])
        except (ValueError, RunError) as error:
            one_line(error)
    return "right"


class Class(NamedTuple):
    case: Case
    share: int  # weight in the number of cases


CLASSES = {
    "valid-calls": Class(valid_call, 30),
    "hostile-calls": Class(hostile_call, 30),
    "data": Class(data_file, 15),
    "models": Class(model_directory, 5),
    "yaml": Class(yaml_file, 8),
    "recipes": Class(recipe_file, 3),
    "records": Class(record, 5),
    "faults": Class(fault, 4),
}
