"""The stages sample, score and best_of_n: token ids, subsets of prompts, rewards, Best-of-N."""

import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from exo import best_of_n, data, models, sample, score
from exo.data.text import tokenize
from exo.data.text.limits import Limits
from exo.models import files
from exo.rollouts import generate as rollout_generate
from exo.rollouts import samples, scorers
from tests.tasks import PROMPTS, lines, write_model, write_rows
from tests.tokenizer_kinds import prompt_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return (model directory, prompts file, run directory) of a sampling run."""
    directory = tmp_path_factory.mktemp("sample")
    model = write_model(directory / "model", scale=2.0)
    prompts = write_rows(directory / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    run = sample.run(sample.Config(output_dir=str(directory / "run"), **options(model, prompts)))
    return model, prompts, run


def options(model, prompts):
    return {"model": model, "data": prompts, "k": 4, "max_new_tokens": 6, "temperature": 0.8, "seed": 3}


def test_rows_hold_texts_tokens_and_log_probs_of_the_samples(drawn):
    model, _, run = drawn
    _, tokenizer = models.load(model)
    rows = lines(run / "samples.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    finishes = set()
    for row in rows:
        assert len(row["completions"]) == len(row["token_ids"]) == len(row["logprobs"]) == 4
        for text, ids, finish in zip(row["completions"], row["token_ids"], row["finish"], strict=True):
            words = tokenizer.decode(ids, skip_special_tokens=True)
            assert text == (f" {words}" if words else ""), "the text must begin with a space"
            assert (ids[-1] == tokenizer.eos_token_id) == (finish == "eos")
            finishes.add(finish)
    assert finishes == {"eos", "length"}, "the cases must include both finish reasons"


def test_training_sees_the_tokens_that_were_drawn(drawn):
    """Check that training does not tokenize the text again, which would add an end of sequence to cut samples."""
    model, _, run = drawn
    _, tokenizer = models.load(model)
    examples = data.read(run / "samples.jsonl", purpose="samples").examples
    encoded, _ = tokenize.encode(examples, tokenizer, Limits(64, None, "error"), "samples")
    for example, row in zip(encoded, lines(run / "samples.jsonl"), strict=True):
        assert [list(ids) for ids in example.completions] == row["token_ids"]
        assert list(example.prompt) == prompt_ids(row["prompt"], tokenizer)


def test_tokens_of_another_tokenizer_are_refused_by_a_policy_and_read_as_text_by_a_reward_model(drawn, tmp_path):
    _, _, run = drawn
    other = write_model(tmp_path / "other", words=["a", *"red green blue round square good bad big small".split()])
    _, tokenizer = models.load(other)
    examples = data.read(run / "samples.jsonl", purpose="samples").examples
    limits = Limits(64, None, "error")
    with pytest.raises(data.DataError, match=r"samples:1: token ids of another tokenizer .* python -m exo.sample"):
        tokenize.encode(examples, tokenizer, limits, "samples")
    encoded, _ = tokenize.encode(examples, tokenizer, limits, "samples", retokenize=True)
    for example, source in zip(encoded, examples, strict=True):
        for ids, text, finish in zip(example.completions, source.completions, source.tokens.finish, strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=True) == text.strip()
            assert (len(ids) > 0 and ids[-1] == tokenizer.eos_token_id) == (finish == "eos")


def test_a_subset_of_the_prompts_gets_the_same_completions(drawn, tmp_path):
    model, prompts, run = drawn
    subset = sample.run(sample.Config(output_dir=str(tmp_path / "part"), first=2, prompts=3, **options(model, prompts)))
    expected_rows = lines(run / "samples.jsonl")[2:5]
    for row, expected_row in zip(lines(subset / "samples.jsonl"), expected_rows, strict=True):
        assert row["token_ids"] == expected_row["token_ids"]


def test_every_epoch_draws_new_completions(drawn, tmp_path):
    model, prompts, run = drawn
    twice = sample.run(sample.Config(output_dir=str(tmp_path / "twice"), epochs=2, **options(model, prompts)))
    rows = lines(twice / "samples.jsonl")
    assert [row["token_ids"] for row in rows[:6]] == [row["token_ids"] for row in lines(run / "samples.jsonl")]
    assert [row["prompt"] for row in rows[6:]] == PROMPTS
    assert all(a["token_ids"] != b["token_ids"] for a, b in zip(rows[:6], rows[6:], strict=True))


def test_top_p_draws_from_the_fewest_tokens_that_reach_it():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    nucleus = {p: rollout_generate._nucleus(logprobs, p).isfinite()[0].tolist() for p in (1.0, 0.9, 0.75, 0.4, 1e-9)}
    assert nucleus[1.0] == [True] * 4
    assert nucleus[0.9] == [True, True, True, False]
    assert nucleus[0.75] == [True, True, False, False]
    assert nucleus[0.4] == nucleus[1e-9] == [True, False, False, False]
    shuffled = rollout_generate._nucleus(logprobs[:, [3, 0, 2, 1]], 0.75)
    assert shuffled.isfinite()[0].tolist() == [False, True, False, True]


def test_top_p_keeps_the_log_probs_of_the_full_distribution(drawn):
    model, tokenizer = models.load(drawn[0])
    ids = [prompt_ids(PROMPTS[0], tokenizer)]
    row = rollout_generate.sample(model, (2,), ids, k=1, temperature=0.8, top_p=1e-6, max_new_tokens=1, seed=0)[0][0]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor(ids)).logits[0, -1] / 0.8, -1)
    assert row.token_ids[0] == int(logprobs.argmax())
    assert row.logprob == pytest.approx(float(logprobs.max()), abs=1e-5) and row.logprob < -0.1


def test_vllm_gets_a_distinct_seed_per_completion_and_gives_the_same_rows(drawn, tmp_path, monkeypatch):
    """Check requests and results with a fake vLLM; no test runs the real one."""
    requests = []

    class LLM:
        def __init__(self, **settings):
            assert settings["logprobs_mode"] == "processed_logprobs"

        def generate(self, prompts, params):
            outputs = []
            for prompt, p in zip(prompts, params, strict=True):
                requests.append((tuple(prompt["prompt_token_ids"]), p.seed))
                assert p.stop_token_ids == [2] and p.logit_bias is None
                ids = [5, 2] if len(requests) % 2 else [5, 6]
                logprobs = [{i: types.SimpleNamespace(logprob=-0.5)} for i in ids]
                reason = "stop" if ids[-1] == 2 else "length"
                completion = types.SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)
                outputs.append(types.SimpleNamespace(outputs=[completion]))
            return outputs

    fake_vllm = types.SimpleNamespace(LLM=LLM, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    model, prompts, _ = drawn
    run = sample.run(sample.Config(output_dir=str(tmp_path / "run"), engine="vllm", **options(model, prompts)))
    rows = lines(run / "samples.jsonl")
    assert len(requests) == len(set(requests)) == 4 * len(PROMPTS)
    assert rows[0]["token_ids"] == [[5, 2], [5, 6]] * 2 and rows[0]["finish"] == ["eos", "length"] * 2
    assert rows[0]["logprobs"] == [-1.0] * 4


def test_missing_vllm_is_an_error(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    model, prompts, _ = drawn
    arguments = [f"--{name}={value}" for name, value in options(model, prompts).items()]
    assert sample.main([*arguments, "--engine", "vllm", "--output_dir", str(tmp_path / "x")]) == 2
    assert "pip install vllm" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# Scoring


def run_score(run, tmp_path, **options):
    return score.run(score.Config(data=str(run), output_dir=str(tmp_path / "scored"), **options))


def test_an_oracle_scores_every_completion_and_keeps_the_tokens(drawn, tmp_path):
    run = run_score(drawn[2], tmp_path, oracle="tests.tasks:reward")
    for row, sample_row in zip(lines(run / "scored.jsonl"), lines(drawn[2] / "samples.jsonl"), strict=True):
        assert row["rewards"] == [text.split().count("good") for text in row["completions"]]
        assert {key: row[key] for key in sample_row} == sample_row
    result = json.loads((run / "run.json").read_text())["result"]
    assert result["completions"] == 4 * len(PROMPTS)


def test_degenerate_rows_are_counted(tmp_path):
    rows = [{"prompt": "p", "completions": ["good"]}, {"prompt": "p", "completions": ["bad", "bad red"]}]
    source = write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "p", "completions": ["good", "bad"]}])
    run = score.run(score.Config(data=source, oracle="tests.tasks:reward", output_dir=str(tmp_path / "run")))
    result = json.loads((run / "run.json").read_text())["result"]
    assert result["rows of one completion"] == 1 and result["rows whose rewards are all equal"] == 1


@pytest.mark.parametrize(
    "name",
    ["tests.tasks:absent", "absent:f", "tests.tasks", ":", "tests.tasks:not_a_number", "os:getcwd", "operator:add"],
)
def test_an_invalid_oracle_is_an_error(drawn, tmp_path, capsys, monkeypatch, name):
    assert score.main(["--data", str(drawn[2]), "--oracle", name, "--output_dir", str(tmp_path / "x")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"--oracle {name}: " in error and "expected" in error
    valid = ["--data", str(drawn[2]), "--oracle", "tests.tasks:reward", "--output_dir", str(tmp_path / "x")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # interrupted after run.json is written
        patch.setattr(scorers, "describe", lambda scores: (_ for _ in ()).throw(KeyboardInterrupt))
        score.run(score.Config(data=str(drawn[2]), oracle="tests.tasks:reward", output_dir=str(tmp_path / "x")))
    assert score.main(["--data", str(drawn[2]), "--oracle", name, "--output_dir", str(tmp_path / "x")]) == 1
    assert score.main(valid) == 0, "a run that failed before it started must not block this one"


def test_exactly_one_scorer_is_required(drawn, capsys):
    for arguments in ([], ["--oracle", "a:b", "--reward_model", "m"]):
        with pytest.raises(SystemExit):
            score.main(["--data", str(drawn[2]), *arguments])
        assert "--reward_model: expected this or --oracle, and not both" in capsys.readouterr().err


def test_truncated_prompts_are_counted(drawn, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "red green blue red green"}, {"prompt": "red"}])
    arguments = ["--model", str(drawn[0]), "--data", prompts, "--max_prompt_length", "3", "--max_new_tokens", "4"]
    assert sample.main([*arguments, "--output_dir", str(tmp_path / "samples"), "--device", "cpu"]) == 0
    assert "  1 prompts cut on the left" in capsys.readouterr().out
    classifier, tokenizer = models.classifier_from(str(drawn[0]), 1, seed=0)
    models.save(classifier, tokenizer, tmp_path / "reward")
    arguments = ["--data", str(tmp_path / "samples"), "--reward_model", str(tmp_path / "reward"), "--max_length", "6"]
    assert score.main([*arguments, "--output_dir", str(tmp_path / "scored"), "--device", "cpu"]) == 0
    assert "completions scored with the prompt cut on the left" in capsys.readouterr().out


def test_a_missing_model_is_a_one_line_error(drawn, tmp_path, capsys, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("offline")

    monkeypatch.setattr(files, "cached_file", offline)
    assert sample.main(["--model", "nowhere", "--data", str(drawn[1]), "--output_dir", str(tmp_path / "x")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == "error: model 'nowhere': expected a directory, and there is none; or a hub name; got: offline"


# Best-of-N


def test_the_best_of_every_block_keeps_its_tokens_and_log_probs(tmp_path, capsys):
    rewards = [1.0, 3.0, 2.0, 5.0, 5.0, 4.0]
    row = {"prompt": "p", "completions": list("abcdef"), "rewards": rewards, "tokenizer": "t"}
    row |= {"token_ids": [[i] for i in range(6)], "logprobs": [-float(i) for i in range(6)], "finish": ["eos"] * 6}
    source = write_rows(tmp_path / "scored.jsonl", [row])
    run = best_of_n.run(best_of_n.Config(data=source, n=3, output_dir=str(tmp_path / "run")))
    assert lines(run / "samples.jsonl") == [
        {"prompt": "p", "completions": ["b", "d"], "rewards": [3.0, 5.0], "tokenizer": "t", "token_ids": [[1], [3]],
         "logprobs": [-1.0, -3.0], "finish": ["eos", "eos"]}
    ]  # fmt: skip
    assert json.loads((run / "run.json").read_text())["result"]["kl_bound"] == math.log(3) - 2 / 3
    assert "  0.0% of the completions were cut for length" in capsys.readouterr().out


def test_the_kl_bound_is_exact_if_all_completions_differ():
    """Compare with KL = E[log(n F^(n-1))] of best-of-n, with density n F^(n-1) over F in (0, 1)."""
    n, points = 5, 200_000
    F = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    density = n * F ** (n - 1)
    assert float((density * density.log()).mean()) == pytest.approx(best_of_n.kl_bound(n), abs=1e-6)
    assert best_of_n.kl_bound(1) == 0


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "p", "completions": ["a", "b"]},
            "rows.jsonl:1: expected rewards; got none; run python -m exo.score",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2]},
            "expected a multiple of --n 3 completions; got 2",
        ),
    ],
)
def test_rows_without_rewards_or_of_the_wrong_size_are_refused(tmp_path, capsys, row, message):
    source = write_rows(tmp_path / "rows.jsonl", [row])
    assert best_of_n.main(["--data", source, "--n", "3", "--output_dir", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_row_of_samples_survives_a_round_trip(tmp_path):
    example = data.Example(
        "p", ("a", "b"), (1.0, 2.0), 1, data.Tokens("t", ((1,), (2, 3)), (-1.0, -2.0), ("eos", "length"))
    )
    with_settings = replace(example, tokens=example.tokens._replace(temperature=0.7, max_new_tokens=9, top_p=0.9))
    path = tmp_path / "rows.jsonl"
    for original in (example, with_settings):
        data.write_jsonl(path, [samples.to_row(original)])
        assert data.read(path, purpose="samples").examples == [original]
