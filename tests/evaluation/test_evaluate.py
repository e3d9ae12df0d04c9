"""Evaluation: the numbers of evaluation.json follow from its samples, and the KL from the models."""

import json
import math

import pytest
import torch

from exo import data, evaluate, models, sample, score
from tests.tasks import PROMPTS, WORDS, lines, reward, write_model, write_rows
from tests.tokenizer_kinds import prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {
    "oracle": "tests.tasks:reward",
    "temperature": 0.8,
    "max_new_tokens": 6,
    "max_length": 16,
    "k": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Evaluate a reference and a policy of two checkpoints; return their directory and the policy's evaluation."""
    directory = tmp_path_factory.mktemp("evaluate")
    reference = write_model(directory / "reference", scale=2.0)
    policy = directory / "policy"
    write_model(policy, scale=2.0)
    write_model(policy / "models" / "step-2", scale=2.0)  # the same as the reference
    write_model(policy / "models" / "step-4", scale=2.2, seed=0)
    model, tokenizer = models.load(policy / "models" / "step-4")
    models.save(model, tokenizer, policy)
    data.write_jsonl(policy / "metrics.jsonl", [{"step": i, "loss": 0.0} for i in range(1, 5)])
    rows = [{"prompt": prompt, "chosen": "good good", "rejected": "bad"} for prompt in PROMPTS]
    prompts = write_rows(directory / "prompts.jsonl", rows)
    common = OPTIONS | {"reference": reference, "data": prompts}
    base = evaluate.run(evaluate.Config(model=reference, output_dir=str(directory / "base"), **common))
    drawn = sample.run(
        sample.Config(model=reference, data=prompts, prompts=2, k=9, temperature=0.8, max_new_tokens=6,
                      output_dir=str(directory / "drawn"))
    )  # fmt: skip
    dense = score.run(score.Config(data=str(drawn), oracle="tests.tasks:reward", output_dir=str(directory / "dense")))
    done = evaluate.run(
        evaluate.Config(
            model=str(policy), output_dir=str(directory / "done"), baseline=str(base), chosen=True, density=str(dense),
            **common,
        )
    )  # fmt: skip
    return directory, done


def entries(directory):
    return {entry["name"]: entry for entry in json.loads((directory / "evaluation.json").read_text())["checkpoints"]}


def test_each_checkpoint_is_evaluated_once(run):
    checkpoints = entries(run[1])
    assert {name: entry["step"] for name, entry in checkpoints.items()} == {"step-2": 2, "final": 4}
    assert sorted(path.stem for path in (run[1] / "samples").iterdir()) == ["final", "step-2"]


def test_the_numbers_follow_from_the_samples(run):
    base = lines(run[0] / "base" / "samples" / "final.jsonl")
    for name, entry in entries(run[1]).items():
        rows = lines(run[1] / "samples" / f"{name}.jsonl")
        assert [row["prompt"] for row in rows] == PROMPTS and all(len(row["rewards"]) == 3 for row in rows)
        assert all(row["rewards"] == [reward("", text) for text in row["completions"]] for row in rows)
        means = [sum(row["rewards"]) / 3 for row in rows]
        assert entry["reward"]["mean"] == pytest.approx(sum(means) / 6)
        assert entry["rise"]["mean"] == pytest.approx(sum(means) / 6 - sum(sum(r["rewards"]) / 3 for r in base) / 6)
        pairs = [
            (a > b) + (a == b) / 2 for r, o in zip(rows, base, strict=True) for a in r["rewards"] for b in o["rewards"]
        ]
        assert entry["win_rate"]["reference"]["mean"] == pytest.approx(sum(pairs) / len(pairs))
        over = [(a > 2) + (a == 2) / 2 for row in rows for a in row["rewards"]]
        assert entry["win_rate"]["chosen"]["mean"] == pytest.approx(sum(over) / len(over))
        assert entry["accuracy"]["mean"] == pytest.approx(
            sum(1 / (1 + math.exp(-a)) for row in rows for a in row["rewards"]) / 18
        )


def test_the_kl_is_zero_for_equal_models_and_exact_for_different_ones(run):
    checkpoints = entries(run[1])
    assert checkpoints["step-2"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert checkpoints["step-2"]["rise"]["mean"] == 0 and checkpoints["step-2"]["win_rate"]["reference"]["mean"] == 0.5
    policy, tokenizer = models.load(run[0] / "policy")
    reference, _ = models.load(run[0] / "reference")
    differences, thirds = [], []
    for row in lines(run[1] / "samples" / "final.jsonl"):
        prompt = prompt_ids(row["prompt"], tokenizer)
        for ids in row["token_ids"]:
            with torch.no_grad():
                a, b = (
                    torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0].double() / 0.8, -1)
                    for model in (policy, reference)
                )
            tokens = [float(a[len(prompt) - 1 + i, t] - b[len(prompt) - 1 + i, t]) for i, t in enumerate(ids)]
            differences.append(sum(tokens))
            thirds.append(sum(math.exp(-d) - 1 + d for d in tokens))
    assert checkpoints["final"]["kl"]["mean"] == pytest.approx(sum(differences) / len(differences), abs=1e-5)
    assert checkpoints["final"]["kl_k3"]["mean"] == pytest.approx(sum(thirds) / len(thirds), abs=1e-5)
    assert abs(checkpoints["final"]["kl"]["mean"]) > 1e-3


