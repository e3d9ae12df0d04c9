"""Chat messages: every key that a template reads is preserved, and the roles and contents of other tools are read."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from data_files import CANARY, put, refusal

from exo.data import Chat, Message, Reply, read, read_jsonl, write_jsonl

pytestmark = pytest.mark.filterwarnings("error")

ASK = {"role": "user", "content": "p"}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_reasoning_and_calls_make_a_reply_in_every_column(tmp_path):
    good, bad = answer("good", reasoning_content="good thinking"), answer(None, tool_calls=CALLS)
    formats = [
        {"prompt": "p", "chosen": good, "rejected": bad},
        {"chosen": [ASK, good], "rejected": [ASK, bad]},
        {"conversations": [ASK], "chosen": good, "rejected": [bad]},
        {"prompt": "p", "completions": [good, [bad]], "rewards": [2, 1]},
    ]
    for row in formats:
        [example] = read(put(tmp_path, [row])).examples
        assert [type(text) for text in example.completions] == [Reply, Reply]
        assert [text.message for text in example.completions] == [good, bad]
    for row in ({"messages": [ASK, good]}, {"prompt": "p", "completion": good}, formats[0]):
        [example] = read(put(tmp_path, [row]), purpose="texts").examples
        assert example.completions[0].message == good


def test_answers_that_differ_in_one_key_are_not_identical(tmp_path):
    for key, values in {"reasoning_content": ("a", "b"), "tool_calls": (CALLS, CALLS * 2), "name": ("x", "y")}.items():
        good, bad = (answer("same", **{key: value}) for value in values)
        data = read(put(tmp_path, [{"prompt": "p", "chosen": good, "rejected": bad}]))
        assert len(data.examples) == 1, key
        conversations = {"chosen": [ASK, good], "rejected": [ASK, bad]}
        assert len(read(put(tmp_path, [conversations])).examples) == 1, key


def test_a_plain_answer_stays_a_plain_text(tmp_path):
    extra = {"id": "x", "timestamp": 3, "model": "m", "weight": 1, "tool_calls": None, "name": "", "reasoning": None}
    row = {"prompt": "p", "chosen": answer("a", **extra), "rejected": answer("b", tool_calls=[])}
    assert [type(text) for text in read(put(tmp_path, [row])).examples[0].completions] == [str, str]


def test_every_key_of_the_prompts_messages_is_preserved(tmp_path):
    turns = [
        ASK, answer(None, tool_calls=CALLS), {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
    ]  # fmt: skip
    [example] = read(put(tmp_path, [{"prompt": turns, "chosen": "a", "rejected": "b"}])).examples
    assert list(example.prompt.messages) == turns
    write_jsonl(tmp_path / "out.jsonl", [{"prompt": example.prompt, "completions": list(example.completions)}])
    [(_, row)] = read_jsonl(tmp_path / "out.jsonl")
    assert row["prompt"] == turns


def test_sharegpt_with_calls_and_observations(tmp_path):
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [("system", "s"), ("human", "p"), ("function_call", json.dumps(call)), ("observation", "3"), ("gpt", "a")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "tools": json.dumps(CALLS)}
    [example] = read(put(tmp_path, [row]), purpose="texts").examples
    assert [m.role for m in example.prompt.messages] == ["system", "user", "assistant", "tool"]
    assert example.prompt.messages[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert list(example.prompt.tools) == CALLS and example.completions == ("a",)
    row["conversations"][2]["value"] = f"add({CANARY})"
    assert "value of a function_call must be JSON" in refusal(put(tmp_path, [row]), purpose="texts")


def test_parts_of_text_are_joined_and_other_parts_are_refused(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": answer(parts), "rejected": "c"}
    [example] = read(put(tmp_path, [row])).examples
    assert example.prompt.messages == (Message("user", "a b"),) and example.completions == ("a b", "c")
    for part in ({"type": "image_url", "image_url": CANARY}, {"type": "image"}, {"text": CANARY}):
        row["prompt"][0]["content"] = [*parts, part]
        assert "prompt[0].content[2] is of type" in refusal(put(tmp_path, [row]))


def test_an_answer_without_content_needs_calls_or_reasoning(tmp_path):
    for message in (answer(None), {"role": "assistant"}, answer(None, name="x")):
        row = {"prompt": "p", "chosen": message, "rejected": "b"}
        assert "chosen" in refusal(put(tmp_path, [row]))


def test_the_last_answer_with_a_weight_is_learned(tmp_path):
    first, last = answer("a", weight=1), answer("c", weight=0)
    rows = [{"messages": [ASK, first, ASK, last]}]
    data = read(put(tmp_path, rows), purpose="texts")
    assert data.examples[0].completions == ("a",) and data.noted == {"later turns dropped": 1}
    for flag in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": 0}):
        rows = [{"messages": [ASK, answer("a", **flag)]}, {"messages": [ASK, answer("b")]}]
        data = read(put(tmp_path, rows), purpose="texts")
        assert data.skipped == {"no message of the assistant with a weight": 1}
        assert "has weight 0" in refusal(
            put(tmp_path, [{"prompt": "p", "chosen": answer("a", **flag), "rejected": "b"}])
        )
        context = {"prompt": [ASK, answer("x", **flag), ASK], "chosen": "a", "rejected": "b"}
        assert read(put(tmp_path, [context])).examples[0].prompt.messages[1] == answer("x")
    rows = [{"prompt": "p", "completion": answer("a", weight=0)}, {"prompt": "p", "completion": answer("a")}]
    data = read(put(tmp_path, rows), purpose="texts")
    assert data.skipped == {"no message of the assistant with a weight": 1}
    assert "weight must be 0 or 1" in refusal(
        put(tmp_path, [{"messages": [ASK, answer("a", weight=0.5)]}]), purpose="texts"
    )


def test_messages_written_as_json_are_parsed_and_other_brackets_are_text(tmp_path):
    chat = [ASK]
    for text in (json.dumps(chat), json.dumps(chat, indent=1), f"\n {json.dumps([{'from': 'human', 'value': 'p'}])}"):
        row = {"prompt": text, "chosen": json.dumps([answer("a")]), "rejected": "b"}
        [example] = read(put(tmp_path, [row])).examples
        assert example.prompt.messages == (ASK,) and example.completions == ("a", "b")
    conversations = {key: json.dumps([ASK, answer(key)]) for key in ("chosen", "rejected")}
    assert isinstance(read(put(tmp_path, [conversations])).examples[0].prompt, Chat)
    for text in ("[1, 2]", '[{"a": 1}]', "[not json", '[{"role": "user", "content": "cut off'):
        assert read(put(tmp_path, [{"prompt": text, "chosen": "a", "rejected": "b"}])).examples[0].prompt == text
    row = {"prompt": f"[{{'role': 'user', 'content': '{CANARY}'}}]", "chosen": "a", "rejected": "b"}
    assert "prompt holds messages as Python writes them" in refusal(put(tmp_path, [row]))


def test_unknown_keys_of_messages_are_harmless(tmp_path):
    odd = {"self": 1, "from_": 2, "others": 3}
    row = {"prompt": [{**ASK, **odd}], "chosen": "a", "rejected": "b"}
    assert read(put(tmp_path, [row])).examples[0].prompt.messages[0] == {**ASK, **odd}
    both = {"from": "human", "value": "p", "role": "user", "content": "q"}
    assert read(put(tmp_path, [{**row, "prompt": [both]}])).examples[0].prompt.messages[0] == ASK


def test_calls_in_a_table_get_no_null_arguments(tmp_path):
    other = [{"type": "function", "function": {"name": "cut", "arguments": {"b": 2}}}]
    rows = [{"messages": [ASK, answer(None, tool_calls=calls)]} for calls in (CALLS, other)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "calls.parquet")
    examples = read(tmp_path / "calls.parquet", purpose="texts").examples
    assert [example.completions[0].message["tool_calls"] for example in examples] == [CALLS, other]
