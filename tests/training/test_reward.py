"""The reward model: it learns what is preferred, is saved for transformers, and gives the same number in any batch."""

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
from exo.training.losses import PairLoss
from tests.tasks import WORDS, lines, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("policy") / "model")


def pairs(n):
    """The one with "good" is chosen; lengths and places vary."""
    made = []
    for i in range(n):
        words = [WORDS[(i + j) % 5] for j in range(2 + i % 3)]
        good, bad = [*words[:1], "good", *words[1:]], [*words[:1], "bad", *words[1:]]
        row = {
            "prompt": f"{WORDS[i % 5]} {WORDS[i // 5 % 5]}",
            "chosen": f" {' '.join(good)}",
            "rejected": f" {' '.join(bad)}",
        }
        made.append(row)
    return made


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


def test_transformers_reads_it_and_gives_the_same_number(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.num_labels == 1
    ids = [*tokenizer("red round")["input_ids"], *tokenizer("good blue")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        theirs = float(model(torch.tensor([ids])).logits)
    assert scorer(trained).score([example("red round", "good blue")])[0][0] == pytest.approx(theirs, abs=1e-6)


def test_a_reward_does_not_depend_on_its_batch(trained):
    examples = [example("red", "good"), example("red blue", "bad round square", "good"), example("blue", "green " * 9)]
    alone = [scorer(trained).score([g])[0] for g in examples]
    for max_tokens in (1, 16, 8192):
        for together, single in zip(scorer(trained, max_tokens).score(examples), alone, strict=True):
            assert together == pytest.approx(single, abs=1e-5)
    assert scorer(trained).score(examples[::-1])[::-1] == [pytest.approx(row, abs=1e-5) for row in alone]


def test_a_reward_does_not_depend_on_what_else_is_in_its_row(trained):
    """Where the limit cuts: a longer neighbour takes nothing of the prompt, and two that are cut alike both count."""
    short = load(trained, 6)
    texts = ["good", "bad " * 4, "blue " * 8 + "good", "blue " * 8 + "bad"]
    prompt = "red green blue round square"
    alone = [short.score([example(prompt, text)])[0][0] for text in texts]
    assert short.score([example(prompt, *texts)])[0] == pytest.approx(alone, abs=1e-6)
    assert short.score([example(prompt, *texts[2:])])[0] == pytest.approx(alone[2:], abs=1e-6)
    assert alone[0] != alone[1] and alone[2] == alone[3]


def test_it_reads_the_end_of_sequence_where_there_is_one(trained):
    """A completion that was cut for its length did not end, and is not scored as if it had."""
    _, tokenizer = models.load_classifier(str(trained))
    ids = tuple(tokenizer("good blue")["input_ids"])
    known = tokenize.tokenizer_hash(tokenizer)
    tokens = data.Tokens(known, ((*ids, tokenizer.eos_token_id), ids), (-1.0, -1.0), ("eos", "length"))
    both = scorer(trained).score([data.Example("red", (" good blue", " good blue"), None, 1, tokens)])[0]
    assert both[0] != both[1]
    assert both[0] == pytest.approx(scorer(trained).score([example("red", "good blue")])[0][0], abs=1e-6)


@pytest.mark.parametrize("spare", [True, False], ids=["a padding token is there", "none is there"])
def test_padding_that_is_the_end_of_sequence_does_not_hide_it(policy, tmp_path, spare):
    """As with gpt2 and pythia: pooled at the last token that is no padding, no end would ever be seen."""
    model, tokenizer = models.load(policy)
    if not spare:
        backend = json.loads(tokenizer.backend_tokenizer.to_str().replace("<pad>", "<other>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<eos>")
    tokenizer.pad_token = tokenizer.eos_token
    models.save(model, tokenizer, tmp_path)
    classifier, own = models.classifier_from(str(tmp_path), 1, seed=0)
    assert own.pad_token_id == classifier.config.pad_token_id != own.eos_token_id
    models.save(classifier, own, tmp_path / "reward")
    tokens = data.Tokens("foreign", ((5,), (5,)), (-1.0, -1.0), ("eos", "length"))
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
    found = scorer(run).score([example("red", "good blue", "bad blue")])[0]
    assert found[0] == pytest.approx(float(odds[1] - odds[0]), abs=1e-5) and found[0] > 0 > found[1]


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


def load(directory, max_length, max_prompt_length=None, **options):
    options |= {"max_length": max_length, "max_prompt_length": max_prompt_length}
    return scorers.load(str(directory), None, make_accelerator(device="cpu"), **options)


def test_a_completion_that_takes_most_of_the_length_is_scored_with_its_end(trained):
    """As ppo and evaluate sample them: the prompt is cut to what sampling saw, and not the completion."""
    prompt, completion = " ".join(["red", "green"] * 20), "good blue bad " * 17
    row, seen = example(prompt, completion), example(" ".join(prompt.split()[-12:]), completion)
    assert load(trained, 64, 12).score([row]) == [pytest.approx(load(trained, 512).score([seen])[0], abs=1e-6)]
    assert load(trained, 64).score([row]) != load(trained, 64, 12).score([row])


def test_plain_samples_are_rendered_for_a_reward_model_as_messages_are(trained, tmp_path):
    """Whichever stage scores; the token ids of a plain sample are not those of the rendered one."""
    model, tokenizer = models.load_classifier(str(trained))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }} {% endfor %}"
    models.save(model, tokenizer, tmp_path / "reward")
    ids = (*tokenizer("blue good")["input_ids"], tokenizer.eos_token_id)
    tokens = data.Tokens(tokenize.tokenizer_hash(tokenizer), (ids, ids[:1]), (-1.0, -1.0), ("eos", "length"))
    plain = data.Example("red", (" good blue", " bad"), None, 1, tokens)
    chat = data.Example(data.Chat([data.Message("user", "red")]), ("good blue",), None, 1)
    rendered, as_it_is = load(tmp_path / "reward", 64, chat_template="always"), load(tmp_path / "reward", 64)
    assert rendered.score([plain])[0][0] == pytest.approx(as_it_is.score([chat])[0][0], abs=1e-6)
    assert as_it_is.score([plain])[0][0] != pytest.approx(rendered.score([plain])[0][0], abs=1e-6)


def test_rows_that_the_template_refuses_are_found_before_any_is_scored(trained, tmp_path):
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
    scorer = load(tmp_path / "reward", 64)
    assert scorer.refused(rows, "rows.jsonl", True) == ({0}, {tokenize.REFUSED: 1})
    with pytest.raises(data.DataError, match="^rows.jsonl:7: the chat template refuses"):
        scorer.refused(rows, "rows.jsonl", False)
