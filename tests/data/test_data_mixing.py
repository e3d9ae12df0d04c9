"""Several files as one data set: in order, or mixed by weights; every row is counted and keeps its file and line."""

from collections import Counter

import pytest
from data_files import GOOD, SCORED, put, refusal

from exo.data import Chat, DataError, read

pytestmark = pytest.mark.filterwarnings("error")


def rows(prefix: str, count: int) -> list[dict]:
    return [{**GOOD, "prompt": f"{prefix}{i}"} for i in range(count)]


def write_two_files(folder, first=6, second=4) -> str:
    return f"{put(folder, rows('a', first), 'a.jsonl')},{put(folder, rows('b', second), 'b.jsonl')}"


def test_files_are_read_one_after_another_and_rows_name_their_own_file(tmp_path):
    path = write_two_files(tmp_path)
    data = read(path)
    assert [example.prompt for example in data.examples] == [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(4)]
    assert len({example.line for example in data.examples}) == 10 and data.rows == 10 and data.path == path
    assert data.examples[7].source == f"{tmp_path}/b.jsonl:2"
    put(tmp_path, [GOOD, {}], "b.jsonl")
    assert refusal(path).startswith(f"{tmp_path}/b.jsonl:2: ")


def test_a_path_with_a_comma_that_exists_is_one_path(tmp_path):
    path = put(tmp_path, rows("c", 2), "a,b.jsonl")
    assert len(read(path).examples) == 2
    assert "an empty name between commas" in refusal(f"{path},")


@pytest.mark.parametrize(
    ("weights", "sizes"), [((1, 1), (5, 5)), ((2, 1), (7, 3)), ((1, 9), (1, 9)), ((3, 2), (6, 4)), ((1, 4), (2, 8))]
)
def test_shares_follow_the_weights_and_repeated_or_skipped_rows_are_counted(tmp_path, weights, sizes):
    data = read(write_two_files(tmp_path), weights=weights)
    drawn = Counter(example.prompt for example in data.examples)
    assert tuple(sum(n for name, n in drawn.items() if name[0] == prefix) for prefix in "ab") == sizes
    for prefix, available in (("a", 6), ("b", 4)):
        times = [drawn[f"{prefix}{i}"] for i in range(available)]
        assert max(times) - min(times) <= 1  # every row is used equally often, or once more
    repeated = sum(max(0, size - available) for size, available in zip(sizes, (6, 4), strict=True))
    left_out = sum(max(0, available - size) for size, available in zip(sizes, (6, 4), strict=True))
    assert data.repeated == repeated and sum(data.skipped.values()) == left_out
    assert data.rows + data.repeated == len(data.examples) + sum(data.skipped.values())
    if repeated:
        assert f"+ {repeated} repeated by --data_weights" in data.summary() and data.account()["repeated"] == repeated


def test_the_seed_decides_which_rows(tmp_path):
    path = write_two_files(tmp_path, 50, 50)
    same, repeat, different = (read(path, weights=(3, 1), seed=seed) for seed in (0, 0, 1))
    assert same.examples == repeat.examples != different.examples


def test_each_file_needs_one_weight(tmp_path):
    with pytest.raises(DataError, match="expected one weight for each of the 2 data files; got 1"):
        read(write_two_files(tmp_path), weights=(1,))


def test_files_of_different_kinds_are_not_mixed(tmp_path):
    pairs, scored = put(tmp_path, [GOOD], "pairs.jsonl"), put(tmp_path, [SCORED], "scored.jsonl")
    assert "has rewards and" in refusal(f"{pairs},{scored}") and "has rewards and" in refusal(f"{scored},{pairs}")
    questions = put(tmp_path, [{"question": "q", "chosen": "a", "rejected": "b"}], "asked.jsonl")
    talk = {"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "b"}
    chats = put(tmp_path, [talk], "chats.jsonl")
    assert "has plain texts and" in refusal(f"{pairs},{chats}")
    assert "has plain texts and" in refusal(f"{pairs},{questions}")
    data = read(f"{questions},{chats}")
    assert all(isinstance(example.prompt, Chat) for example in data.examples) and not data.conversational
    assert read(f"{questions},{questions}").conversational


def test_columns_that_only_one_file_has_may_be_named(tmp_path):
    other = [{"ask": "p", "chosen": "a", "rejected": "b"}]
    path = f"{put(tmp_path, rows('a', 2), 'a.jsonl')},{put(tmp_path, other, 'b.jsonl')}"
    assert [example.prompt for example in read(path, columns={"prompt": "ask"}).examples] == ["a0", "a1", "p"]
