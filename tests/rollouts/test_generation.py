"""Sampling gives the tokens and log-probs of a naive loop, for any batch size."""

from typing import Any

import pytest
import torch

from exo import models
from exo.rollouts import generate

WORDS = [f"w{i}" for i in range(20)]
PROMPTS = [[3, 4, 5, 6], [7], [8, 9, 10, 11, 12, 13, 14], [15, 16]]
SETTINGS: dict[str, Any] = {"temperature": 0.8, "max_new_tokens": 12, "seed": 5}


@pytest.fixture(scope="module")
def small():
    model, tokenizer = models.word_level(WORDS, hidden_size=32)
    with torch.no_grad():  # makes distributions so peaked that a wrong mask or position changes tokens
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model, tokenizer


def draw(small, prompts, **settings):
    model, tokenizer = small
    return generate.sample(model, (tokenizer.eos_token_id,), prompts, **settings)


@torch.no_grad()
def naive(model, eos, prompt, uniforms, temperature):
    """Sample one sequence without a cache or padding; return its tokens and log-prob."""
    ids, total = list(prompt), 0.0
    for u in uniforms.tolist():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1] / temperature, -1)
        cdf = logprobs.exp().cumsum(-1)
        choice = int((cdf <= u * cdf[-1]).sum())
        ids.append(choice)
        total += float(logprobs[choice])
        if choice == eos:
            break
    return ids[len(prompt) :], total


@pytest.fixture(scope="module")
def drawn(small):
    return draw(small, PROMPTS, k=6, **SETTINGS)


def test_samples_equal_a_naive_loop_with_the_same_random_numbers(small, drawn):
    model, tokenizer = small
    finishes = set()
    for i, example in enumerate(drawn):
        for j, sample in enumerate(example):
            uniforms = generate._stream(SETTINGS["seed"], i, j, SETTINGS["max_new_tokens"])
            tokens, logprob = naive(model, tokenizer.eos_token_id, PROMPTS[i], uniforms, 0.8)
            assert list(sample.token_ids) == tokens
            assert sample.logprob == pytest.approx(logprob, abs=1e-4)
            finishes.add(sample.finish)
    assert finishes == {"eos", "length"}, "the cases must include both finish reasons"


@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_a_completion_does_not_depend_on_its_batch(small, drawn, batch_size):
    parts = draw(small, PROMPTS, k=6, batch_size=batch_size, **SETTINGS)
    assert [[s.token_ids for s in g] for g in parts] == [[s.token_ids for s in g] for g in drawn]


def test_a_completion_does_not_depend_on_the_samples_beside_it(small, drawn):
    fewer = draw(small, PROMPTS[:2], k=2, **SETTINGS)
    assert [[s.token_ids for s in g] for g in fewer] == [[s.token_ids for s in g[:2]] for g in drawn[:2]]


def test_logprob_matches_teacher_forcing(small):
    model, tokenizer = small
    for prompt, example in zip(
        PROMPTS, generate.sample(model, (tokenizer.eos_token_id,), PROMPTS, k=4, **SETTINGS), strict=True
    ):
        for sample in example:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *sample.token_ids]])).logits[0].double() / 0.8
            rows = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
            expected = rows.gather(1, torch.tensor(sample.token_ids)[:, None]).sum()
            assert sample.logprob == pytest.approx(float(expected), abs=1e-4)


def test_eos_ends_a_completion_and_is_part_of_it(small):
    _, tokenizer = small
    samples = [s for g in draw(small, PROMPTS, k=16, **SETTINGS) for s in g]
    for sample in samples:
        assert tokenizer.eos_token_id not in sample.token_ids[:-1]
        assert (sample.finish == "eos") == (sample.token_ids[-1] == tokenizer.eos_token_id)
        assert sample.finish == "eos" or len(sample.token_ids) == SETTINGS["max_new_tokens"]


def test_the_seed_determines_the_samples(small):
    samples = draw(small, PROMPTS, k=2, **SETTINGS)
    assert samples == draw(small, PROMPTS, k=2, **SETTINGS)
    assert samples != draw(small, PROMPTS, k=2, **(SETTINGS | {"seed": 6}))


def test_frequencies_match_the_probabilities_of_the_model(small):
    """Check that frequencies of 4000 first tokens are within 5 standard errors of the probabilities."""
    model, tokenizer = small
    settings = SETTINGS | {"max_new_tokens": 1}
    (example,) = generate.sample(model, (tokenizer.eos_token_id,), PROMPTS[:1], k=4000, **settings)
    frequencies = torch.bincount(torch.tensor([s.token_ids[0] for s in example]), minlength=len(tokenizer)) / 4000
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.8, -1)
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_sampling_keeps_modes_and_the_global_random_state(small):
    model, _ = small
    model.train()
    model.model.norm.eval()
    state = torch.get_rng_state()
    done: list[int] = []
    draw(small, PROMPTS, k=3, batch_size=5, progress=done.append, **SETTINGS)
    assert model.training and model.model.layers.training and not model.model.norm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(done) == 12
    model.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: expected"),
        ({"temperature": 0.0}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"max_new_tokens": 2048}, "max_new_tokens: expected at most 2041"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"prompts": [[3], []]}, "prompts: expected .* in prompt 1"),
    ],
)
def test_bad_input_is_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        draw(small, **({"prompts": PROMPTS, "k": 1} | SETTINGS | change))
