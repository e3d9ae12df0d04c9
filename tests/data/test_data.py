"""The data reader: formats, errors, and an account of every row."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import CANARY, GOOD, HH, SCORED, A, H, put, refusal, scored

from exo.data import DataError, Dataset, Example, read, read_jsonl, write_jsonl

pytestmark = pytest.mark.filterwarnings("error")  # a file left open warns

# The three formats.


def test_preferences(tmp_path):
    data = read(put(tmp_path, [GOOD, {**GOOD, "prompt": "q", "id": 7}]))
    assert data.examples == [Example("p", (" a", " b"), None, 1), Example("q", (" a", " b"), None, 2)]
    assert data.format == "preferences (prompt/chosen/rejected)"
    assert (data.rows, data.skipped, data.noted) == (2, {}, {})


def test_scored_completions_may_differ_in_number(tmp_path):
    two = {"prompt": "q", "completions": ["x", "y"], "rewards": [3, 4]}
    data = read(put(tmp_path, [SCORED, two]))
    assert data.examples == [
        Example("p", (" a", " b", " c"), (1.0, 0.5, -2.0), 1),
        Example("q", ("x", "y"), (3.0, 4.0), 2),
    ]
    assert all(type(reward) is float for example in data.examples for reward in example.rewards)
    assert data.format == "completions with rewards (prompt/completions/rewards)"


def test_dialogues(tmp_path):
    data = read(put(tmp_path, [HH]))
    assert data.examples == [Example("\n\nHuman: hi\n\nAssistant:", (" hello", " go away"), None, 1)]
    assert data.format == "Anthropic HH dialogues (chosen/rejected)"


def test_a_row_with_the_keys_of_two_formats_is_refused(tmp_path):
    assert "keys of two formats" in refusal(put(tmp_path, [{**GOOD, **SCORED}]))


def test_an_unknown_format_names_its_keys_and_the_nearest_format(tmp_path):
    message = refusal(put(tmp_path, [{"prompt": CANARY, "chosen": CANARY, "loser": CANARY}]))
    assert message.endswith(
        "data.jsonl:1: unknown format, keys found: 'prompt', 'chosen', 'loser'; nearest is preferences "
        "(prompt/chosen/rejected), missing 'rejected'; set --columns rejected=COLUMN"
    )
    message = refusal(put(tmp_path, [{"question": CANARY, "answer": CANARY}]))
    assert "keys found: 'question', 'answer'; this is texts (question/answer), which sft takes" in message


def test_keys_in_messages_are_cut_short_and_stay_on_one_line(tmp_path):
    message = refusal(put(tmp_path, [{"k" * 500: 1, "a\nb": 2, **{str(i): i for i in range(90)}}]))
    assert len(message) < 900
    assert f"'{'k' * 40}...', 'a\\nb', '0'" in message and "84 more" in message


@pytest.mark.parametrize(
    ("first", "later", "reason"),
    [
        (GOOD, SCORED, "missing 'chosen', 'rejected'"),
        (SCORED, GOOD, "missing 'completions', 'rewards'"),
        (GOOD, HH, "missing 'prompt'"),
        (HH, GOOD, "another format"),
    ],
)
def test_a_later_row_of_another_format_is_malformed(tmp_path, first, later, reason):
    path = put(tmp_path, [first, later, first])
    message = refusal(path)
    assert message.startswith(f"{path}:2: {reason}; the file began as ")
    assert read(path, skip_invalid=True).skipped == {"malformed": 1}


def test_the_first_valid_row_sets_the_format(tmp_path):
    wrong_type = {"prompt": "p", "completions": "x", "rewards": [1]}
    data = read(put(tmp_path, [wrong_type, GOOD]), skip_invalid=True)
    assert data.format.startswith("preferences") and data.skipped == {"malformed": 1}


def test_a_degenerate_row_is_valid_and_sets_the_format(tmp_path):
    path = put(tmp_path, [{**GOOD, "rejected": ""}, SCORED, GOOD])
    assert refusal(path).startswith(f"{path}:2: missing")


# Degenerate rows are skipped or noted, and never an error.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (scored("a", " \n\t", "c"), "empty completion"),
        (scored(""), "empty completion"),
        (scored("", ""), "empty completion"),
        (scored("a"), "single completion"),
        (scored("a", "a", "a"), "identical completions"),
    ],
)
def test_rows_with_nothing_to_compare_are_skipped_and_counted(tmp_path, row, reason):
    data = read(put(tmp_path, [row, SCORED, row]))
    assert data.skipped == {reason: 2} and data.noted == {} and data.rows == 3
    assert [example.line for example in data.examples] == [2]


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        (scored("a", "b", rewards=[2, 2.0]), {"all rewards equal"}),
        (scored("a", "b", "a"), {"some completions repeated"}),
        (
            scored("a", "a", "b", rewards=[0, 0, 0]),
            {"all rewards equal", "some completions repeated"},
        ),
        ({**SCORED, "prompt": ""}, {"empty prompt"}),
        (scored("a", " a"), set()),
    ],
)
def test_unusual_rows_are_used_and_noted(tmp_path, row, notes):
    data = read(put(tmp_path, [row, SCORED]))
    assert data.noted == dict.fromkeys(notes, 1)
    assert len(data.examples) == 2 and data.skipped == {}


def test_identical_preferences_are_skipped_without_a_note_on_rewards(tmp_path):
    data = read(put(tmp_path, [{**GOOD, "rejected": " a"}, GOOD]))
    assert data.skipped == {"identical completions": 1} and data.noted == {}


# The data set that the reader returns.


def test_summary_accounts_for_every_row(tmp_path):
    rows = [SCORED, scored("a", "a"), scored("a", "b", rewards=[1, 1]), scored("a"), {}]
    path = put(tmp_path, rows)
    assert read(path, skip_invalid=True).summary().splitlines() == [
        f"{path}: completions with rewards (prompt/completions/rewards)",
        "5 rows = 2 used + 3 skipped (identical completions: 1, single completion: 1, malformed: 1)",
        "used, but note: all rewards equal: 1",
    ]
    assert read(put(tmp_path, [SCORED])).summary().endswith("\n1 rows = 1 used + 0 skipped")


def test_a_dataset_that_lost_a_row_cannot_be_made():
    with pytest.raises(AssertionError, match="unaccounted"):
        Dataset([], "x", 2, {"malformed": 1}, {}, "x")


def test_jsonl_survives_the_round_trip(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "é\u2028\n\0😀", "token_ids": [[1, 2], []]}, {}, {"x": None, "y": -0.1}]
    assert write_jsonl(path, iter(rows)) == 3
    assert list(read_jsonl(path)) == list(enumerate(rows, 1))
    text = path.read_bytes()
    assert text.count(b"\n") == 3 and b"\r" not in text and "é".encode() in text


def test_write_jsonl_refuses_values_that_the_reader_refuses(tmp_path):
    for value in (float("nan"), float("inf"), "\ud83d"):
        with pytest.raises(ValueError):
            write_jsonl(tmp_path / "rows.jsonl", [{"x": value}])


def test_read_jsonl_is_strict(tmp_path):
    path = put(tmp_path, f'{{"a": 1}}\n\n{{"a": 1, "a": "{CANARY}"}}\n')
    rows = read_jsonl(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError) as caught:
        next(rows)
    assert str(caught.value) == f"{path}:3: key 'a' appears twice"


def test_importing_needs_the_standard_library_alone():
    """pyarrow and datasets take a second to import, and most runs need neither."""
    program = "import sys, exo.data; print(*{name.split('.')[0] for name in sys.modules})"
    imported = set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split())
    assert "exo" in imported and not imported & {"torch", "transformers", "datasets", "pyarrow", "numpy"}


# Real files. The expected counts come from code that is independent of the reader.


@pytest.fixture
def shared() -> Path:
    folder = os.environ.get("EXO_SHARED_DATA")
    if not folder:
        pytest.skip("EXO_SHARED_DATA does not name the folder of real data files")
    return Path(folder)


def test_every_row_of_the_real_dialogues_is_accounted_for(shared):
    path = shared / "hh_harmless_base_test.jsonl.gz"
    data = read(path)
    assert data.rows == 2312 and len(data.examples) == 2308
    assert data.skipped == {"empty completion": 4}
    assert data.noted == {"later turns dropped": 5}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = dict(enumerate(map(json.loads, file), 1))
    # The chosen answer is empty in these four rows; an answer has two messages in the five rows below.
    assert rows.keys() - {example.line for example in data.examples} == {87, 517, 926, 1104}
    dropped = set()
    for example in data.examples:
        assert example.prompt.startswith(H) and example.prompt.endswith(A)
        for key, completion in zip(("chosen", "rejected"), example.completions, strict=True):
            assert completion.startswith(" ") and H not in completion and A not in completion
            prefix, matched, remainder = rows[example.line][key].partition(example.prompt + completion)
            assert prefix == "" and matched
            if remainder:
                dropped.add(example.line)
                assert remainder.startswith(A)
    assert dropped == {1255, 1689, 1951, 1953, 2037}


def test_a_real_dialogue_is_split_before_its_last_answer(shared):
    examples = {example.line: example for example in read(shared / "hh_harmless_base_test.jsonl.gz").examples}
    assert examples[537].prompt == (
        f"{H} What was the best thing about Jim Crow laws in the U.S. south?"
        f"{A} I think they made it easier for racist people to say or do racist things."
        f"{H} What are some racist things you've said?{A}"
    )
    assert examples[537].completions == (
        " Nothing, because I'm a robot.",
        " I think I called a cat racist yesterday.",
    )


@pytest.mark.parametrize(
    ("name", "sizes", "noted"),
    [
        ("kway_rewards.jsonl", {4: 300}, {"some completions repeated": 4, "all rewards equal": 47}),
        (
            "kway_ragged.jsonl",
            {2: 57, 3: 69, 4: 63, 5: 51, 7: 60},
            {"some completions repeated": 6, "all rewards equal": 23},
        ),
    ],
)
def test_the_real_scored_files(shared, name, sizes, noted):
    data = read(shared / name)
    assert (data.rows, data.skipped, data.noted) == (300, {}, noted)
    counts = [len(example.completions) for example in data.examples]
    assert {size: counts.count(size) for size in set(counts)} == sizes
    assert [(g.line, list(g.completions), list(g.rewards)) for g in data.examples] == [
        (line, row["completions"], row["rewards"]) for line, row in read_jsonl(shared / name)
    ]


def test_real_text_that_is_not_utf8_names_the_line(shared):
    path = shared / "rt_polarity.pos"
    assert refusal(path).startswith(f"{path}:1: bad JSON")
    assert "no usable row: 5331 rows" in refusal(path, skip_invalid=True)
