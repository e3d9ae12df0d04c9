"""The quickstart's texts and score: properties of the corpus, and rules that a fair score follows."""

import statistics

import pytest

from exo.experiments.quickstart import corpus, explain, prompts, score, vocabulary

PAIRS = corpus(2000, seed=3)


def test_held_out_prompts_never_reach_training():
    train, test = prompts("train"), prompts("test")
    assert len(train) == len(set(train)) >= 128 and len(test) == len(set(test)) >= 32
    assert not set(train) & set(test)
    assert {prompt for prompt, _ in PAIRS} <= set(train)
    assert {w for p in test for w in p.split()} <= {w for p in train for w in p.split()}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'valid'"):
        prompts("valid")  # type: ignore[arg-type]


def test_the_seed_decides_the_corpus():
    assert corpus(2000, seed=3) == PAIRS
    assert corpus(2000, seed=4) != PAIRS


def test_texts_stay_within_length_and_vocabulary():
    words = set(vocabulary())
    assert 150 <= len(words) <= 300
    for prompt, continuation in PAIRS:
        text = f"{prompt} {continuation}".split()
        assert 12 <= len(text) <= 24 and text[-1] == "." and set(text) <= words


def test_praise_and_blame_are_balanced():
    scores = [score(f"{prompt} {continuation}") for prompt, continuation in PAIRS]
    assert abs(statistics.mean(scores)) < 0.3 and statistics.stdev(scores) > 2
    assert sum(s > 1 for s in scores) > 500 and sum(s < -1 for s in scores) > 500


def test_prompts_are_neutral():
    assert all(score(prompt) == 0 for prompt in prompts("train") + prompts("test"))
    assert all(explain(c) and score(f"{p} {c}") == score(c) for p, c in PAIRS)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("the film was good .", "the film was not good ."),
        ("the film was not bad .", "the film was bad ."),
        ("the film was superb .", "the film was good ."),
        ("the film was very good .", "the film was good ."),
        ("the film was bad .", "the film was very bad ."),
        ("the film was good .", "the film was slightly good ."),
        ("i would recommend it .", "i would never recommend it ."),
        ("i loved it .", "i liked it ."),
        ("the film was good . i loved it .", "the film was good ."),
    ],
)
def test_better_texts_score_higher(better, worse):
    assert score(better) > score(worse)


def test_negation_flips_and_weakens():
    assert 0 > score("the film was not good .") > -score("the film was good .")
    assert 0 < score("the film was not bad .") < -score("the film was bad .")


@pytest.mark.parametrize("repeat", ["the film was good .", "the plot was good .", "the film was superb ."])
def test_a_word_or_a_subject_counts_once(repeat):
    assert score(f"the film was good . {repeat * 3}") == score("the film was good .")


@pytest.mark.parametrize(
    "heap",
    ["superb superb great", "the film superb .", "the film was very very good .", "the film was good superb .", ""],
)
def test_praise_outside_a_sentence_earns_nothing(heap):
    assert score(heap) == 0 and explain(heap) == []


def test_the_sum_saturates():
    subjects = ["film", "plot", "script", "music", "ending", "hero"]
    words = ["superb", "wonderful", "excellent", "brilliant", "great", "lovely"]
    claims = [f"the {s} was truly {w} ." for s, w in zip(subjects, words, strict=True)]
    steps = [score(" ".join(claims[:n])) for n in range(len(claims) + 1)]
    gains = [current - previous for previous, current in zip(steps, steps[1:], strict=False)]
    assert all(gain > 0 for gain in gains) and gains[-1] < gains[0] / 4 and steps[-1] < 6
