"""The split of data: held-out rows share no text with training rows."""

import random
from collections import Counter
from typing import NamedTuple

import pytest

from exo import align, data, models, reward
from exo.cli import console
from exo.data import comparison, split
from exo.data.split import hold_out, row_name, split_connected
from tests.tasks import WORDS, write_model, write_rows


class Texts(NamedTuple):
    prompt: str
    completions: tuple[str, ...]


THINGS = "cat dog cow hen fox owl bee ant elk emu".split()


def names(rows):
    return sorted(set(map(row_name, rows)))


def texts(rows):
    """Return every text of the rows that a model sees."""
    completions = {completion.strip() for row in rows for completion in row.completions}
    return completions | {row.prompt + completion for row in rows for completion in row.completions}


def test_rows_of_one_implicit_prompt_text_stay_together():
    """Check one chosen text against three rejected ones: each pair has another prompt, its shared beginning."""
    rows = []
    for i in range(18):
        chosen = f"the {THINGS[i % 10]} number {i} sat down"
        for prompt in ("the ", f"the {THINGS[i % 10]} ", f"the {THINGS[i % 10]} number {i} "):
            rows.append(
                Texts(prompt + f"<{i}> " * (prompt == "the "), (chosen[len(prompt) :], f"ran {i}{len(prompt)}"))
            )
    result = split_connected(rows, names(rows), 5, seed=0)
    held, trained = ([row for i, row in enumerate(rows) if (i in result.held_out) == out] for out in (True, False))
    assert held and not result.num_shared and not texts(held) & texts(trained)


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_are_split_between_components_and_near_the_number(seed):
    """Compare with components that are merged one row at a time."""
    rng = random.Random(seed)
    rows = [Texts(f"p{i}", (f"c{rng.randrange(14)}", f"d{i}")) for i in range(9)]
    result = split_connected(rows, names(rows), 3, seed)
    examples: list[set[int]] = []
    for i, row in enumerate(rows):  # components by repeated merging
        joined = [g for g in examples if any(set(rows[j].completions) & set(row.completions) for j in g)]
        examples = [g for g in examples if g not in joined] + [{i}.union(*joined)]
    if result.num_shared:
        assert min(map(len, examples)) >= 6 or len(examples) == 1
        return
    assert all(example <= result.held_out or not example & result.held_out for example in examples)
    assert 0 < len(result.held_out) < len(rows)
    smaller = min(map(len, examples))
    assert abs(len(result.held_out) - 3) <= max(map(len, examples)) - 1 or len(result.held_out) == smaller


def test_unconnected_prompts_are_held_out_by_a_seeded_shuffle():
    """Check that the first prompts of the sorted and then shuffled list are held out."""
    rows = [Texts(f"p{i % 30}", (f"a{i}", f"b{i}")) for i in range(60)]
    expected = names(rows)
    random.Random(7).shuffle(expected)
    result = split_connected(rows, names(rows), 4, seed=7)
    assert {rows[i].prompt for i in result.held_out} == set(expected[:4]) and len(result.held_out) == 8
    assert result.num_shared == 0


def test_empty_completions_and_empty_prompts_connect_no_rows():
    rows = [Texts("" if i % 2 else f"p{i}", (f"a{i}", " ")) for i in range(20)]
    result = split_connected(rows, names(rows), 5, seed=0)
    assert len(result.held_out) == 5 and not result.num_shared


def test_a_split_of_connected_rows_prints_a_warning(capsys, monkeypatch):
    monkeypatch.setattr(console, "_warned", set())
    rows = [Texts(f"p{i}", ("yes", "no")) for i in range(20)]
    result = split_connected(rows, names(rows), 4, seed=0)
    assert len(result.held_out) == result.num_shared == 4
    assert hold_out(rows, 0.2, 0, "x") == result.held_out
    assert "x: 4 of 4 held-out rows share a completion with rows that are trained on" in capsys.readouterr().out


