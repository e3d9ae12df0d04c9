"""The data reader: what it takes, what it refuses and how it says so, and that no row gets lost.

Files are written as bytes, because most of what goes wrong in data files goes wrong below JSON.
`CANARY` stands in every bad row and must turn up in no message: errors never quote data.
"""

import ast
import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exo.data import DataError, Dataset, Group, read, read_jsonl, write_jsonl

pytestmark = pytest.mark.filterwarnings("error")  # a file left open warns

CANARY = "canary-7f3a"
GOOD = {"prompt": "p", "chosen": " a", "rejected": " b"}
SCORED = {"prompt": "p", "completions": [" a", " b", " c"], "rewards": [1, 0.5, -2]}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello",
    "rejected": "\n\nHuman: hi\n\nAssistant: go away",
}


def put(folder: Path, content: bytes | str | list, name: str = "data.jsonl") -> Path:
    """A file of these bytes, this text, or one JSON line for each of these rows."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert CANARY not in message
    return message


# The three shapes.


def test_preferences(tmp_path):
    data = read(put(tmp_path, [GOOD, {**GOOD, "prompt": "q", "id": 7}]))
    assert data.groups == [Group("p", (" a", " b"), None, 1), Group("q", (" a", " b"), None, 2)]
    assert data.format == "preferences (prompt/chosen/rejected)"
    assert (data.rows, data.skipped, data.noted) == (2, {}, {})


def test_scored_completions_may_differ_in_number(tmp_path):
    two = {"prompt": "q", "completions": ["x", "y"], "rewards": [3, 4]}
    data = read(put(tmp_path, [SCORED, two]))
    assert data.groups == [
        Group("p", (" a", " b", " c"), (1.0, 0.5, -2.0), 1),
        Group("q", ("x", "y"), (3.0, 4.0), 2),
    ]
    assert all(type(reward) is float for group in data.groups for reward in group.rewards)
    assert data.format == "completions with rewards (prompt/completions/rewards)"


def test_dialogues(tmp_path):
    data = read(put(tmp_path, [HH]))
    assert data.groups == [Group("\n\nHuman: hi\n\nAssistant:", (" hello", " go away"), None, 1)]
    assert data.format == "Anthropic HH dialogues (chosen/rejected)"


def test_two_shapes_in_one_row_are_not_guessed_between(tmp_path):
    assert "keys of two shapes" in refusal(put(tmp_path, [{**GOOD, **SCORED}]))


def test_unknown_shape_names_the_keys_found_and_the_shapes_read(tmp_path):
    message = refusal(put(tmp_path, [{"question": CANARY, "answer": CANARY}]))
    assert "data.jsonl:1: unknown shape" in message
    for word in ("'question'", "'answer'", "prompt/chosen/rejected", "completions/rewards", "HH"):
        assert word in message


def test_keys_in_messages_are_cut_short_and_stay_on_one_line(tmp_path):
    message = refusal(put(tmp_path, [{"k" * 500: 1, "a\nb": 2, **{str(i): i for i in range(90)}}]))
    assert len(message) < 500
    assert f"'{'k' * 40}...', 'a\\nb', '0'" in message and "84 more" in message


@pytest.mark.parametrize(
    ("first", "later", "reason"),
    [
        (GOOD, SCORED, "missing 'chosen', 'rejected'"),
        (SCORED, GOOD, "missing 'completions', 'rewards'"),
        (GOOD, HH, "missing 'prompt'"),
        (HH, GOOD, "another shape"),
    ],
)
def test_a_later_row_of_another_shape_is_malformed(tmp_path, first, later, reason):
    path = put(tmp_path, [first, later, first])
    message = refusal(path)
    assert message.startswith(f"{path}:2: {reason}; the file began as ")
    assert read(path, skip_invalid=True).skipped == {"malformed": 1}


def test_the_first_valid_row_sets_the_shape_not_the_first_row(tmp_path):
    wrong_type = {"prompt": "p", "completions": "x", "rewards": [1]}
    data = read(put(tmp_path, [wrong_type, GOOD]), skip_invalid=True)
    assert data.format.startswith("preferences") and data.skipped == {"malformed": 1}


def test_a_degenerate_row_is_valid_and_sets_the_shape(tmp_path):
    path = put(tmp_path, [{**GOOD, "rejected": ""}, SCORED, GOOD])
    assert refusal(path).startswith(f"{path}:2: missing")


# Dialogues: where they part, and what comes after.


def split(folder: Path, chosen: str, rejected: str) -> Dataset:
    return read(put(folder, [{"chosen": chosen, "rejected": rejected}, HH]))


H, A = "\n\nHuman:", "\n\nAssistant:"


def test_shared_turns_are_the_prompt_and_the_completions_keep_their_space(tmp_path):
    shared = f"{H} one{A} two\n\nin two paragraphs{H} three"
    group = split(tmp_path, f"{shared}{A} good\n\nend", f"{shared}{A}  bad").groups[0]
    assert group.prompt == shared + A
    assert group.completions == (" good\n\nend", "  bad")


@pytest.mark.parametrize(
    ("after_chosen", "after_rejected"),
    [
        (f"{H} more{A} and more", ""),
        ("", f"{H} trailing"),
        ("", H),
        (f"{A} second message", ""),  # five rows of the real test file do this
        (f"{H} same", f"{H} same"),
    ],
)
def test_later_turns_are_dropped_and_noted(tmp_path, after_chosen, after_rejected):
    shared = f"{H} one{A}"
    data = split(tmp_path, f"{shared} good{after_chosen}", f"{shared} bad{after_rejected}")
    assert data.groups[0].completions == (" good", " bad")
    assert data.noted == {"later turns dropped": 1}


def test_markers_quoted_inside_a_shared_turn_stay_in_the_prompt(tmp_path):
    shared = f"{H} continue this:{H} hey{A} ho{H} and now?"
    data = split(tmp_path, f"{shared}{A} yes", f"{shared}{A} no")
    assert data.groups[0] == Group(shared + A, (" yes", " no"), None, 1)
    assert data.noted == {}


def test_only_a_marker_after_a_blank_line_opens_a_turn(tmp_path):
    chosen = " I said Human: hello\nAssistant: and so on"
    data = split(tmp_path, f"{H} q{A}{chosen}", f"{H} q{A} no")
    assert data.groups[0].completions == (chosen, " no")


def test_text_before_the_first_turn_belongs_to_the_prompt(tmp_path):
    data = split(tmp_path, f"Be kind.{H} q{A} yes", f"Be kind.{H} q{A} no")
    assert data.groups[0].prompt == f"Be kind.{H} q{A}"


HUMAN_FIRST = "first difference not in an assistant turn"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{H} a{A} x", f"{H} b{A} x", HUMAN_FIRST),
        (f"{H} q{A} x{H} a{A} y", f"{H} q{A} x{H} b{A} y", HUMAN_FIRST),
        (f"{H} q{A} x{A} y", f"{H} q{A} x{H} y", HUMAN_FIRST),
        (f"Be kind.{H} q{A} x", f"Be rude.{H} q{A} y", HUMAN_FIRST),
        (f"{H} q{A} x", f"{H} q{A} x", "identical dialogues"),
        (f"{H} q{A} x", f"{H} q{A} x{H} more{A} y", "one dialogue continues the other"),
        (f"{H} q{A} ", f"{H} q{A} x", "empty completion"),
        (f"{H} q{A}{H} r{A} y", f"{H} q{A} x", "empty completion"),
    ],
)
def test_dialogues_without_two_answers_to_compare_are_skipped(tmp_path, chosen, rejected, reason):
    data = split(tmp_path, chosen, rejected)
    assert data.skipped == {reason: 1} and data.noted == {}
    assert [group.line for group in data.groups] == [2]


@pytest.mark.parametrize("text", ["just text", "", f"{H} a question alone", "Assistant: no break"])
def test_a_text_without_an_assistant_turn_is_no_dialogue(tmp_path, text):
    path = put(tmp_path, [{"chosen": HH["chosen"], "rejected": text}])
    assert refusal(path).startswith(f"{path}:1: rejected has no turn")


turn = st.tuples(st.sampled_from([H, A]), st.text("aA: \n", max_size=6))


@settings(max_examples=150, deadline=None)
@given(st.lists(turn, max_size=5), st.lists(turn, max_size=4), st.lists(turn, max_size=4))
@example([(H, " q")], [(A, " a\n"), (H, "")], [(A, " a")])
def test_prompt_and_completion_always_begin_the_dialogue(tmp_path_factory, shared, one, two):
    row = {
        key: "".join(marker + text for marker, text in [*shared, *rest, (A, f" {key}")])
        for key, rest in (("chosen", one), ("rejected", two))
    }
    folder = tmp_path_factory.mktemp("hh")
    data = read(put(folder, [row, HH]))
    if len(data.groups) == 2:
        group = data.groups[0]
        assert group.prompt.endswith(A)
        for text, completion in zip(row.values(), group.completions, strict=True):
            whole = group.prompt + completion
            assert text.startswith(whole)
            assert text == whole or text[len(whole) :].startswith((H, A))
            assert H not in completion and A not in completion


# Malformed rows: (what is wrong, the row as it lies in the file, words of the message).

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
    ("missing key", f'{{"prompt": "{CANARY}", "chosen": "a"}}', "unknown shape"),
    ("null for text", PREFERENCE % "null", "chosen must be a string, not null"),
    ("number for text", PREFERENCE % "17", "chosen must be a string, not a number"),
    ("boolean for text", PREFERENCE % "true", "chosen must be a string, not a boolean"),
    ("array for text", PREFERENCE % '["a"]', "chosen must be a string, not an array"),
    ("chat", PREFERENCE % CHAT, "string, not an array; chat messages are not read yet"),
    (
        "chat prompt",
        f'{{"prompt": {CHAT}, "chosen": "a", "rejected": "b"}}',
        "chat messages are not read yet",
    ),
    (
        "chat dialogues",
        f'{{"chosen": {CHAT}, "rejected": {CHAT}}}',
        "chosen must be a string, not an array; chat messages are not read yet",
    ),
    (
        "chat completions",
        f'{{"prompt": "p", "completions": [{CHAT}, {CHAT}], "rewards": [1, 2]}}',
        "completions[0] must be a string, not an array; chat messages are not read yet",
    ),
    ("too few rewards", REWARDS % "1", "2 completions but 1 rewards"),
    ("too many rewards", REWARDS % "1, 2, 3", "2 completions but 3 rewards"),
    ("no rewards", REWARDS % "", "2 completions but 0 rewards"),
    ("boolean reward", REWARDS % "1, true", "rewards[1] must be a number, not a boolean"),
    ("null reward", REWARDS % "null, 1", "rewards[0] must be a number, not null"),
    ("text reward", REWARDS % f'1, "{CANARY}"', "rewards[1] must be a number, not a string"),
    (
        "number among completions",
        '{"prompt": "p", "completions": ["a", 3], "rewards": [1, 2]}',
        "completions[1] must be a string, not a number",
    ),
    ("empty lists", '{"prompt": "p", "completions": [], "rewards": []}', "not empty"),
    ("text for list", f'{{"prompt": "p", "completions": "{CANARY}", "rewards": [1]}}', "arrays"),
    ("object for list", '{"prompt": "p", "completions": ["a"], "rewards": {}}', "arrays"),
]
# Cut apart by brackets and quotes, an array cannot survive a row whose own do not match.
CONTAINED = [case for case in BROKEN if case[0] != "cut off"]
CONTAINED.append(("escaped line break", f'{{"prompt": "{CANARY}\\\n"}}', "bad JSON: Invalid"))


def by_name(cases):
    return [pytest.param(row, words, id=name) for name, row, words in cases]


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(("row", "words"), by_name(BROKEN))
def test_a_malformed_line_is_named_and_costs_only_itself(tmp_path, row, words):
    # Alone at first, so that the complaint is about the row and not about its shape.
    path = put(tmp_path, raw(f"\n\n{row}\n"))
    message = refusal(path)
    assert message.startswith(f"{path}:3: ") and words in message
    path = put(tmp_path, raw(f"{json.dumps(GOOD)}\n{row}\n{json.dumps(GOOD)}\n"))
    assert refusal(path).startswith(f"{path}:2: ")
    data = read(path, skip_invalid=True)
    assert data.skipped == {"malformed": 1}
    assert [group.line for group in data.groups] == [1, 3]


@pytest.mark.parametrize(("row", "words"), by_name(CONTAINED))
def test_a_malformed_element_is_named_and_costs_only_itself(tmp_path, row, words):
    path = put(tmp_path, raw(f"[\n\n{row}\n]"), "data.json")
    message = refusal(path)
    assert message.startswith(f"{path}:3: row 1: ") and words in message
    path = put(tmp_path, raw(f"[{json.dumps(GOOD)},\n {row},\n{json.dumps(GOOD)}]"), "data.json")
    assert refusal(path).startswith(f"{path}:2: row 2: ")
    data = read(path, skip_invalid=True)
    assert data.skipped == {"malformed": 1}
    assert [group.line for group in data.groups] == [1, 3]


def test_a_cut_off_last_line_is_named(tmp_path):
    text = json.dumps(GOOD)
    path = put(tmp_path, f"{text}\n{text[:-5]}")
    assert refusal(path).startswith(f"{path}:2: bad JSON")


def test_an_array_below_the_first_row_is_a_malformed_line(tmp_path):
    path = put(tmp_path, [GOOD, [1], GOOD])
    assert refusal(path) == f"{path}:2: a row must be an object, not an array"
    assert [group.line for group in read(path, skip_invalid=True).groups] == [1, 3]


def test_surrogate_pairs_nul_escapes_and_line_separators_are_text(tmp_path):
    row = '{"prompt": "\\ud83d\\ude00 \\u0000 \\\\ud83d", "chosen": "a\u2028b\x85", "rejected": "b"}'
    group = read(put(tmp_path, f"{row}\n{row}\n")).groups[1]
    assert group == Group("\U0001f600 \0 \\ud83d", ("a\u2028b\x85", "b"), None, 2)


# Degenerate rows: not the file's fault, and never an error.


def scored(*completions: str, rewards: list | None = None) -> dict:
    values = list(range(len(completions))) if rewards is None else rewards
    return {"prompt": "p", "completions": list(completions), "rewards": values}


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
    assert [group.line for group in data.groups] == [2]


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
def test_rows_worth_a_remark_are_used_and_noted(tmp_path, row, notes):
    data = read(put(tmp_path, [row, SCORED]))
    assert data.noted == dict.fromkeys(notes, 1)
    assert len(data.groups) == 2 and data.skipped == {}


def test_identical_preferences_are_skipped_and_have_no_reward_remark(tmp_path):
    data = read(put(tmp_path, [{**GOOD, "rejected": " a"}, GOOD]))
    assert data.skipped == {"identical completions": 1} and data.noted == {}


# Files: containers, ends and accidents.


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
def test_containers_are_told_by_content_not_by_name(tmp_path, content, packed):
    row = json.dumps({**GOOD, "meta": {"tags": ["a,]", '"}'], "none": []}}).encode()
    content = content % (row, row)
    path = put(tmp_path, gzip.compress(content) if packed else content, "data.txt")
    data = read(path)
    assert [(g.prompt, g.completions) for g in data.groups] == [("p", (" a", " b"))] * 2
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.path == str(path) and data.rows == 2


def test_the_numbers_of_lines_and_array_rows(tmp_path):
    row = json.dumps(GOOD)
    lines = read(put(tmp_path, f"{row}\n\n{row}\n"))
    assert [group.line for group in lines.groups] == [1, 3]
    array = read(put(tmp_path, f"[{row},\n\n{row}]"))
    assert [group.line for group in array.groups] == [1, 2]


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
    assert lines.groups == array.groups and len(array.groups) == len(rows)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([json.dumps(GOOD), *'[]{}",:\\\n\t\0 1']) | st.binary(max_size=4)))
@example([b"\x1f\x8b"])
@example(["[", "[", "]"])
@example(["[", "]", "]"])
def test_no_bytes_bring_out_another_error(tmp_path_factory, pieces):
    content = b"".join(p if isinstance(p, bytes) else p.encode() for p in pieces)
    path = put(tmp_path_factory.mktemp("bytes"), content)
    for skip_invalid in (False, True):
        try:
            data = read(path, skip_invalid=skip_invalid)
        except DataError as error:
            assert str(error).startswith(f"{path}:") and len(str(error).splitlines()) == 1
        else:
            assert data.rows == len(data.groups) + sum(data.skipped.values())


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
def test_an_array_damaged_beyond_its_rows_is_refused_in_any_case(tmp_path, text, place, reason):
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
    # Tried again from every escaped quote, this would take hours.
    assert "never closed" in refusal(put(tmp_path, b'["' + b'\\"' * 1_000_000))


@pytest.mark.parametrize("keep", [-1, -6, 0.5], ids=["a byte", "checksum", "half"])
def test_cut_off_gzip_is_refused_in_any_case(tmp_path, keep):
    rows = [{**GOOD, "prompt": hashlib.sha256(bytes([i])).hexdigest()} for i in range(200)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    cut = packed[: keep if isinstance(keep, int) else int(len(packed) * keep)]
    path = put(tmp_path, cut, "data.jsonl.gz")
    for skip_invalid in (False, True):
        assert "cut off or damaged" in refusal(path, skip_invalid=skip_invalid)


# 10 is the first byte of the stream: with these two bits set, a kind of block that does not exist.
@pytest.mark.parametrize(("at", "bits"), [(10, 0x06), (-8, 0xFF)], ids=["stream", "checksum"])
@pytest.mark.parametrize("text", ["%s", "[%s]"], ids=["lines", "array"])
def test_damaged_gzip_is_refused(tmp_path, text, at, bits):
    packed = bytearray(gzip.compress((text % json.dumps(GOOD)).encode()))
    packed[at] = packed[at] | bits if at == 10 else packed[at] ^ bits
    path = put(tmp_path, bytes(packed))
    assert refusal(path, skip_invalid=True) == f"{path}:1: the gzip data is cut off or damaged"


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b" [ ]\n", gzip.compress(b"")],
)
def test_a_file_without_rows_is_refused(tmp_path, content):
    assert refusal(put(tmp_path, content)).endswith("data.jsonl: the file holds no rows")


def test_a_file_without_a_usable_row_is_refused_with_the_account(tmp_path):
    path = put(tmp_path, [{**GOOD, "chosen": ""}, {**GOOD, "chosen": " b"}, {}, 1])
    account = "no usable row: 4 rows = 0 used + 4 skipped (empty completion: 1, identical completions: 1, malformed: 2)"
    message = refusal(path, skip_invalid=True)
    assert message.startswith(f"{path}: {account}; first malformed: {path}:3: missing 'prompt'")


def test_what_is_not_a_data_file_is_refused_with_what_would_be(tmp_path):
    parquet = put(tmp_path, b"PAR1\x15\x04\x15", "data.parquet")
    cases = {
        parquet: "parquet is not read yet",
        tmp_path: "not a regular file",
        tmp_path / "missing.jsonl": "no such file",
        Path("Anthropic/hh-rlhf"): "no such file (hub names are not read yet)",
        Path("nul\0byte"): "no such file",
    }
    for path, reason in cases.items():
        message = refusal(path)
        assert reason in message and "accepted: a local .jsonl file, a .json array" in message
    assert "too long" in refusal(tmp_path / ("n" * 5000))


def test_a_path_with_a_line_break_stays_on_one_line(tmp_path):
    path = tmp_path / "two\nlines"
    assert r"two\nlines" in refusal(path)


# What is handed back.


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
        Dataset([], "x", 2, {"malformed": 1}, {}, "", "x")


def test_jsonl_survives_the_round_trip(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "é\u2028\n\0😀", "token_ids": [[1, 2], []]}, {}, {"x": None, "y": -0.1}]
    assert write_jsonl(path, iter(rows)) == 3
    assert list(read_jsonl(path)) == list(enumerate(rows, 1))
    text = path.read_bytes()
    assert text.count(b"\n") == 3 and b"\r" not in text and "é".encode() in text


def test_nothing_that_the_reader_refuses_is_written(tmp_path):
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


def test_only_the_standard_library_is_imported():
    source = Path(sys.modules["exo.data"].__file__).read_text(encoding="utf-8")
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert imported and imported <= sys.stdlib_module_names


# Real files. Their counts were taken with other code than the reader's.


@pytest.fixture
def shared() -> Path:
    folder = os.environ.get("EXO_SHARED_DATA")
    if not folder:
        pytest.skip("EXO_SHARED_DATA does not name the folder of real data files")
    return Path(folder)


def test_every_row_of_the_real_dialogues_is_accounted_for(shared):
    path = shared / "hh_harmless_base_test.jsonl.gz"
    data = read(path)
    assert data.rows == 2312 and len(data.groups) == 2308
    assert data.skipped == {"empty completion": 4}
    assert data.noted == {"later turns dropped": 5}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = dict(enumerate(map(json.loads, file), 1))
    # In these four the chosen answer is empty, in those five an answer comes in two messages.
    assert rows.keys() - {group.line for group in data.groups} == {87, 517, 926, 1104}
    dropped = set()
    for group in data.groups:
        assert group.prompt.startswith(H) and group.prompt.endswith(A)
        for key, completion in zip(("chosen", "rejected"), group.completions, strict=True):
            assert completion.startswith(" ") and H not in completion and A not in completion
            before, after, rest = rows[group.line][key].partition(group.prompt + completion)
            assert before == "" and after
            if rest:
                dropped.add(group.line)
                assert rest.startswith(A)
    assert dropped == {1255, 1689, 1951, 1953, 2037}


def test_a_real_dialogue_is_split_where_a_reader_would(shared):
    groups = {group.line: group for group in read(shared / "hh_harmless_base_test.jsonl.gz").groups}
    assert groups[537].prompt == (
        f"{H} What was the best thing about Jim Crow laws in the U.S. south?"
        f"{A} I think they made it easier for racist people to say or do racist things."
        f"{H} What are some racist things you've said?{A}"
    )
    assert groups[537].completions == (
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
    counts = [len(group.completions) for group in data.groups]
    assert {size: counts.count(size) for size in set(counts)} == sizes
    assert [(g.line, list(g.completions), list(g.rewards)) for g in data.groups] == [
        (line, row["completions"], row["rewards"]) for line, row in read_jsonl(shared / name)
    ]


def test_real_text_that_is_not_utf8_names_the_line(shared):
    path = shared / "rt_polarity.pos"
    assert refusal(path).startswith(f"{path}:1: bad JSON")
    assert "no usable row: 5331 rows" in refusal(path, skip_invalid=True)
