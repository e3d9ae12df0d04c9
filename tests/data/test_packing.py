"""Tokens, limits and micro-batches: only completions are scored, and every cut or dropped row is counted."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from exo import models
from exo.data import DataError, Example
from exo.data.collate import Collator
from exo.data.text import tokenize
from exo.data.text.limits import STUMP, Limits, is_stump
from exo.data.text.tokenize import TokenizedExample

LAYOUTS = [Collator(0, 300, layout, one_row) for layout in ("padded", "packed", "shared") for one_row in (False, True)]


def words(bos: bool = False):
    """Return a tokenizer whose ids are easy to read: 10 plus the length of the word.

    With `bos`, it adds <bos> before and <eos> after a text, as some tokenizers do.
    """
    backend = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "a": 11, "bb": 12, "ccc": 13, "dddd": 14}))
    backend.pre_tokenizer = WhitespaceSplit()
    if bos:
        backend.post_processor = TemplateProcessing("<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def encode(example, max_length=100, max_completion_length=None, truncate="prompt-left", most=None, **options):
    limits = Limits(max_length, max_completion_length, truncate, most)
    return tokenize.encode([example], words(), limits, "rows.jsonl", **options)


def test_completions_end_with_eos_and_prompts_are_unchanged():
    (encoded,), counts = encode(Example("a bb", (" ccc", " dddd a"), (1.0, 2.0), 3))
    assert encoded == TokenizedExample((11, 12), ((13, 1), (14, 11, 1)), (1.0, 2.0), 3)
    assert not counts


def test_a_labelled_text_is_a_prompt_and_its_label_is_no_reward():
    """Check that the completion is the end of sequence alone, and that a limit cuts the text on its left."""
    text = Example("", ("a bb ccc dddd",), None, 3, label=1)
    (encoded,), _ = encode(text)
    assert encoded == TokenizedExample((11, 12, 13, 14), ((1,),), None, 3, label=1)
    (cut,), counts = encode(text, max_length=3, strict=False)
    assert (
        cut == TokenizedExample((13, 14), ((1,),), None, 3, label=1) and counts["rows with the prompt cut on the left"]
    )
    batch = Collator(0, 100).collate([encoded, cut])
    assert batch.label.tolist() == [1, 1] and batch.rewards is None
    assert batch.to(torch.device("cpu")).label.tolist() == [1, 1]
    assert Collator(0, 100).collate([encode(Example("a", (" bb", " a"), None, 1))[0][0]]).label is None


def test_an_empty_prompt_becomes_one_token():
    (encoded,), _ = encode(Example("", ("a", "bb"), None, 1))
    assert encoded.prompt == (1,)


PROMPT = Example("a bb ccc dddd", (" a", " a a a"), None, 1)


def test_a_long_completion_is_cut_first_and_the_prompt_keeps_half():
    (encoded,), counts = encode(PROMPT, max_length=6, strict=False)
    assert encoded.prompt == (12, 13, 14) and encoded.completions == ((11, 1), (11, 11, 11))
    assert counts == {
        "rows with the prompt cut on the left": 1,
        "rows with a completion cut on the right (its end of sequence goes too)": 1,
        "rows that keep fewer than 32 tokens or a quarter of their prompt": 1,
    }


def test_the_prompt_is_cut_if_completions_take_less_than_half():
    (encoded,), counts = encode(replace(PROMPT, prompt="a a bb ccc dddd"), max_length=8, strict=False)
    assert encoded.prompt == (11, 12, 13, 14) and encoded.completions[1] == (11, 11, 11, 1) and counts.total() == 2


@pytest.mark.parametrize(("most", "prompt", "longest"), [(1, (14,), 4), (3, (12, 13, 14), 3), (9, (11, 12, 13, 14), 2)])
def test_max_prompt_length_replaces_the_default_cut(most, prompt, longest):
    (encoded,), _ = encode(PROMPT, max_length=6, most=most)
    assert encoded.prompt == prompt and max(map(len, encoded.completions)) == longest


def test_a_run_stops_if_too_little_is_left_of_more_than_a_twentieth_of_its_prompts():
    short, long = (Example(" ".join(["a"] * n), (" a", " bb"), None, 1) for n in (9, 300))
    limits = Limits(64, None, "prompt-left")
    assert tokenize.encode([*[short] * 19, long], words(), limits, "rows.jsonl")[1].total() == 2
    with pytest.raises(DataError, match="^rows.jsonl: 2 of 20 rows.*--max_length, or set --max_prompt_length$"):
        tokenize.encode([*[short] * 18, long, long], words(), limits, "rows.jsonl")
    # --max_prompt_length permits the cut
    tokenize.encode([long] * 20, words(), Limits(64, None, "prompt-left", 40), "rows.jsonl")


def test_bos_stays_and_eos_never_ends_a_prompt():
    example = Example("a bb ccc dddd", (" a", " a a"), None, 1)
    uncut, cut = (
        tokenize.encode([example], words(bos=True), Limits(n, None, "prompt-left"), "", strict=False)[0][0]
        for n in (50, 6)
    )
    assert uncut.prompt == (2, 11, 12, 13, 14) and uncut.completions[0] == (11, 1)
    assert cut.prompt == (2, 13, 14)


def test_a_prompt_is_cut_for_sampling_as_for_training():
    text, tokenizer = "a bb ccc dddd", words(bos=True)
    limits = Limits(50, None, "error", 3)  # truncate="error" does not apply to --max_prompt_length
    ((row,), counts) = tokenize.encode([Example(text, (" a",), None, 1)], tokenizer, limits, "")
    assert tokenize.sampled_prompts([text], tokenizer, 3)[0] == [[*row.prompt]] == [[2, 13, 14]]
    assert counts == {"rows with the prompt cut on the left to --max_prompt_length": 1}
    ids, counts = tokenize.sampled_prompts([text, "a"], words(), 3)
    assert ids == [[12, 13, 14], [11]] and counts["prompts cut on the left"] == 1
    assert tokenize.sampled_prompts([text], tokenizer, 1)[0] == [[14]]
    assert tokenize.sampled_prompts([text], tokenizer, 5) == ([[2, 11, 12, 13, 14]], {})


def test_completions_that_are_identical_once_cut_are_dropped():
    rows, counts = encode(Example("a", (" a a a bb", " a a a ccc"), None, 1), max_completion_length=3)
    assert not rows and counts == {"rows dropped: completions identical once cut": 1}


@pytest.mark.parametrize(("length", "num_rows"), [(6, 1), (5, 0)])
def test_drop_removes_rows_that_do_not_fit(length, num_rows):
    rows, counts = encode(Example("a bb", (" a a a", " a"), None, 1), max_length=length, truncate="drop")
    assert len(rows) == num_rows and counts.total() == 1 - num_rows


def test_error_names_the_line():
    with pytest.raises(DataError, match="^rows.jsonl:7: "):
        encode(Example("a bb", (" a a a", " a"), None, 7), max_length=5, truncate="error")


@pytest.mark.parametrize("collator", LAYOUTS, ids=lambda collator: f"{collator.layout}-{collator.one_row}")
def test_only_completions_are_scored(collator):
    examples = [
        TokenizedExample((5, 6), ((7, 1), (8, 9, 1)), None, 1),
        TokenizedExample((5,), ((0, 1), (7, 1)), None, 2),
    ]
    batch = collator.collate(examples)
    parts = batch.targets.split(batch.offsets.diff().tolist())
    assert [part.tolist() for part in parts] == [
        [7, 1],
        [8, 9, 1],
        [0, 1],
        [7, 1],
    ]  # token 0 is scored, although it is the padding
    assert batch.group_size.tolist() == [2, 2] and batch.rewards is None
    used = {"padded": 15, "packed": 15, "shared": 12}[collator.layout]
    assert batch.attention_mask.sum() == used
    assert batch.input_ids.numel() == collator.tokens(examples)


def test_rows_of_the_shared_layout():
    """Check rows as long as the longest group: their tokens, segments and the positions that predict a target."""
    examples = [TokenizedExample((5,), ((7, 1), (8,)), None, 1), TokenizedExample((5, 6), ((2, 1), (3, 4, 1)), None, 2)]
    examples.append(TokenizedExample((9,), ((1,), (2,)), None, 3))
    batch = Collator(0, 300, "shared").collate(examples)
    assert batch.input_ids.tolist() == [[5, 6, 2, 1, 3, 4, 1], [5, 7, 1, 8, 9, 1, 2]]
    unit, part, position_ids = batch.segment_ids
    assert unit.tolist() == [[0] * 7, [0] * 4 + [1] * 3]
    assert part.tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 2, 0, 1, 2]]
    assert position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 1, 0, 1, 1]]
    assert batch.rows.tolist() == [7, 8, 7, 1, 2, 1, 4, 5, 11, 11]
    assert batch.targets.tolist() == [7, 1, 8, 2, 1, 3, 4, 1, 1, 2]
    assert batch.offsets.tolist() == [0, 2, 3, 5, 8, 9, 10]


@pytest.mark.parametrize("collator", LAYOUTS, ids=lambda collator: f"{collator.layout}-{collator.one_row}")
def test_micro_batches_hold_every_group_once_within_the_budget(collator):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (40,), generator=generator).tolist()
    examples = [TokenizedExample((5,) * n, ((7, 1),) * (2 + i % 4), None, i) for i, n in enumerate(lengths)]
    parts = collator.micro_batches(examples)
    assert sorted(g.line for part in parts for g in part) == list(range(40))
    for part in parts:
        size = collator.collate(part).input_ids.numel()
        assert size == collator.tokens(part) and (size <= 300 or len(part) == 1)
    for part, following in zip(parts, parts[1:], strict=False):
        assert collator.tokens([*part, following[0]]) > 300, "no part is closed too early"
    if collator.layout == "padded":
        sizes = [max(g.longest for g in part) * sum(len(g.completions) for g in part) for part in parts]
        assert sizes == [collator.tokens(part) for part in parts]


def test_prompt_and_completion_meet_at_a_token_boundary():
    """Check a tokenizer with tokens across the boundary: the completion is still tokenized separately."""
    texts = ["ab abc abcd " * 20]
    _, tokenizer = models.tiny(texts, hidden_size=32, num_heads=2, num_layers=1)
    (encoded,), _ = tokenize.encode(
        [Example("ab ab", ("c ab", "cd"), None, 1)], tokenizer, Limits(50, None, "error"), "rows.jsonl"
    )
    assert tokenizer.decode(encoded.prompt) == "ab ab"
    assert tokenizer.decode(encoded.completions[0]) == "c ab<eos>"


def test_a_prompt_that_keeps_a_quarter_is_no_stump():
    assert not is_stump(100, 400) and is_stump(99, 400)
    assert not is_stump(STUMP, 2 * STUMP) and is_stump(STUMP - 1, 2 * STUMP) and not is_stump(3, 3)
