"""The reward model: it learns preferences, loads in transformers, and gives the same reward in any batch."""

import json
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from exo import data, models, reward
from exo.cli import console
from exo.data.collate import Collator
from exo.data.text import tokenize
from exo.data.text.limits import Limits
from exo.distributed.accelerator import make_accelerator
from exo.rollouts import scorers
from exo.training.sft_and_reward import PairLoss
from tests.tasks import WORDS, lines, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("policy") / "model")


def pairs(n):
    """Return pairs of varied lengths; the chosen completion has "good" where the rejected one has "bad"."""
    examples = []
    for i in range(n):
        words = [WORDS[(i + j) % 5] for j in range(2 + i % 3)]
        good, bad = [*words[:1], "good", *words[1:]], [*words[:1], "bad", *words[1:]]
        row = {
            "prompt": f"{WORDS[i % 5]} {WORDS[i // 5 % 5]}",
            "chosen": f" {' '.join(good)}",
            "rejected": f" {' '.join(bad)}",
        }
        examples.append(row)
    return examples


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    source = write_rows(directory / "pairs.jsonl", pairs(100))
    return reward.run(
        reward.Config(
            model=policy, data=source, output_dir=str(directory / "run"), learning_rate=3e-3, batch_size=20,
            max_steps=20, eval_fraction=0.2,
        )
    )  # fmt: skip


def scorer(directory, max_tokens=8192):
    accelerator = make_accelerator(device="cpu")
    return scorers.load(str(directory), None, accelerator, max_length=64, max_tokens_per_batch=max_tokens)


def example(prompt, *completions):
    return data.Example(prompt, tuple(f" {text}" for text in completions), None, 1)


def test_it_ranks_held_out_pairs(trained):
    result = json.loads((trained / "run.json").read_text())["result"]
    assert result["eval_accuracy"] > 0.9
    assert result["eval_accuracy_low"] < result["eval_accuracy"] <= result["eval_accuracy_high"]
    assert lines(trained / "metrics.jsonl")[0]["loss"] == pytest.approx(0.693, abs=0.02)


def test_held_out_prompts_are_not_trained_on_with_other_completions(policy):
    rows = [
        data.Example(f"{a} {b}", (c, " bad"), None, 1) for a in WORDS[:4] for b in WORDS[:4] for c in (" good", " red")
    ]
    config = reward.Config(model=policy, data="x", eval_fraction=0.25)
    dataset = data.Dataset(rows, "", len(rows), {}, {}, "x")
    train, held_out = reward.tokens(config, dataset, models.load_tokenizer(policy), Counter())
    assert len(train) == 24 and len(held_out) == 8
    assert {example.prompt for example in train}.isdisjoint({example.prompt for example in held_out})