def test_log_probs_for_the_density_ratio(run):
    rows = lines(run[1] / "density.jsonl")
    drawn = lines(run[0] / "drawn" / "samples.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS[:2]
    for row, source in zip(rows, drawn, strict=True):
        assert row["ref_logps"] == pytest.approx(source["logprobs"], abs=1e-3)
        assert row["logps"] != row["ref_logps"] and len(row["rewards"]) == 9


def test_existing_samples_are_scored_unchanged(run, tmp_path):
    path = run[1] / "samples" / "final.jsonl"
    done = evaluate.run(
        evaluate.Config(samples=str(path), output_dir=str(tmp_path / "x"), reference=str(run[0] / "reference"),
                        data=str(run[0] / "prompts.jsonl"), **OPTIONS)
    )  # fmt: skip
    (entry,) = entries(done).values()
    assert entry["reward"] == entries(run[1])["final"]["reward"] and "kl" not in entry and entry["step"] is None


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"data": "other"}, "expected an evaluation on the same prompts; got others"),
        ({"temperature": 0.5}, "it has temperature 0.8, here 0.5; evaluate the reference again"),
        ({"top_p": 0.9}, "it has top_p 1.0, here 0.9"),
        ({"k": 2}, "it has k 3, here 2"),
        ({"max_new_tokens": 5}, "it has max_new_tokens 6, here 5"),
        ({"oracle": "tests.tasks:length"}, "it has oracle 'tests.tasks:reward', here 'tests.tasks:length'"),
        (
            {"oracle": None, "reward_model": "nowhere"},
            "it has oracle 'tests.tasks:reward', here None; reward_model None",
        ),
    ],
)
def test_a_baseline_with_other_settings_is_refused(run, tmp_path, change, difference):
    """Check that the error names the difference: otherwise the rise and the win rate would be meaningless."""
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "red"}, {"prompt": "blue"}])
    options = OPTIONS | {"data": str(run[0] / "prompts.jsonl")} | change
    options |= {"data": other} if change.get("data") else {}
    reference = str(run[0] / "reference")
    config = evaluate.Config(
        model=reference, reference=reference, baseline=str(run[0] / "base"), output_dir=str(tmp_path / "x"), **options
    )
    with pytest.raises(ValueError, match="--baseline .*") as stop:
        evaluate.run(config)
    assert difference in str(stop.value) and not (tmp_path / "x").exists()


def test_existing_samples_are_recorded_with_their_settings(run, tmp_path):
    """Check that the options of the evaluation are not recorded instead, and that a moved file keeps its settings."""
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((run[0] / "drawn" / "samples.jsonl").read_bytes())
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:2]])
    options = {"data": rows, "reference": "unused", "oracle": "tests.tasks:reward", "max_length": 300}
    done = evaluate.run(evaluate.Config(samples=str(moved), output_dir=str(tmp_path / "x"), **options))
    evaluation = json.loads((done / "evaluation.json").read_text())
    settings = {name: evaluation[name] for name in ("k", "temperature", "top_p", "max_new_tokens")}
    assert settings == {"k": 9, "temperature": 0.8, "top_p": 1.0, "max_new_tokens": 6}
    unrecorded = write_rows(tmp_path / "foreign.jsonl", [{"prompt": p, "completions": ["red"]} for p in PROMPTS[:2]])
    done = evaluate.run(evaluate.Config(samples=unrecorded, output_dir=str(tmp_path / "y"), **options))
    evaluation = json.loads((done / "evaluation.json").read_text())
    assert (evaluation["k"], evaluation["temperature"], evaluation["max_new_tokens"]) == (1, None, None)


