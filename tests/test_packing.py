"""Tokens, limits and micro-batches: the completion is what is scored, and nothing is lost without being counted."""

import pytest
import torch

from exo import encoding, models
from exo.data import DataError, Group
from exo.encoding import Limits, TokenGroup
from exo.packing import Packing

LAYOUTS = [Packing(0, 300, layout, one_row) for layout in ("padded", "packed", "shared") for one_row in (False, True)]


class Words:
    """A tokenizer whose tokens can be counted by eye: one a word."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [10 + len(word) for word in text.split()]}


class Templated(Words):
    """The same with BOS before a text and EOS after it, as some tokenizers have it."""

    bos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [2, *ids, 1] if add_special_tokens else ids}


def encode(group, max_length=100, max_completion_length=None, truncate="prompt-left"):
    return encoding.encode([group], Words(), Limits(max_length, max_completion_length, truncate), "rows.jsonl")


def test_completions_end_with_eos_and_prompts_are_kept():
    (encoded,), counts = encode(Group("a bb", ("ccc", "dddd a"), (1.0, 2.0), 3))
    assert encoded == TokenGroup((11, 12), ((13, 1), (14, 11, 1)), (1.0, 2.0), 3)
    assert not counts


def test_an_empty_prompt_gets_a_token_to_be_scored_from():
    (encoded,), _ = encode(Group("", ("a", "bb"), None, 1))
    assert encoded.prompt == (1,)


def test_the_prompt_is_cut_on_the_left_for_the_longest_completion():
    (encoded,), counts = encode(Group("a bb ccc dddd", ("a", "a a a"), None, 1), max_length=6)
    assert encoded.prompt == (13, 14)
    assert [len(c) for c in encoded.completions] == [2, 4]
    assert counts == {"rows with the prompt cut on the left": 1}


def test_a_completion_is_cut_on_the_right_and_one_prompt_token_stays():
    (encoded,), counts = encode(Group("a bb", ("a a a a a a", "a"), None, 1), max_length=4)
    assert encoded.prompt == (12,) and encoded.completions[0] == (11, 11, 11)
    assert counts.total() == 2


def test_bos_stays_and_eos_never_ends_a_prompt():
    group = Group("a bb ccc dddd", ("a", "a a"), None, 1)
    whole, cut = (encoding.encode([group], Templated(), Limits(n, None, "prompt-left"), "")[0][0] for n in (50, 6))
    assert whole.prompt == (2, 11, 12, 13, 14) and whole.completions[0] == (11, 1)
    assert cut.prompt == (2, 13, 14)


def test_a_prompt_is_cut_for_sampling_as_for_training():
    text = "a bb ccc dddd"
    limits = Limits(50, None, "error", 3)  # the cut is not the limits' doing, so it is no error
    ((row,), counts) = encoding.encode([Group(text, ("a",), None, 1)], Templated(), limits, "")
    assert encoding.sampled_prompts([text], Templated(), 3)[0] == [[*row.prompt]] == [[2, 13, 14]]
    assert counts == {"rows with the prompt cut on the left to --max_prompt_length": 1}
    assert encoding.sampled_prompts([text, "a"], Words(), 3) == ([[12, 13, 14], [11]], {"prompts cut on the left": 1})
    assert encoding.sampled_prompts([text], Templated(), 1)[0] == [[14]]
    assert encoding.sampled_prompts([text], Templated(), 5) == ([[2, 11, 12, 13, 14]], {})


def test_completions_that_the_cut_makes_alike_are_dropped():
    rows, counts = encode(Group("a", ("a a a bb", "a a a ccc"), None, 1), max_completion_length=3)
    assert not rows and counts == {"rows dropped: completions identical once cut": 1}


@pytest.mark.parametrize(("length", "kept"), [(6, 1), (5, 0)])
def test_drop_keeps_exactly_what_fits(length, kept):
    rows, counts = encode(Group("a bb", ("a a a", "a"), None, 1), max_length=length, truncate="drop")
    assert len(rows) == kept and counts.total() == 1 - kept


def test_error_names_the_line():
    with pytest.raises(DataError, match="^rows.jsonl:7: "):
        encode(Group("a bb", ("a a a", "a"), None, 7), max_length=5, truncate="error")


@pytest.mark.parametrize("packing", LAYOUTS, ids=lambda packing: f"{packing.layout}-{packing.one_row}")
def test_what_is_scored_are_the_completions_and_nothing_else(packing):
    groups = [TokenGroup((5, 6), ((7, 1), (8, 9, 1)), None, 1), TokenGroup((5,), ((0, 1), (7, 1)), None, 2)]
    batch = packing.collate(groups)
    parts = batch.targets.split(batch.offsets.diff().tolist())
    assert [part.tolist() for part in parts] == [
        [7, 1],
        [8, 9, 1],
        [0, 1],
        [7, 1],
    ]  # 0 counts
    assert batch.group_size.tolist() == [2, 2] and batch.rewards is None
    used = {"padded": 15, "packed": 15, "shared": 12}[packing.layout]
    assert batch.attention_mask.sum() == used
    assert batch.input_ids.numel() == packing.tokens(groups)


def test_rows_of_the_shared_layout():
    """Two groups in rows of the longer one's length, and where each token is made."""
    groups = [TokenGroup((5,), ((7, 1), (8,)), None, 1), TokenGroup((5, 6), ((2, 1), (3, 4, 1)), None, 2)]
    groups.append(TokenGroup((9,), ((1,), (2,)), None, 3))
    batch = Packing(0, 300, "shared").collate(groups)
    assert batch.input_ids.tolist() == [[5, 6, 2, 1, 3, 4, 1], [5, 7, 1, 8, 9, 1, 2]]
    unit, part, position_ids = batch.sight
    assert unit.tolist() == [[0] * 7, [0] * 4 + [1] * 3]
    assert part.tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 2, 0, 1, 2]]
    assert position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 1, 0, 1, 1]]
    assert batch.rows.tolist() == [7, 8, 7, 1, 2, 1, 4, 5, 11, 11]
    assert batch.targets.tolist() == [7, 1, 8, 2, 1, 3, 4, 1, 1, 2]
    assert batch.offsets.tolist() == [0, 2, 3, 5, 8, 9, 10]


