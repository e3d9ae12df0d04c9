"""Evaluation: what evaluation.json says is what its samples say, and the KL is that of the models."""

import json
import math

import pytest
import torch

from exo import data, encoding, evaluate, models, sample, score
from tests.tasks import PROMPTS, WORDS, lines, reward, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
HOW = {
    "oracle": "tests.tasks:reward",
    "temperature": 0.8,
    "max_new_tokens": 6,
    "max_length": 16,
    "k": 3,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A reference, a policy run of two checkpoints, evaluations of both, scored samples of the reference."""
    directory = tmp_path_factory.mktemp("evaluate")
    reference = write_model(directory / "reference", scale=2.0)
    policy = directory / "policy"
    write_model(policy, scale=2.0)
    write_model(policy / "checkpoints" / "step-2", scale=2.0)  # the same as the reference
    write_model(policy / "checkpoints" / "step-4", scale=2.2, seed=0)
    model, tokenizer = models.load(policy / "checkpoints" / "step-4")
    models.save(model, tokenizer, policy)
    data.write_jsonl(policy / "metrics.jsonl", [{"step": i, "loss": 0.0} for i in range(1, 5)])
    rows = [{"prompt": prompt, "chosen": "good good", "rejected": "bad"} for prompt in PROMPTS]
    prompts = write_rows(directory / "prompts.jsonl", rows)
    common = HOW | {"reference": reference, "data": prompts}
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


def test_each_checkpoint_once_and_the_last_by_its_step(run):
    found = entries(run[1])
    assert {name: entry["step"] for name, entry in found.items()} == {"step-2": 2, "final": 4}
    assert sorted(path.stem for path in (run[1] / "samples").iterdir()) == ["final", "step-2"]


def test_the_numbers_are_those_of_the_samples(run):
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


def test_the_kl_is_zero_where_the_models_are_the_same_and_theirs_where_not(run):
    found = entries(run[1])
    assert found["step-2"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["step-2"]["rise"]["mean"] == 0 and found["step-2"]["win_rate"]["reference"]["mean"] == 0.5
    policy, tokenizer = models.load(run[0] / "policy")
    reference, _ = models.load(run[0] / "reference")
    differences, thirds = [], []
    for row in lines(run[1] / "samples" / "final.jsonl"):
        prompt = encoding.prompt_ids(row["prompt"], tokenizer)
        for ids in row["token_ids"]:
            with torch.no_grad():
                a, b = (
                    torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0].double() / 0.8, -1)
                    for model in (policy, reference)
                )
            tokens = [float(a[len(prompt) - 1 + i, t] - b[len(prompt) - 1 + i, t]) for i, t in enumerate(ids)]
            differences.append(sum(tokens))
            thirds.append(sum(math.exp(-d) - 1 + d for d in tokens))
    assert found["final"]["kl"]["mean"] == pytest.approx(sum(differences) / len(differences), abs=1e-5)
    assert found["final"]["kl_k3"]["mean"] == pytest.approx(sum(thirds) / len(thirds), abs=1e-5)
    assert abs(found["final"]["kl"]["mean"]) > 1e-3


def test_log_probs_for_the_density_ratio(run):
    rows = lines(run[1] / "density.jsonl")
    drawn = lines(run[0] / "drawn" / "samples.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS[:2]
    for row, source in zip(rows, drawn, strict=True):
        assert row["ref_logps"] == pytest.approx(source["logprobs"], abs=1e-3)
        assert row["logps"] != row["ref_logps"] and len(row["rewards"]) == 9


def test_samples_that_exist_are_scored_as_they_are(run, tmp_path):
    path = run[1] / "samples" / "final.jsonl"
    done = evaluate.run(
        evaluate.Config(samples=str(path), output_dir=str(tmp_path / "x"), reference=str(run[0] / "reference"),
                        data=str(run[0] / "prompts.jsonl"), **HOW)
    )  # fmt: skip
    (entry,) = entries(done).values()
    assert entry["reward"] == entries(run[1])["final"]["reward"] and "kl" not in entry and entry["step"] is None


def test_another_baseline_is_refused(run, tmp_path, capsys):
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "red"}, {"prompt": "blue"}])
    arguments = ["--model", str(run[0] / "policy"), "--reference", str(run[0] / "reference"), "--data", other]
    arguments += [
        "--baseline",
        str(run[0] / "base"),
        "--oracle",
        "tests.tasks:reward",
        "--output_dir",
        str(tmp_path / "x"),
    ]
    assert evaluate.main(arguments) == 2
    assert "expected an evaluation on the same prompts; got others" in capsys.readouterr().err


def test_a_reference_of_another_tokenizer_is_refused_before_anything_is_written(run, tmp_path, capsys):
    """The same words in another order would give a KL without a meaning."""
    other = write_model(tmp_path / "other", scale=2.0, words=WORDS[::-1])
    arguments = ["--model", str(run[0] / "policy"), "--reference", other, "--data", str(run[0] / "prompts.jsonl")]
    arguments += ["--oracle", "tests.tasks:reward", "--device", "cpu", "--output_dir", str(tmp_path / "x")]
    assert evaluate.main(arguments) == 2
    assert "expected the tokenizer of --model" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_kl_of_a_long_prompt_is_of_what_was_sampled_after(run, tmp_path):
    """The log-probs that it was drawn with, less those of the reference after the same cut prompt."""
    words = ("red green blue round square " * 4).split()
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": " ".join(words)}, {"prompt": "red"}])
    done = evaluate.run(
        evaluate.Config(model=str(run[0] / "policy"), reference=str(run[0] / "reference"), data=prompts,
                        output_dir=str(tmp_path / "x"), **(HOW | {"k": 1, "seed": 1}))
    )  # fmt: skip
    row = lines(done / "samples" / "final.jsonl")[0]
    (ids,) = row["token_ids"]
    assert len(ids) < 6, "the case must leave room for more of the prompt"
    reference, tokenizer = models.load(run[0] / "reference")
    seen = encoding.prompt_ids(" ".join(words[-10:]), tokenizer)
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.tensor([seen + ids])).logits[0].double() / 0.8, -1)
    theirs = sum(float(logprobs[9 + i, t]) for i, t in enumerate(ids))
    assert row["log_ratios"] == pytest.approx([row["logprobs"][0] - theirs], abs=1e-5)


def test_one_prompt_is_too_few(run, tmp_path, capsys):
    """Its mean has no error, so that any rise would be a success."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "red"}])
    arguments = ["--model", str(run[0] / "policy"), "--reference", str(run[0] / "reference"), "--data", prompts,
                 "--oracle", "tests.tasks:reward", "--output_dir", str(tmp_path / "x")]  # fmt: skip
    assert evaluate.main(arguments) == 2
    assert "expected two prompts at least" in capsys.readouterr().err
