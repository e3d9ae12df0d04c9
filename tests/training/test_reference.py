"""Reference log-probs: the cache returns the computed bits, recomputes damaged lines, and matches a live reference."""

import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from exo import align, models
from exo import data as exo_data
from exo.data.collate import Collator
from exo.data.text import tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenizedExample
from exo.models import logps
from exo.runs import record as run_record
from exo.training import preference, reference
from tests.tasks import PROMPTS, WORDS, lines, reward, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
PACKING = Collator(0, 60)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start") / "model"
    write_model(directory, scale=2.0)
    return str(directory)


@pytest.fixture
def model(start):
    return models.load(start)[0]


def examples(n=12):
    draw = torch.Generator().manual_seed(0)

    def ids(high):
        return tuple(
            torch.randint(3, 12, (int(torch.randint(1, high, (1,), generator=draw)),), generator=draw).tolist()
        )

    return [TokenizedExample(ids(9), tuple(ids(6) for _ in range(2 + i % 3)), None, i) for i in range(n)]


def score(model, keep, rows=None, temperature=1.0):
    rows = examples() if rows is None else rows
    return [g.ref_logps for g in reference.score(model, rows, Accelerator(cpu=True), PACKING, temperature, keep)]


@pytest.fixture
def scored_batches(monkeypatch):
    """Record the sizes of the micro-batches that the model scores: one list per call."""
    calls = []
    scoring = logps.logps_function

    def counting(*args):
        context = scoring(*args)
        score_batch = context.__enter__()
        calls.append([])

        class Counting:
            def __enter__(self):
                return lambda part: calls[-1].append(len(part)) or score_batch(part)

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Counting()

    monkeypatch.setattr(logps, "logps_function", counting)
    return calls


def test_cached_log_probs_equal_computed_ones(model, tmp_path, scored_batches):
    computed = score(model, None)
    written = score(model, tmp_path)
    cached = score(model, tmp_path)
    assert computed == written == cached and sum(scored_batches[1]) == 12 and scored_batches[2] == []


