"""Alignment end to end on a tiny model: the files it writes, the inputs it refuses, gradients in micro-batches."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exo import align, models
from exo import data as exo_data
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed.accelerator import make_accelerator
from exo.evaluation import metrics as evaluation_metrics
from exo.runs.atomic import atomic_directory
from exo.training import metrics as training_metrics
from exo.training import preference, reference, sampler
from exo.training import step as training_step
from exo.training.optimizer import OptimizerSettings, learning_rate_share

WORDS = "red green blue round square small large heavy light".split()


def rows(n: int, ragged: bool = False) -> list[dict]:
    """Return rows whose completions have 0, 1, 2, ... times the word "small"; more of it has a higher reward."""
    examples = []
    for i in range(n):
        k = 2 + i % 3 if ragged else 3
        texts = [" ".join([WORDS[(i + j) % 9]] + ["small"] * (j + i % 2) + ["thing"]) for j in range(k)]
        examples.append(
            {"prompt": f"Describe thing {i}:", "completions": texts, "rewards": [float(j) for j in range(k)]}
        )
    return examples


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def options(tmp_path, data: str, *extra: str) -> list[str]:
    base = ["--model", "tiny", "--data", data, "--output_dir", str(tmp_path / "run"), "--max_steps", "4"]
    return [*base, "--batch_size", "8", "--learning_rate", "1e-3", "--device", "cpu", *extra]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train once; several tests read the run directory."""
    tmp_path = tmp_path_factory.mktemp("align")
    data = write(tmp_path / "rows.jsonl", rows(40, ragged=True))
    assert align.main(options(tmp_path, data, "--eval_steps", "2", "--export_steps", "3")) == 0
    return tmp_path / "run"