@pytest.mark.parametrize("packing", LAYOUTS, ids=lambda packing: f"{packing.layout}-{packing.one_row}")
def test_micro_batches_hold_every_group_once_within_the_budget(packing):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (40,), generator=generator).tolist()
    groups = [TokenGroup((5,) * n, ((7, 1),) * (2 + i % 4), None, i) for i, n in enumerate(lengths)]
    parts = packing.micro_batches(groups)
    assert sorted(g.line for part in parts for g in part) == list(range(40))
    for part in parts:
        size = packing.collate(part).input_ids.numel()
        assert size == packing.tokens(part) and (size <= 300 or len(part) == 1)
    for part, following in zip(parts, parts[1:], strict=False):
        assert packing.tokens([*part, following[0]]) > 300, "no part is closed too early"
    if packing.layout == "padded":
        sizes = [max(g.longest for g in part) * sum(len(g.completions) for g in part) for part in parts]
        assert sizes == [packing.tokens(part) for part in parts]


def test_prompt_and_completion_meet_at_a_token_border():
    """A tokenizer that would merge across the border is never shown both sides at once."""
    texts = ["ab abc abcd " * 20]
    _, tokenizer = models.tiny(texts, hidden_size=32, num_heads=2, num_layers=1)
    (encoded,), _ = encoding.encode(
        [Group("ab ab", ("c ab", "cd"), None, 1)], tokenizer, Limits(50, None, "error"), "rows.jsonl"
    )
    assert tokenizer.decode(encoded.prompt) == "ab ab"
    assert tokenizer.decode(encoded.completions[0]) == "c ab<eos>"