def test_a_truncated_cache_is_completed_to_the_same_bits(model, tmp_path, scored_batches):
    expected = score(model, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for cut in (len(content) // 3, len(content) // 2, len(content) - 5, 3):
        file.write_bytes(content[:cut])
        assert score(model, tmp_path) == expected
        assert score(model, tmp_path) == expected and scored_batches[-1] == []
    assert 0 < sum(scored_batches[1]) < 12


def test_a_damaged_line_is_reported_and_recomputed(model, tmp_path, scored_batches, capsys):
    expected = score(model, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_text().splitlines()
    row = json.loads(content[3])
    row["value"][0] += 1e-9
    file.write_text("\n".join([*content[:3], json.dumps(row), *content[4:]]) + "\n")
    assert score(model, tmp_path) == expected and sum(scored_batches[-1]) >= 1
    assert f"1 lines of {file} are damaged and computed again" in capsys.readouterr().out


def test_a_cache_of_another_model_is_not_used(model, tmp_path, capsys):
    expected = score(model, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_text().splitlines()
    file.write_text("\n".join([content[0].replace("weights", "wights"), *content[1:]]) + "\n")
    assert score(model, tmp_path) == expected and "belongs to another model or other rows" in capsys.readouterr().out


def test_the_cache_key_covers_weights_rows_and_temperature(model, tmp_path):
    score(model, tmp_path)
    score(model, tmp_path, temperature=0.5)
    score(model, tmp_path, examples()[:-1])
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] += 1e-6
    score(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "other",
    ["config", "attention", "dtype", "max_tokens", "layout", "versions"],
)
def test_the_cache_key_covers_how_log_probs_are_computed(model, tmp_path, monkeypatch, other, scored_batches):
    accelerator, collator = Accelerator(cpu=True), PACKING
    reference.score(model, examples(), accelerator, collator, 1.0, tmp_path)
    if other == "config":
        model.config.rms_norm_eps *= 2
    elif other == "attention":
        models.attend(model, "eager")
    elif other == "dtype":
        accelerator = SimpleNamespace(mixed_precision="bf16", device=accelerator.device, is_main_process=True,
                                      autocast=accelerator.autocast, num_processes=1, process_index=0,
                                      main_process_first=nullcontext)  # fmt: skip
    elif other == "versions":
        monkeypatch.setattr(run_record, "versions", lambda: {"torch": "another"})
    else:
        collator = collator._replace(**{"max_tokens": {"max_tokens": 61}, "layout": {"layout": "packed"}}[other])
        models.attend(model, "exo_segments" if other == "layout" else "sdpa")
    reference.score(model, examples(), accelerator, collator, 1.0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and sum(scored_batches[-1]) == len(examples())


def test_scoring_keeps_the_random_state_and_the_mode_of_the_model(model, tmp_path):
    state = torch.get_rng_state()
    model.train()
    score(model, tmp_path)
    assert torch.equal(state, torch.get_rng_state()) and model.training


# In runs of align


def rows(with_reference=False):
    examples = []
    for i, prompt in enumerate(PROMPTS * 4):
        texts = [f" {WORDS[i % 5]} good", " good good small", f" bad {WORDS[(i + 2) % 5]}", " big"][: 3 + i % 2]
        row = {"prompt": f"{prompt} {WORDS[i % 7]}", "completions": texts, "rewards": [reward("", t) for t in texts]}
        examples.append(row | ({"ref_logps": [-5.0 - j for j in range(len(texts))]} if with_reference else {}))
    return examples


def run(start, tmp_path, name, *options, **row_options):
    data = write_rows(tmp_path / "rows.jsonl", rows(**row_options))
    arguments = ["--model", start, "--data", data, "--output_dir", str(tmp_path / name), "--max_steps", "4"]
    arguments += ["--batch_size", "8", "--learning_rate", "1e-3", "--device", "cpu", "--beta_pi", "0.5"]
    assert align.main([*arguments, *options]) == 0
    return tmp_path / name


def test_a_sweep_computes_the_reference_once_and_does_not_change_the_run(start, tmp_path, capsys):
    keep = ["--reference_cache", str(tmp_path / "cache")]
    first = run(start, tmp_path, "first", *keep)
    for i, options in enumerate((["--beta_pi", "0.1"], ["--loss", "dpo"], ["--seed", "3"], ["--max_completions", "2"])):
        capsys.readouterr()
        run(start, tmp_path, f"sweep{i}", *keep, *options)
        assert "24 of 24 prompts are cached" in capsys.readouterr().out
    again = run(start, tmp_path, "again", *keep)
    cold = run(start, tmp_path, "cold", "--reference_cache", str(tmp_path / "other"))
    weights = [(directory / "model.safetensors").read_bytes() for directory in (first, again, cold)]
    assert weights[0] == weights[1] == weights[2]


def test_a_live_reference_gives_the_same_run(start, tmp_path):
    cached, live = (run(start, tmp_path, mode, "--reference", mode) for mode in ("cache", "live"))
    for a, b in zip(lines(cached / "metrics.jsonl"), lines(live / "metrics.jsonl"), strict=True):
        for name in a:
            if name != "tokens_per_second":
                assert a[name] == pytest.approx(b[name], abs=1e-4), name


def test_a_live_reference_may_be_a_separate_model(start, tmp_path):
    other = tmp_path / "other_model"
    write_model(other, seed=1, scale=2.0)
    runs = [run(start, tmp_path, mode, "--ref_model", str(other), "--reference", mode) for mode in ("cache", "live")]
    a, b = (lines(directory / "metrics.jsonl")[0] for directory in runs)
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["log_ratios/mean_square"] > 0.1


def test_reference_none_is_the_uniform_reference(start, tmp_path):
    metrics = lines(run(start, tmp_path, "none", "--reference", "none") / "metrics.jsonl")[0]
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * metrics["logps/chosen"], abs=1e-6)


def test_reference_log_probs_of_the_data_are_used_and_reported(start, tmp_path, capsys):
    metrics = lines(run(start, tmp_path, "data", with_reference=True) / "metrics.jsonl")[0]
    assert "the reference's log-probs come from the data" in capsys.readouterr().out
    assert metrics["rewards/chosen"] != pytest.approx(0, abs=0.1)
    run(start, tmp_path, "not", "--reference", "cache", with_reference=True)
    assert "24 of 24 rows have a reference's log-probs, which are not used" in capsys.readouterr().out


def test_reference_log_probs_of_the_data_include_a_shared_prefix(start, tmp_path):
    """Check that rewards are 0 if the data hold the log-probs of the policy itself.

    Those of the data are of full completions, so the policy's must include the prefix that a row's completions share.
    """
    pairs = [{"prompt": "red green", "chosen": f" good big {w}", "rejected": f" good big {w} bad"} for w in WORDS[:5]]
    model, tokenizer = models.load(start)
    examples = exo_data.read(write_rows(tmp_path / "plain.jsonl", pairs)).examples
    encoded, _ = tokenize.encode(examples, tokenizer, Limits(64, None, "error"), "rows")
    scored = reference.score(model, encoded, Accelerator(cpu=True), PACKING, 1.0, None)
    for row, example in zip(pairs, scored, strict=True):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = example.ref_logps
    arguments = ["--model", start, "--data", write_rows(tmp_path / "rows.jsonl", pairs), "--max_steps", "1"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--eval_fraction", "0"]
    assert align.main(arguments) == 0
    [metrics] = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics["rewards/chosen"] == pytest.approx(0, abs=1e-5) == metrics["rewards/margins"]


def test_reference_log_probs_of_the_data_are_not_used_for_truncated_rows(start, tmp_path, capsys):
    """Check that they are ignored, because they include tokens that the policy does not score."""
    run(start, tmp_path, "cut", "--max_completion_length", "2", with_reference=True)
    output = capsys.readouterr().out
    assert "rows cut, so that their log-probs of a reference are of other tokens and not used" in output
    assert "those of the data" not in output and "first loss" in output and "not comparable" not in output


def test_preference_rows_may_have_reference_log_probs(tmp_path):
    row = {"prompt": "red", "chosen": "good", "rejected": "bad", "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}
    (example,) = exo_data.read(write_rows(tmp_path / "rows.jsonl", [row])).examples
    assert example.ref_logps == (-1.5, -2.0)
    del row["ref_rejected_logps"]
    with pytest.raises(exo_data.DataError, match="2 completions but 1 log-probs of the reference"):
        exo_data.read(write_rows(tmp_path / "rows.jsonl", [row]))


def test_a_prefix_shared_by_all_completions_moves_into_the_prompt():
    example = TokenizedExample((1,), ((2, 3, 4), (2, 3, 5), (2, 3)), (1.0, 2.0, 3.0), 1)
    assert tokenize.factor_prefix(example) == TokenizedExample((1, 2), ((3, 4), (3, 5), (3,)), (1.0, 2.0, 3.0), 1)
    alone = TokenizedExample((1,), ((2, 3),), None, 1)
    assert tokenize.factor_prefix(alone) == alone
    assert Counter(
        len(a) for a in tokenize.factor_prefix(TokenizedExample((1,), ((2, 2), (2, 2)), None, 1)).completions
    ) == {1: 2}


def test_moving_the_shared_prefix_does_not_change_the_loss(start):
    model, _ = models.load(start)
    example = TokenizedExample((3, 4), ((5, 6, 7), (5, 6, 8, 9)), (1.0, 0.0), 1)
    losses = []
    for variant in (example, tokenize.factor_prefix(example)):
        (scored,) = reference.score(model, [variant], Accelerator(cpu=True), PACKING, 1.0, None)
        with torch.no_grad():
            model.lm_head.weight += 0.01 * torch.randn(
                model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
            )
        module = preference.PreferenceLoss(
            model, loss="exo", beta_pi=0.5, beta_r=0.5, label_smoothing=0.0, temperature=1.0
        ).eval()
        module.zero_grad()
        share = module(PACKING.collate([scored]), 1)
        share.loss.backward()
        losses.append((float(share.loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])))
        model, _ = models.load(start)
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6)
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-6) and losses[0][1].abs().max() > 1e-3
