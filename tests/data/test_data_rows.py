"""Containers and their rows: a malformed row is named and costs no other row; a damaged file is refused."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from data_files import CANARY, GOOD, put, refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exo.data import DataError, Example, read

pytestmark = pytest.mark.filterwarnings("error")  # a file left open warns

# Malformed rows: (description, the row as written in the file, words of the message).

SURROGATE = f'{{"prompt": "{CANARY} \\ud83d", "chosen": "a", "rejected": "b"}}'
REWARDS = f'{{"prompt": "{CANARY}", "completions": ["a", "b"], "rewards": [%s]}}'
PREFERENCE = f'{{"prompt": "{CANARY}", "chosen": %s, "rejected": "b"}}'
CHAT = f'[{{"role": "user", "content": "{CANARY}"}}]'

BROKEN = [
    ("cut off", f'{{"prompt": "{CANARY}', "bad JSON: Unterminated string"),
    ("two objects", f'{{"a": "{CANARY}"}} {{}}', "bad JSON: Extra data"),
    ("single quotes", f"{{'prompt': '{CANARY}'}}", "bad JSON: Expecting property name"),
    ("python literal", '{"prompt": None}', "bad JSON: Expecting value"),
    ("no colon", '{"a" 1}', "bad JSON: Expecting ':' delimiter (character 6 of the row)"),
    ("trailing comma", f'{{"prompt": "{CANARY}",}}', "bad JSON: "),
    ("raw tab", f'{{"prompt": "{CANARY}\t"}}', "bad JSON: Invalid control character"),
    ("raw NUL", f'{{"prompt": "{CANARY}\0"}}', "bad JSON: Invalid control character"),
    ("only NULs", "\0\0\0", "bad JSON: Expecting value"),
    ("BOM inside", '\ufeff{"prompt": "x"}', "bad JSON: "),
    ("UTF-8", f'{{"prompt": "{CANARY} \udce9"}}', "not UTF-8 (byte 25 of the row)"),
    ("NaN", REWARDS % "NaN, 1", "not finite"),
    ("Infinity", REWARDS % "1, -Infinity", "not finite"),
    ("1e999", REWARDS % "1, 1e999", "not finite"),
    ("1e999 in a key not read", '{"other": -1e999}', "not finite"),
    ("400 digits", REWARDS % f"1, {'9' * 400}", "rewards[1] is too large"),
    ("5000 digits", REWARDS % f"1, {'9' * 5000}", "too many digits"),
    ("key twice", f'{{"prompt": "{CANARY}", "prompt": "x"}}', "key 'prompt' appears twice"),
    ("later key twice", '{"id": 1, "x": 2, "x": 3}', "key 'x' appears twice"),
    ("key twice below", '{"meta": {"id": 1, "id": 2}}', "key 'id' appears twice"),
    ("lone surrogate", SURROGATE, "lone surrogate"),
    ("lone surrogate, capitals", SURROGATE.replace("ud83d", "uDC00"), "lone surrogate"),
    ("lone surrogate in a key", '{"\\ud83d": 1}', "lone surrogate"),
    ("deep arrays", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ("deep objects", '{"p":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    ("string", f'"{CANARY}"', "must be an object, not a string"),
    ("null", "null", "must be an object, not null"),
    ("no keys", "{}", "keys found: none"),
    ("missing key", f'{{"prompt": "{CANARY}", "chosen": "a"}}', "unknown format"),
    ("null for text", PREFERENCE % "null", "missing 'chosen'"),
    ("number for text", PREFERENCE % "17", "chosen must be a string, not a number"),
    ("boolean for text", PREFERENCE % "true", "chosen must be a string, not a boolean"),
    ("array for text", PREFERENCE % '["a"]', "chosen must be a string, not an array"),
    ("chat", PREFERENCE % CHAT, "chosen must begin with a message of the assistant"),
    (
        "null message",
        PREFERENCE % '[{"role": "assistant", "content": null}]',
        "chosen[0].content must be a string, not null",
    ),
    ("too few rewards", REWARDS % "1", "2 completions but 1 rewards"),
    ("too many rewards", REWARDS % "1, 2, 3", "2 completions but 3 rewards"),
    ("no rewards", REWARDS % "", "rewards must be an array, and not empty"),
    ("boolean reward", REWARDS % "1, true", "rewards[1] must be a number, not a boolean"),
    ("null reward", REWARDS % "null, 1", "rewards[0] must be a number, not null"),
    ("text reward", REWARDS % f'1, "{CANARY}"', "rewards[1] must be a number, not a string"),
    (
        "number among completions",
        '{"prompt": "p", "completions": ["a", 3], "rewards": [1, 2]}',
        "completions[1] must be a string, not a number",
    ),
    ("empty lists", '{"prompt": "p", "completions": [], "rewards": []}', "not empty"),
    ("text for list", f'{{"prompt": "p", "completions": "{CANARY}", "rewards": [1]}}', "completions must be an array"),
    ("object for list", '{"prompt": "p", "completions": ["a"], "rewards": {}}', "rewards must be an array"),
]
# An array is split at its brackets and quotes, so a row with unbalanced ones damages the array.
CONTAINED = [case for case in BROKEN if case[0] != "cut off"]
CONTAINED.append(("escaped line break", f'{{"prompt": "{CANARY}\\\n"}}', "bad JSON: Invalid"))


def by_name(cases):
    return [pytest.param(row, words, id=name) for name, row, words in cases]


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(("row", "words"), by_name(BROKEN))
def test_a_malformed_line_is_named_and_costs_no_other_line(tmp_path, row, words):
    # First as the only row, so that the error is about the row and not about a change of format.
    path = put(tmp_path, raw(f"\n\n{row}\n"))
    message = refusal(path)
    assert message.startswith(f"{path}:3: ") and words in message
    path = put(tmp_path, raw(f"{json.dumps(GOOD)}\n{row}\n{json.dumps(GOOD)}\n"))
    assert refusal(path).startswith(f"{path}:2: ")
    data = read(path, skip_invalid=True)
    assert data.skipped == {"malformed": 1}
    assert [example.line for example in data.examples] == [1, 3]


@pytest.mark.parametrize(("row", "words"), by_name(CONTAINED))
def test_a_malformed_element_is_named_and_costs_no_other_element(tmp_path, row, words):
    path = put(tmp_path, raw(f"[\n\n{row}\n]"), "data.json")
    message = refusal(path)
    assert message.startswith(f"{path}:3: row 1: ") and words in message
    path = put(tmp_path, raw(f"[{json.dumps(GOOD)},\n {row},\n{json.dumps(GOOD)}]"), "data.json")
    assert refusal(path).startswith(f"{path}:2: row 2: ")
    data = read(path, skip_invalid=True)
    assert data.skipped == {"malformed": 1}
    assert [example.line for example in data.examples] == [1, 3]


def test_a_cut_off_last_line_is_named(tmp_path):
    text = json.dumps(GOOD)
    path = put(tmp_path, f"{text}\n{text[:-5]}")
    assert refusal(path).startswith(f"{path}:2: bad JSON")


def test_an_array_below_the_first_row_is_a_malformed_line(tmp_path):
    path = put(tmp_path, [GOOD, [1], GOOD])
    assert refusal(path) == f"{path}:2: a row must be an object, not an array"
    assert [example.line for example in read(path, skip_invalid=True).examples] == [1, 3]


def test_surrogate_pairs_nul_escapes_and_line_separators_are_text(tmp_path):
    row = '{"prompt": "\\ud83d\\ude00 \\u0000 \\\\ud83d", "chosen": "a\u2028b\x85", "rejected": "b"}'
    example = read(put(tmp_path, f"{row}\n{row}\n")).examples[1]
    assert example == Example("\U0001f600 \0 \\ud83d", ("a\u2028b\x85", "b"), None, 2)


# Files: containers, line ends and damage.


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "content",
    [
        b"%s\n%s\n",
        b"%s\n%s",
        b"%s\r\n%s\r\n",
        b"\xef\xbb\xbf%s\n%s\n",
        b"%s\n%s\n\n  \n\r\n",
        b"\n%s\n\n%s\n",
        b"[%s,%s]",
        b"\xef\xbb\xbf \n\t[\n %s\n,\n %s\n]\n\n",
    ],
)
def test_containers_are_detected_by_content_not_by_name(tmp_path, content, packed):
    row = json.dumps({**GOOD, "meta": {"tags": ["a,]", '"}'], "none": []}}).encode()
    content = content % (row, row)
    path = put(tmp_path, gzip.compress(content) if packed else content, "data.txt")
    data = read(path)
    assert [(g.prompt, g.completions) for g in data.examples] == [("p", (" a", " b"))] * 2
    assert data.path == str(path) and data.rows == 2


def test_the_numbers_of_lines_and_array_rows(tmp_path):
    row = json.dumps(GOOD)
    lines = read(put(tmp_path, f"{row}\n\n{row}\n"))
    assert [example.line for example in lines.examples] == [1, 3]
    array = read(put(tmp_path, f"[{row},\n\n{row}]"))
    assert [example.line for example in array.examples] == [1, 2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},:\n é', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_values, max_size=4), st.sampled_from([None, 0, 2]), st.booleans())
def test_an_array_reads_as_the_lines_would(tmp_path_factory, extras, indent, escaped):
    rows = [{**GOOD, "extra": extra} for extra in extras] + [GOOD]
    folder = tmp_path_factory.mktemp("json")
    text = json.dumps(rows, indent=indent, ensure_ascii=escaped)
    lines, array = read(put(folder, rows)), read(put(folder, text, "data.json"))
    assert lines.examples == array.examples and len(array.examples) == len(rows)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([json.dumps(GOOD), *'[]{}",:\\\n\t\0 1']) | st.binary(max_size=4)))
@example([b"\x1f\x8b"])
@example(["[", "[", "]"])
@example(["[", "]", "]"])
def test_arbitrary_bytes_raise_only_data_errors(tmp_path_factory, pieces):
    content = b"".join(p if isinstance(p, bytes) else p.encode() for p in pieces)
    path = put(tmp_path_factory.mktemp("bytes"), content)
    for skip_invalid in (False, True):
        try:
            data = read(path, skip_invalid=skip_invalid)
        except DataError as error:
            assert str(error).startswith(f"{path}:") and len(str(error).splitlines()) == 1
        else:
            assert data.rows == len(data.examples) + sum(data.skipped.values())


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("[\n%s,\n%s\n", "4", "never closed"),
        ('[\n%s,\n{"prompt": "x', "3", "never closed"),
        ("[%s,\n%s]\n[]", "2", "the array ends here"),
        ("[%s,\n%s\n]\n[]", "3", "the array ends here"),
        ("[%s,\n%s}", "2", "the array ends here"),
        ("[%s]]\n%s", "1", "the array ends here"),
    ],
)
def test_an_array_damaged_outside_its_rows_is_always_refused(tmp_path, text, place, reason):
    row = json.dumps(GOOD)
    path = put(tmp_path, text % ((row,) * text.count("%s")), "data.json")
    for skip_invalid in (False, True):
        message = refusal(path, skip_invalid=skip_invalid)
        assert message.startswith(f"{path}:{place}: ") and reason in message


@pytest.mark.parametrize("text", ["[%s,]", "[,%s]"])
def test_a_comma_without_a_row_is_a_malformed_row(tmp_path, text):
    path = put(tmp_path, text % json.dumps(GOOD))
    assert "bad JSON" in refusal(path)
    assert read(path, skip_invalid=True).skipped == {"malformed": 1}


def test_a_hostile_string_is_scanned_once(tmp_path):
    # A scan from every escaped quote would take hours.
    assert "never closed" in refusal(put(tmp_path, b'["' + b'\\"' * 1_000_000))


@pytest.mark.parametrize("length", [-1, -6, 0.5], ids=["a byte", "checksum", "half"])
def test_cut_off_gzip_is_always_refused(tmp_path, length):
    rows = [{**GOOD, "prompt": hashlib.sha256(bytes([i])).hexdigest()} for i in range(200)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    cut = packed[: length if isinstance(length, int) else int(len(packed) * length)]
    path = put(tmp_path, cut, "data.jsonl.gz")
    for skip_invalid in (False, True):
        assert "cut off or damaged" in refusal(path, skip_invalid=skip_invalid)


# Byte 10 is the first of the stream: with these two bits set, it announces a type of block that does not exist.
@pytest.mark.parametrize(("at", "bits"), [(10, 0x06), (-8, 0xFF)], ids=["stream", "checksum"])
@pytest.mark.parametrize("text", ["%s", "[%s]"], ids=["lines", "array"])
def test_damaged_gzip_is_refused(tmp_path, text, at, bits):
    packed = bytearray(gzip.compress((text % json.dumps(GOOD)).encode()))
    packed[at] = packed[at] | bits if at == 10 else packed[at] ^ bits
    path = put(tmp_path, bytes(packed))
    assert refusal(path, skip_invalid=True) == f"{path}:1: the gzip data is cut off or damaged"


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b" [ ]\n", gzip.compress(b"", mtime=0)],
)
def test_a_file_without_rows_is_refused(tmp_path, content):
    assert refusal(put(tmp_path, content)).endswith("data.jsonl: the file holds no rows")


def test_a_file_without_a_usable_row_is_refused_with_the_row_counts(tmp_path):
    path = put(tmp_path, [{**GOOD, "chosen": ""}, {**GOOD, "chosen": " b"}, {}, 1])
    account = "no usable row: 4 rows = 0 used + 4 skipped (empty completion: 1, identical completions: 1, malformed: 2)"
    message = refusal(path, skip_invalid=True)
    assert message.startswith(f"{path}: {account}; first malformed: {path}:3: missing 'prompt'")


def test_a_path_that_is_no_data_file_is_refused_with_the_accepted_formats(tmp_path):
    for path in (
        tmp_path / "missing.jsonl",
        tmp_path / "missing",
        "train.jsonl",
        "data/train.jsonl",
        Path("nul\0byte"),
    ):
        message = refusal(path)
        assert "no such file" in message and "accepted: a .jsonl file, a .json array" in message
    assert "not a regular file; accepted" in refusal("/dev/null")
    assert "too long" in refusal(tmp_path / ("n" * 5000))


def test_a_path_with_a_line_break_stays_on_one_line(tmp_path):
    path = tmp_path / "two\nlines"
    assert r"two\nlines" in refusal(path)