def test_a_reference_of_another_tokenizer_is_refused_before_anything_is_written(run, tmp_path, capsys):
    """Check a tokenizer with the same words in another order, which would give a meaningless KL."""
    other = write_model(tmp_path / "other", scale=2.0, words=WORDS[::-1])
    arguments = ["--model", str(run[0] / "policy"), "--reference", other, "--data", str(run[0] / "prompts.jsonl")]
    arguments += ["--oracle", "tests.tasks:reward", "--device", "cpu", "--output_dir", str(tmp_path / "x")]
    assert evaluate.main(arguments) == 2
    assert "expected the tokenizer of --model" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_kl_of_a_long_prompt_uses_the_cut_prompt(run, tmp_path):
    """Compare with the log-probs of the samples less those of the reference after the same cut prompt."""
    words = ("red green blue round square " * 4).split()
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": " ".join(words)}, {"prompt": "red"}])
    done = evaluate.run(
        evaluate.Config(model=str(run[0] / "policy"), reference=str(run[0] / "reference"), data=prompts,
                        output_dir=str(tmp_path / "x"), **(OPTIONS | {"k": 1, "seed": 1}))
    )  # fmt: skip
    row = lines(done / "samples" / "final.jsonl")[0]
    (ids,) = row["token_ids"]
    assert len(ids) < 6, "the test needs a shorter completion than max_new_tokens"
    reference, tokenizer = models.load(run[0] / "reference")
    seen = prompt_ids(" ".join(words[-10:]), tokenizer)
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.tensor([seen + ids])).logits[0].double() / 0.8, -1)
    reference_logp = sum(float(logprobs[9 + i, t]) for i, t in enumerate(ids))
    assert row["log_ratios"] == pytest.approx([row["logprobs"][0] - reference_logp], abs=1e-5)


def test_one_prompt_is_too_few(run, tmp_path, capsys):
    """Check that it is refused: its mean has no error, so that any rise would look significant."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "red"}])
    arguments = ["--model", str(run[0] / "policy"), "--reference", str(run[0] / "reference"), "--data", prompts,
                 "--oracle", "tests.tasks:reward", "--output_dir", str(tmp_path / "x")]  # fmt: skip
    assert evaluate.main(arguments) == 2
    assert "expected at least two prompts" in capsys.readouterr().err


def test_the_kl_under_top_p_is_that_of_the_full_distribution(run, tmp_path):
    """Compare with the exact sum over all completions of at most two tokens; the raw samples are biased."""
    names, kl = (str(run[0] / "policy"), str(run[0] / "reference")), 0.0
    (policy, tokenizer), (reference, _) = map(models.load, names)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(1.5)
    models.save(policy, tokenizer, tmp_path / "policy")
    rows = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])

    def probabilities(model, ids):
        with torch.no_grad():
            return torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)

    for prompt in PROMPTS:
        ids = prompt_ids(prompt, tokenizer)
        p, q = probabilities(policy, ids), probabilities(reference, ids)
        kl += float((p * (p / q).log()).sum()) / len(PROMPTS)
        for token in range(len(tokenizer)):
            if token != tokenizer.eos_token_id:
                p2, q2 = probabilities(policy, [*ids, token]), probabilities(reference, [*ids, token])
                kl += float(p[token] * (p2 * (p2 / q2).log()).sum()) / len(PROMPTS)
    done = evaluate.run(
        evaluate.Config(model=str(tmp_path / "policy"), reference=names[1], data=rows, k=400, max_new_tokens=2,
                        max_length=16, top_p=0.5, oracle="tests.tasks:reward", output_dir=str(tmp_path / "x"))
    )  # fmt: skip
    entry = entries(done)["final"]
    assert entry["kl"]["mean"] == pytest.approx(kl, abs=5 * entry["kl"]["standard_error"])
    assert entry["kl_k3"]["mean"] == pytest.approx(kl, abs=0.1 * kl)
    biased = [ratio for row in lines(done / "samples" / "final.jsonl") for ratio in row["log_ratios"]]
    assert sum(biased) / len(biased) > 1.2 * kl, "the test needs samples that are biased"