def test_the_run_directory_is_a_model_directory(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert model(**tokenizer("Describe thing", return_tensors="pt")).logits.isfinite().all()
    for checkpoint in ("best", "step-3"):
        AutoModelForCausalLM.from_pretrained(run / "models" / checkpoint)


def test_the_run_record_holds_arguments_inputs_and_versions(run):
    record = json.loads((run / "run.json").read_text())
    assert record["arguments"]["seed"] == 0 and len(record["inputs"]["data"]) == 64
    assert record["versions"]["torch"] == torch.__version__
    assert 0 <= record["result"]["eval_accuracy_low"] <= record["result"]["eval_accuracy_high"] <= 1


def test_every_step_is_a_line_of_metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert {"rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate", "tokens_per_second"} <= set(steps[0])
    assert steps[0]["rewards/accuracies"] == 0.5  # all pairs tie because the policy equals the reference
    assert steps[-1]["loss"] < steps[0]["loss"]
    picture = (run / "plots" / "training.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_first_loss_matches_its_expected_value(tmp_path, capsys):
    data = write(
        tmp_path / "p.jsonl", [{"prompt": f"{i}:", "chosen": "small thing", "rejected": "red"} for i in range(9)]
    )
    assert align.main(options(tmp_path, data, "--eval_fraction", "0", "--max_steps", "1")) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("first loss"))
    assert "expected 2.76123" in line and "seen 2.76123" in line


def test_a_wrong_reference_is_an_error_before_the_first_update(tmp_path, capsys, monkeypatch):
    def score_at_another_temperature(model, examples, accelerator, collator, temperature, keep):
        return score(model, examples, accelerator, collator, 1.2 * temperature, keep)

    score = reference.score
    monkeypatch.setattr(reference, "score", score_at_another_temperature)
    data = write(tmp_path / "rows.jsonl", rows(20))
    assert align.main(options(tmp_path, data)) == 1
    assert "where policy equals reference" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_reference_errors_that_cancel_in_the_mean_are_detected(tmp_path, capsys, monkeypatch):
    """Check that errors of opposite sign, which barely change the mean loss, are detected in the log-ratios."""

    def noisy(*args, **kwargs):
        examples = score(*args, **kwargs)
        return [
            dataclasses.replace(g, ref_logps=tuple(x + (-1) ** (i + j) * 0.01 for j, x in enumerate(g.ref_logps)))
            for i, g in enumerate(examples)
        ]

    score = reference.score
    monkeypatch.setattr(reference, "score", noisy)
    data = write(tmp_path / "rows.jsonl", rows(20))
    assert align.main(options(tmp_path, data)) == 1
    assert "differ by 0.01 nats rms" in capsys.readouterr().err


def test_no_held_out_prompt_is_trained_on(tmp_path):
    """Check this also for one prompt that is truncated to different lengths."""
    lines = [{**row, "prompt": f"{i % 5} " + "word " * 30} for i, row in enumerate(rows(40, ragged=True))]
    config = align.Config(
        model="tiny", data=write(tmp_path / "rows.jsonl", lines), max_length=24, max_prompt_length=12, eval_fraction=0.4
    )
    dataset = exo_data.read(config.data)
    _, tokenizer = models.load_or_tiny("tiny", dataset.texts, seed=0)
    examples = align.tokens(config, dataset, tokenizer, Counter())
    train, held_out, _ = align.split_rows(config, dataset, examples, [], Counter())
    by_line = {i + 1: line["prompt"] for i, line in enumerate(lines)}
    assert {by_line[g.line] for g in train}.isdisjoint({by_line[g.line] for g in held_out})
    assert train and held_out and len(train) + len(held_out) == 40


def test_a_run_that_fails_to_start_removes_no_files(tmp_path, run, capsys):
    files = sorted(path.name for path in run.iterdir())
    data = write(tmp_path / "rows.jsonl", rows(20))
    for model in ("tinyy", str(run)):  # a typo; the directory that would be overwritten
        argv = options(tmp_path, data, "--overwrite_output_dir")
        argv[1], argv[argv.index("--output_dir") + 1] = model, str(run)
        assert align.main(argv) != 0
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert sorted(path.name for path in run.iterdir()) == files


def test_max_length_beyond_the_models_positions_is_a_one_line_error(tmp_path, capsys):
    model, tokenizer = models.tiny(["a b c"], hidden_size=32, num_layers=1, num_heads=2)
    model.config.max_position_embeddings = 8
    models.save(model, tokenizer, tmp_path / "short")
    argv = options(tmp_path, write(tmp_path / "rows.jsonl", rows(20)))
    argv[1] = str(tmp_path / "short")
    assert align.main(argv) == 2
    assert "--max_length: expected at most the 8 positions" in capsys.readouterr().err


def test_another_reference_skips_the_first_loss_check(tmp_path, run, capsys):
    data = write(tmp_path / "rows.jsonl", rows(20))
    argv = options(tmp_path, data, "--max_steps", "1")
    argv[1] = str(run)
    assert align.main([*argv, "--ref_model", str(run / "models" / "step-3")]) == 0
    assert "not comparable: another reference" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nonfinite_loss_or_gradient_stops_before_the_update(where, tmp_path, capsys, monkeypatch):
    saved = {}

    def poisoned(self, batch, count):
        share = forward(self, batch, count)
        saved["weights"] = [p.detach().clone() for p in self.parameters()]
        saved["module"] = self
        if where == "loss":
            return share._replace(loss=share.loss * math.nan)
        # a finite loss whose gradient is infinite
        parameter = next(self.parameters())
        return share._replace(loss=share.loss + (parameter.sum() * 0).abs().sqrt())

    forward = preference.PreferenceLoss.forward
    monkeypatch.setattr(preference.PreferenceLoss, "forward", poisoned)
    data = write(tmp_path / "rows.jsonl", rows(20))
    assert align.main(options(tmp_path, data)) == 1
    error = capsys.readouterr().err
    assert "step 1:" in error and "rows at lines" in error and len(error.strip().splitlines()) == 1
    for before, after in zip(saved["weights"], saved["module"].parameters(), strict=True):
        assert torch.equal(before, after)


def test_an_earlier_run_is_not_overwritten(tmp_path, run, capsys):
    data = write(tmp_path / "rows.jsonl", rows(20))
    argv = options(tmp_path, data)
    argv[argv.index("--output_dir") + 1] = str(run)
    record = (run / "run.json").read_bytes()
    assert align.main(argv) == 1
    assert "holds an earlier run" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == record


def test_files_that_no_run_wrote_are_never_removed(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    data = write(tmp_path / "rows.jsonl", rows(20))
    assert align.main(options(tmp_path, data, "--overwrite_output_dir")) == 1
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"
    assert "holds files that no run wrote" in capsys.readouterr().err


def test_a_malformed_row_is_one_line_and_exit_2(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write(path, rows(3))
    path.write_text(path.read_text() + '{"prompt": "secret"\n')
    assert align.main(options(tmp_path, str(path))) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:4:" in error and "secret" not in error and len(error.strip().splitlines()) == 1


def _module(seed: int) -> tuple[preference.PreferenceLoss, int]:
    model, tokenizer = models.tiny(["a b c"], seed=seed, hidden_size=32, num_layers=1, num_heads=2)
    module = preference.PreferenceLoss(
        model.double(), loss="exo", beta_pi=0.5, beta_r=0.5, label_smoothing=1e-3, temperature=0.8
    )
    return module, tokenizer.pad_token_id


def _groups() -> list[TokenizedExample]:
    """Return groups of very different sizes and lengths."""
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 200, (n,), generator=generator).tolist())

    groups = []
    for i in range(8):
        completions = tuple(tokens(1 + (7 * i + 5 * j) % 23) for j in range(2 + i % 4))
        rewards = tuple(float(len(c) % 5) for c in completions)
        groups.append(
            TokenizedExample(tokens(1 + 3 * i), completions, rewards, i, tuple(-4.0 * len(c) for c in completions))
        )
    return groups


def test_micro_batches_never_change_the_gradient():
    gradients = []
    for max_tokens in (10**6, 300, 1):
        module, pad_id = _module(seed=0)
        accelerator = make_accelerator(device="cpu")
        collator = Collator(pad_id, max_tokens)
        parts = collator.micro_batches(_groups())
        loss, _, _ = training_step.accumulate(module, parts, len(_groups()), accelerator, collator.collate, 1)
        gradients.append((loss, [p.grad.clone() for p in module.parameters()]))
    assert len(parts) == 8
    for loss, gradient in gradients[1:]:
        assert abs(loss - gradients[0][0]) < 1e-12
        for a, b in zip(gradient, gradients[0][1], strict=True):
            assert (a - b).abs().max() < 1e-13


def test_batches_visit_every_prompt_once_an_epoch_and_leave_the_random_state_alone():
    examples = _groups()
    state = torch.get_rng_state()
    epochs = list(sampler.BatchSampler(examples, steps=6, batch_size=3, seed=5))
    assert torch.equal(state, torch.get_rng_state())
    for epoch in (epochs[:3], epochs[3:]):
        assert sorted(g.line for batch in epoch for g in batch) == list(range(8))
    assert epochs[:3] != epochs[3:]


@pytest.mark.parametrize(
    ("kind", "shares"),
    [("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]), ("constant", [0.5, 1, 1, 1, 1, 1])],
)
def test_learning_rate(kind, shares):
    settings = OptimizerSettings(lr_scheduler_type=kind, warmup_steps=2)
    assert [learning_rate_share(settings, 6, step) for step in range(6)] == shares


def test_accuracy_counts_ties_as_one_half():
    target = torch.tensor([2.0, 1.0, 1.0])
    assert training_metrics.ranking_accuracy(torch.tensor([0.0, 0.0, 0.0]), target) == 0.5
    assert training_metrics.ranking_accuracy(torch.tensor([3.0, 1.0, 2.0]), target) == 1.0
    assert training_metrics.ranking_accuracy(torch.tensor([1.0, 0.0, 2.0]), target) == 0.5


@pytest.mark.parametrize(("size", "sizes"), [(7, [8, 8]), (6, [8, 8]), (5, [5, 3, 5, 3]), (9, [8, 8]), (99, [8, 8])])
def test_a_small_last_batch_joins_the_previous_one(size, sizes):
    steps = sampler.total_steps(8, size, epochs=2)
    assert [len(b) for b in sampler.BatchSampler(_groups(), steps, size, seed=0)] == sizes


@pytest.mark.parametrize(("values", "interval"), [([1.0, 1.0], (0.342, 1.0)), ([1.0, 0.0] * 50, (0.404, 0.596))])
def test_the_accuracy_interval_is_wilsons(values, interval):
    assert evaluation_metrics.accuracy_interval(values) == pytest.approx(interval, abs=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_same_metrics_as_one(tmp_path):
    """Check this for ragged groups, a last batch of one prompt, and ties that leave one rank without accuracies."""
    lines = [row | {"rewards": [1.0] * len(row["rewards"])} if i % 3 else row for i, row in enumerate(rows(17, True))]
    data = write(tmp_path / "rows.jsonl", lines)
    flags = ["--model", "tiny", "--data", data, "--batch_size", "4", "--max_steps", "8", "--eval_fraction", "0"]
    metrics = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "exo.align"]
        command = [
            sys.executable,
            *launch,
            *flags,
            "--learning_rate",
            "1e-3",
            "--device",
            "cpu",
            "--output_dir",
            str(out),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, child.stderr
        metrics[processes] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for one, two in zip(metrics[1], metrics[2], strict=True):
        for name in ("loss", "grad_norm", "tokens", "rewards/margins", "log_ratios/mean_square"):
            assert (name in one) == (name in two)
            assert two.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-3, abs=1e-5), (name, one["step"])


def test_half_a_checkpoint_is_never_seen(tmp_path):
    with pytest.raises(OSError), atomic_directory(tmp_path / "best") as staging:
        (staging / "model").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