def test_transformers_loads_it_and_gives_the_same_reward(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.num_labels == 1
    ids = [*tokenizer("red round")["input_ids"], *tokenizer("good blue")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        expected = float(model(torch.tensor([ids])).logits)
    assert scorer(trained).score([example("red round", "good blue")])[0][0] == pytest.approx(expected, abs=1e-6)


def test_a_reward_does_not_depend_on_its_batch(trained):
    examples = [example("red", "good"), example("red blue", "bad round square", "good"), example("blue", "green " * 9)]
    alone = [scorer(trained).score([g])[0] for g in examples]
    for max_tokens in (1, 16, 8192):
        for together, single in zip(scorer(trained, max_tokens).score(examples), alone, strict=True):
            assert together == pytest.approx(single, abs=1e-5)
    assert scorer(trained).score(examples[::-1])[::-1] == [pytest.approx(row, abs=1e-5) for row in alone]


def test_a_reward_does_not_depend_on_what_else_is_in_its_row(trained):
    """Check this with truncation: a longer completion in a row must not shorten the prompt of another one."""
    short = load_scorer(trained, 6)
    texts = ["good", "bad " * 4, "blue " * 8 + "good", "blue " * 8 + "bad"]
    prompt = "red green blue round square"
    alone = [short.score([example(prompt, text)])[0][0] for text in texts]
    assert short.score([example(prompt, *texts)])[0] == pytest.approx(alone, abs=1e-6)
    assert short.score([example(prompt, *texts[2:])])[0] == pytest.approx(alone[2:], abs=1e-6)
    assert alone[0] != alone[1] and alone[2] == alone[3]


def test_a_truncated_completion_is_scored_without_an_end_of_sequence(trained):
    """Check that only a completion that ended by itself is scored with its end-of-sequence token."""
    _, tokenizer = models.load_classifier(str(trained))
    ids = tuple(tokenizer("good blue")["input_ids"])
    tokenizer_id = tokenize.tokenizer_hash(tokenizer)
    tokens = data.Tokens(tokenizer_id, ((*ids, tokenizer.eos_token_id), ids), (-1.0, -1.0), ("eos", "length"))
    both = scorer(trained).score([data.Example("red", (" good blue", " good blue"), None, 1, tokens)])[0]
    assert both[0] != both[1]
    assert both[0] == pytest.approx(scorer(trained).score([example("red", "good blue")])[0][0], abs=1e-6)


@pytest.mark.parametrize("has_pad", [True, False], ids=["with a padding token", "without a padding token"])
def test_a_pad_token_equal_to_eos_does_not_hide_eos(policy, tmp_path, has_pad):
    """Check this as for gpt2 and pythia: pooling at the last non-padding token would skip the end of sequence."""
    model, tokenizer = models.load(policy)
    if not has_pad:
        backend = json.loads(tokenizer.backend_tokenizer.to_str().replace("<pad>", "<other>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<eos>")
    tokenizer.pad_token = tokenizer.eos_token
    models.save(model, tokenizer, tmp_path)
    classifier, padded_tokenizer = models.classifier_from(str(tmp_path), 1, seed=0)
    assert padded_tokenizer.pad_token_id == classifier.config.pad_token_id != padded_tokenizer.eos_token_id
    models.save(classifier, padded_tokenizer, tmp_path / "reward")
    tokens = data.Tokens("other", ((5,), (5,)), (-1.0, -1.0), ("eos", "length"))
    both = scorer(tmp_path / "reward").score([data.Example("red", (" good blue", " good blue"), None, 1, tokens)])[0]
    assert both[0] != both[1]


def test_the_loss_is_bradley_terrys(policy):
    model, tokenizer = models.classifier_from(policy, 1, seed=0)
    limits = Limits(64, None, "error")
    examples, _ = tokenize.encode(
        [example("red", "good blue", "bad"), example("blue", "good", "bad red")], tokenizer, limits, "x"
    )
    batch = Collator(tokenizer.pad_token_id, 8192).collate(examples)
    module = PairLoss(model)
    with torch.no_grad():
        share = module(batch, 7)
        values = module.rewards(batch)
    expected = sum(float(-torch.sigmoid(values[i] - values[i + 1]).log()) for i in (0, 2)) / 7
    assert float(share.loss) == pytest.approx(expected, abs=1e-6)


def test_ties_count_one_half_in_training_too(policy):
    model, tokenizer = models.classifier_from(policy, 1, seed=0)
    model.score.weight.data.zero_()
    examples, _ = tokenize.encode([example("red", "good", "bad")] * 4, tokenizer, Limits(64, None, "error"), "x")
    with torch.no_grad():
        share = PairLoss(model)(Collator(tokenizer.pad_token_id, 8192).collate(examples), 4)
    right, count = share.sums["accuracy"]
    assert float(right) / count == 0.5


def test_scored_samples_become_pairs(policy, tmp_path):
    rows = [{"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"], "red"], "rewards": [0, 2, 1]}
            for row in pairs(40)]  # fmt: skip
    rows += [{"prompt": "red", "completions": ["good", "bad"], "rewards": [1, 1]}]
    source = write_rows(tmp_path / "scored.jsonl", rows)
    run = reward.run(
        reward.Config(
            model=policy, data=source, output_dir=str(tmp_path / "run"), learning_rate=3e-3, batch_size=20,
            max_steps=15, eval_fraction=0,
        )
    )  # fmt: skip
    record = json.loads((run / "run.json").read_text())
    assert record["rows"]["later"] == {"rows skipped: all rewards equal, so no best and worst": 1}
    assert lines(run / "metrics.jsonl")[-1]["accuracy"] == 1.0
    assert record["result"] == {}


def test_labelled_texts_make_a_classifier_whose_log_odds_are_the_reward(policy, tmp_path):
    texts = [{"text": row["chosen"], "label": 1} for row in pairs(50)]
    texts += [{"text": row["rejected"], "label": 0} for row in pairs(50)]
    source = write_rows(tmp_path / "texts.jsonl", texts)
    run = reward.run(
        reward.Config(
            model=policy, data=source, labels=True, output_dir=str(tmp_path / "run"), learning_rate=3e-3,
            batch_size=20, max_steps=25, eval_fraction=0.2,
        )
    )  # fmt: skip
    assert json.loads((run / "run.json").read_text())["result"]["eval_accuracy"] > 0.9
    model, tokenizer = models.load_classifier(str(run))
    assert model.config.num_labels == 2
    ids = [*tokenizer("red")["input_ids"], *tokenizer("good blue")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    odds = torch.log_softmax(logits, 0)
    rewards = scorer(run).score([example("red", "good blue", "bad blue")])[0]
    assert rewards[0] == pytest.approx(float(odds[1] - odds[0]), abs=1e-5) and rewards[0] > 0 > rewards[1]


def test_a_causal_lm_is_no_reward_model(policy):
    with pytest.raises(ValueError, match="expected a sequence classifier, .*; python -m exo.reward trains one"):
        scorer(policy)


def test_a_process_that_is_not_the_first_writes_nothing(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda _: False))
    monkeypatch.setattr(console, "_muted", True)
    (tmp_path / "run").mkdir()
    source = write_rows(tmp_path / "pairs.jsonl", pairs(20))
    run = reward.run(
        reward.Config(model=policy, data=source, output_dir=str(tmp_path / "run"), batch_size=10, max_steps=1)
    )
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"] and lines(run / "metrics.jsonl") == []


def load_scorer(directory, max_length, max_prompt_length=None, **options):
    options |= {"max_length": max_length, "max_prompt_length": max_prompt_length}
    return scorers.load(str(directory), None, make_accelerator(device="cpu"), **options)


def test_a_long_completion_truncates_the_prompt_and_not_the_completion(trained):
    """Check that max_prompt_length cuts the prompt as in sampling (ppo, evaluate) and keeps the completion."""
    prompt, completion = " ".join(["red", "green"] * 20), "good blue bad " * 17
    row, seen = example(prompt, completion), example(" ".join(prompt.split()[-12:]), completion)
    assert load_scorer(trained, 64, 12).score([row]) == [
        pytest.approx(load_scorer(trained, 512).score([seen])[0], abs=1e-6)
    ]
    assert load_scorer(trained, 64).score([row]) != load_scorer(trained, 64, 12).score([row])


def test_plain_samples_are_rendered_for_a_reward_model_as_messages_are(trained, tmp_path):
    """Check that a plain sample is tokenized again with the chat template instead of using its token ids."""
    model, tokenizer = models.load_classifier(str(trained))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }} {% endfor %}"
    models.save(model, tokenizer, tmp_path / "reward")
    ids = (*tokenizer("blue good")["input_ids"], tokenizer.eos_token_id)
    tokens = data.Tokens(tokenize.tokenizer_hash(tokenizer), (ids, ids[:1]), (-1.0, -1.0), ("eos", "length"))
    plain = data.Example("red", (" good blue", " bad"), None, 1, tokens)
    chat = data.Example(data.Chat([data.Message("user", "red")]), ("good blue",), None, 1)
    rendered, plain_scorer = (
        load_scorer(tmp_path / "reward", 64, chat_template="always"),
        load_scorer(tmp_path / "reward", 64),
    )
    assert rendered.score([plain])[0][0] == pytest.approx(plain_scorer.score([chat])[0][0], abs=1e-6)
    assert plain_scorer.score([plain])[0][0] != pytest.approx(rendered.score([plain])[0][0], abs=1e-6)


def test_rows_that_the_template_refuses_are_reported_before_any_is_scored(trained, tmp_path):
    model, tokenizer = models.load_classifier(str(trained))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    )
    models.save(model, tokenizer, tmp_path / "reward")
    turn = data.Message("user", "red")
    rows = [
        data.Example(data.Chat([data.Message("system", "x"), turn]), (" good",), None, 1, source="rows.jsonl:7"),
        data.Example("red", (" good",), None, 2),
    ]
    scorer = load_scorer(tmp_path / "reward", 64)
    assert scorer.refused(rows, "rows.jsonl", True) == ({0}, {tokenize.REFUSED: 1})
    with pytest.raises(data.DataError, match="^rows.jsonl:7: the chat template refuses"):
        scorer.refused(rows, "rows.jsonl", False)