def test_the_number_to_hold_out_has_bounds(capsys):
    """Check that the fraction is of the distinct prompts, and that a fraction of 0 holds out none."""
    rows = [Texts(f"p{i % 30}", (f"a{i}", f"b{i}")) for i in range(60)]
    for options, number in (
        ({"fraction": 0.5}, 15),
        ({"fraction": 0.0}, 0),
        ({"fraction": 0.01}, 1),
        ({"fraction": 0.01, "at_least": 0}, 0),
        ({"fraction": 0.5, "at_most": 7}, 7),
        ({"fraction": 1.0}, 29),
    ):
        held_out = hold_out(rows, seed=1, path="x", **options)
        assert len({rows[i].prompt for i in held_out}) == number and len(held_out) == 2 * number
    assert hold_out([], 0.5, 1, "x") == frozenset()
    order = list(dict.fromkeys(row.prompt for row in rows))
    random.Random(1).shuffle(order)
    held_out = hold_out(rows, 0.5, 1, "x", sort=False)
    assert {rows[i].prompt for i in held_out} == {*order[:15]}
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("one_thread")
def test_align_and_reward_train_on_no_text_that_they_hold_out(tmp_path):
    """Check the split with the options of the stages, on the tokens that they produce."""
    rng = random.Random(0)
    rows = []
    for i in range(12):
        common = [rng.choice(THINGS) for _ in range(3)] + [f"n{i}"]
        for cut in range(1, 4):  # the rejected texts differ from the second, third and fourth word on
            rejected = [*common[:cut], f"x{i}{cut}", rng.choice(THINGS)]
            rows.append({"chosen": " ".join(common), "rejected": " ".join(rejected)})
    source = write_rows(tmp_path / "rows.jsonl", rows)
    words = sorted({word for row in rows for text in row.values() for word in text.split()})
    policy = write_model(tmp_path / "policy", words=words)
    tokenizer = models.load_tokenizer(policy)
    dataset = data.read(source)
    settings = align.Config(model=policy, data=source, eval_fraction=0.2)
    examples = align.tokens(settings, dataset, tokenizer, Counter())
    for train, held_out in (
        align.split_rows(settings, dataset, examples, [], Counter())[:2],
        reward.tokens(reward.Config(model=policy, data=source, eval_fraction=0.2), dataset, tokenizer, Counter()),
    ):
        seen = [{example.prompt + example.completions[0] for example in part} for part in (train, held_out)]
        assert len(held_out) in range(4, 11) and len(train) + len(held_out) == 36
        assert not seen[0] & seen[1]


@pytest.mark.usefixtures("one_thread")
def test_align_splits_the_data_once(tmp_path, monkeypatch):
    """Check that the split is not repeated after the reference scored the rows: it takes seconds for 100,000 rows."""
    calls, parts = [], []
    for module, name in ((split, "hold_out"), (align, "split_rows"), (comparison, "split_scored_rows")):
        function = getattr(module, name)
        results = calls if name == "hold_out" else parts
        monkeypatch.setattr(module, name, lambda *args, f=function, r=results: r.append(f(*args)) or r[-1])
    rows = [{"prompt": f"red {word}", "chosen": f" good {word}", "rejected": " bad"} for word in WORDS]
    arguments = ["--model", write_model(tmp_path / "policy"), "--data", write_rows(tmp_path / "rows.jsonl", rows)]
    arguments += ["--max_steps", "1", "--device", "cpu", "--eval_fraction", "0.3"]
    assert align.main([*arguments, "--output_dir", str(tmp_path / "run")]) == 0
    assert len(calls) == 1
    first, second = ([[g.line for g in rows] for rows in part[:2]] for part in parts)
    assert first == second and all(first) and all(g.ref_logps for g in (*parts[1].train, *parts[1].held_out))


@pytest.mark.usefixtures("one_thread")
def test_a_held_out_file_that_shares_texts_with_the_data_prints_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_warned", set())
    rows = [{"prompt": f"red {word}", "chosen": f" good {word}", "rejected": " bad"} for word in ("red", "blue", "big")]
    source = write_rows(tmp_path / "rows.jsonl", rows[:2])
    others = [rows[1] | {"rejected": " small"}, {"prompt": "big", "chosen": " round", "rejected": " green"}]
    held_out = write_rows(tmp_path / "held_out.jsonl", others)
    arguments = ["--model", write_model(tmp_path / "policy"), "--data", source, "--eval_data", held_out]
    assert align.main([*arguments, "--max_steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert f"warning: {held_out}: 1 of 2 held-out rows share a prompt or a completion with --data" in output


def test_prompts_that_differ_in_a_blank_at_their_end_are_held_out_together():
    rows = [Texts(f"what is {i}{end}", (f" {i}{i}{end}a", f" {i}{i}{end}b")) for i in range(40) for end in ("", " ")]
    for seed in range(5):
        held_out = split_connected(rows, names(rows), 20, seed).held_out
        assert held_out and all((i in held_out) == (i + 1 in held_out) for i in range(0, len(rows), 2))
