"""End tokens and excluded tokens in sampling, from the model's generation config and the tokenizer."""

import json
import math

import pytest
import torch
from transformers import GenerationConfig

from exo import align, evaluate, models, ppo, sample, sft
from exo.cli import console
from exo.rollouts import generate
from tests.tasks import PROMPTS, WORDS, lines, write_model, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")
TURN = "small"  # ends a turn; neither a special token nor the tokenizer's end of sequence


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """Return (directory, model directory, prompts file) of a model with a second end token, as Gemma has."""
    directory = tmp_path_factory.mktemp("instruct")
    model, tokenizer = models.load(write_model(directory / "plain", scale=2.0))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN)]
    models.save(model, tokenizer, directory / "model")
    prompts = write_rows(directory / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return directory, str(directory / "model"), prompts


def end_ids(path):
    return GenerationConfig.from_pretrained(path).eos_token_id


def test_a_turn_ends_at_the_eos_tokens_of_the_generation_config(instruct):
    directory, model, prompts = instruct
    run = sample.run(sample.Config(model=model, data=prompts, k=8, max_new_tokens=40, output_dir=str(directory / "s")))
    finishes = set()
    for row in lines(run / "samples.jsonl"):
        for ids, text, finish in zip(row["token_ids"], row["completions"], row["finish"], strict=True):
            last = (["<pad>", "<unk>", "<eos>", *WORDS])[ids[-1]]
            finishes.add((last, finish))
            assert TURN not in text and (finish == "eos") == (last in ("<eos>", TURN))
            assert not set(ids[:-1]) & set(end_ids(model)), "no token may follow an end token"
    assert {(TURN, "eos"), ("<eos>", "eos")} <= finishes


def test_ppo_and_evaluate_use_the_same_end_tokens(instruct, capsys, monkeypatch):
    monkeypatch.setattr(console, "_warned", set())
    directory, model, prompts = instruct
    common = {"data": prompts, "oracle": "tests.tasks:reward", "max_new_tokens": 40, "max_length": 60, "device": "cpu"}
    run = evaluate.run(evaluate.Config(model=model, reference=model, output_dir=str(directory / "e"), **common))
    (entry,) = json.loads((run / "evaluation.json").read_text())["checkpoints"]
    assert entry["mean_tokens"] < 20 and entry["unfinished"] < 0.1
    assert "were cut for length" in (out := capsys.readouterr().out) and "warning" not in out
    run = ppo.run(
        ppo.Config(
            model=model, rollout_size=8, batch_size=8, max_steps=2, critic_warmup_steps=1,
            output_dir=str(directory / "p"), **(common | {"max_new_tokens": 2}),
        )
    )  # fmt: skip
    assert all(0 < row["cut"] < 1 for row in lines(run / "metrics.jsonl"))
    assert "warning: more than 20% of the completions were cut for length: raise --max_new_tok" in (
        capsys.readouterr().out
    )
    assert end_ids(run) == end_ids(model)


def test_a_trained_model_keeps_its_end_tokens(instruct):
    directory, model, _ = instruct
    texts = write_rows(directory / "texts.jsonl", [{"prompt": p, "completion": " good red"} for p in PROMPTS])
    rows = [{"prompt": p, "chosen": " good red", "rejected": " bad"} for p in PROMPTS]
    pairs = write_rows(directory / "pairs.jsonl", rows)
    tuned = sft.run(sft.Config(model=model, data=texts, max_steps=1, output_dir=str(directory / "sft"), device="cpu"))
    aligned = align.run(
        align.Config(model=str(tuned), data=pairs, max_steps=1, output_dir=str(directory / "align"), device="cpu")
    )
    assert end_ids(tuned) == end_ids(aligned) == end_ids(model) and len(end_ids(model)) == 2


def test_end_tokens_are_the_same_from_a_model_and_from_its_directory(instruct):
    model, tokenizer = models.load(instruct[1])
    assert models.stop_ids(model, tokenizer) == models.stop_ids(instruct[1], tokenizer) == (2, 2 + len(WORDS))
    assert models.absent_ids(model, tokenizer) == models.absent_ids(instruct[1], tokenizer) == ()
    model.generation_config.eos_token_id = None
    assert models.stop_ids(model, tokenizer) == (2,)


@torch.no_grad()
def test_unused_rows_of_the_embedding_are_never_sampled(instruct):
    """Compare 4,000 samples with the renormalized probabilities by chi-square; log-probs stay the model's."""
    model, tokenizer = models.load(instruct[1])
    size = len(tokenizer)
    model.resize_token_embeddings(size + 6, mean_resizing=False)
    model.get_input_embeddings().weight[size:] = 2 * model.get_input_embeddings().weight[3:9]
    absent = models.absent_ids(model, tokenizer)
    assert absent == tuple(range(size, size + 6))
    p = torch.softmax(model(torch.tensor([[3, 6]])).logits[0, -1].double(), -1)
    assert p[size:].sum() > 0.2, "the unused rows must have a large probability in this case"
    for top_p in (1.0, 0.7):
        (drawn,) = generate.sample(
            model, (2,), [[3, 6]], k=4000, temperature=1.0, top_p=top_p, max_new_tokens=1, seed=0, absent_ids=absent
        )
        counts = torch.bincount(torch.tensor([one.token_ids[0] for one in drawn]), minlength=size + 6).double()
        exact = p[:size] / p[:size].sum()
        if top_p < 1:
            order = exact.argsort(descending=True)
            nucleus = order[: int((exact[order].cumsum(0) < top_p).sum()) + 1]
            exact = torch.zeros(size, dtype=torch.double).index_copy(0, nucleus, exact[nucleus] / exact[nucleus].sum())
        assert not counts[size:].any() and not counts[:size][exact == 0].any()
        expected = 4000 * exact[exact > 0]
        chi = float(((counts[:size][exact > 0] - expected) ** 2 / expected).sum())
        degrees = len(expected) - 1
        assert chi < degrees + 5 * math.sqrt(2 * degrees)
        assert drawn[0].logprob == pytest.approx(float(p[drawn[0].token_ids[0]].log()), abs=1e-5)
