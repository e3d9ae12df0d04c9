"""Chat messages and the formats of other trainers: which columns are read, and which rows are refused."""

import json

import pytest
from data_files import CANARY, GOOD, put, refusal

from exo.data import Chat, Example, Message, read, read_jsonl, write_jsonl

pytestmark = pytest.mark.filterwarnings("error")  # a file left open warns

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "p"}
GOOD_ANSWER = {"role": "assistant", "content": " a"}
BAD_ANSWER = {"role": "assistant", "content": " b"}
MORE = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "c"}]
HUMAN, GPT, GPT_BAD = ({"from": role, "value": text} for role, text in (("human", "p"), ("gpt", " a"), ("gpt", " b")))

USER = (Message("user", "p"),)
BOTH = (Message("system", "Be kind."), *USER)


def read_one(folder, row, **options) -> Example:
    """Read a file of one row, which must become one chat."""
    data = read(put(folder, [row]), **options)
    [example] = data.examples
    assert isinstance(example.prompt, Chat) and data.format.endswith(", chat messages")
    return example


# Messages in every column.

COMPARED = {
    "prompt": {"prompt": [ASK], "chosen": " a", "rejected": " b"},
    "prompt alone, not in a list": {"prompt": ASK, "chosen": " a", "rejected": " b"},
    "answers": {"prompt": "p", "chosen": [GOOD_ANSWER], "rejected": [BAD_ANSWER]},
    "answers, not in lists": {"prompt": "p", "chosen": GOOD_ANSWER, "rejected": BAD_ANSWER},
    "one answer": {"prompt": "p", "chosen": " a", "rejected": BAD_ANSWER},
    "all": {"prompt": [ASK], "chosen": [GOOD_ANSWER], "rejected": [BAD_ANSWER]},
    "whole": {"chosen": [ASK, GOOD_ANSWER], "rejected": [ASK, BAD_ANSWER]},
    "whole, with the prompt": {"prompt": "p", "chosen": [ASK, GOOD_ANSWER], "rejected": [ASK, BAD_ANSWER]},
    "whole, with the prompt's message": {"prompt": [ASK], "chosen": [ASK, GOOD_ANSWER], "rejected": [ASK, BAD_ANSWER]},
    "ShareGPT's names": {"prompt": [HUMAN], "chosen": [GPT], "rejected": [GPT_BAD]},
    "ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_BAD},
    "other keys": {"prompt": [{**ASK, "name": None, "tool_calls": None, "id": 3}], "chosen": " a", "rejected": " b"},
}


@pytest.mark.parametrize("row", COMPARED.values(), ids=COMPARED)
def test_messages_are_read_in_every_column(tmp_path, row):
    example = read_one(tmp_path, row)
    assert example.prompt.messages == USER and example.completions == (" a", " b") and example.rewards is None


def test_messages_among_completions_with_rewards_and_samples(tmp_path):
    completions = [[GOOD_ANSWER], BAD_ANSWER, " c"]
    row = {"prompt": [SYSTEM, ASK], "completions": completions, "rewards": [1, 2, 3]}
    example = read_one(tmp_path, row)
    assert example.prompt.messages == BOTH
    assert (example.completions, example.rewards) == ((" a", " b", " c"), (1.0, 2.0, 3.0))
    assert read_one(tmp_path, row, purpose="samples").completions == (" a", " b", " c")


TALK = [SYSTEM, ASK, GOOD_ANSWER, *MORE]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": [*TALK, ASK]},
        {"conversations": TALK},
        {"prompt": "p", "messages": TALK},
        {"prompt": TALK[:-1], "completion": "c"},
        {"prompt": TALK[:-1], "completion": [TALK[-1]]},
        {"prompt": "and?", "chosen": TALK},
        {"prompt": "and?", "chosen": TALK, "rejected": [*TALK[:-1], BAD_ANSWER]},
    ],
    ids=lambda row: "/".join(row),
)
def test_sft_learns_the_last_answer(tmp_path, row):
    example = read_one(tmp_path, row, purpose="texts")
    assert example.completions == ("c",)
    assert example.prompt.messages == (*BOTH, Message("assistant", " a"), Message("user", "and?"))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": [SYSTEM, ASK]}, BOTH),
        ({"messages": [SYSTEM, ASK]}, BOTH),
        ({"messages": [SYSTEM, ASK, GOOD_ANSWER]}, BOTH),
        ({"prompt": "p", "messages": [ASK, GOOD_ANSWER]}, USER),
        ({"prompt": "p", "completion": GOOD_ANSWER}, USER),
        ({"prompt": "p", "chosen": [ASK, GOOD_ANSWER], "rejected": [ASK, BAD_ANSWER]}, USER),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_BAD}, USER),
    ],
)
def test_prompts_of_messages(tmp_path, row, messages):
    assert read_one(tmp_path, row, purpose="prompts").prompt.messages == messages


@pytest.mark.parametrize(
    ("row", "purpose", "reason"),
    [
        ({"messages": [ASK]}, "texts", "no message of the assistant"),
        ({"messages": [GOOD_ANSWER]}, "texts", "nothing before the answer"),
        ({"messages": [ASK, {**GOOD_ANSWER, "content": " "}]}, "texts", "empty text"),
        ({"messages": [GOOD_ANSWER]}, "prompts", "nothing to answer"),
    ],
)
def test_unusable_conversations_are_skipped(tmp_path, row, purpose, reason):
    data = read(put(tmp_path, [row, {"messages": TALK}]), purpose=purpose)
    assert data.skipped == {reason: 1} and len(data.examples) == 1


def test_turns_after_the_answer_are_dropped_and_noted(tmp_path):
    rows = [{"prompt": "p", "chosen": [GOOD_ANSWER, *MORE], "rejected": [BAD_ANSWER]}]
    assert read(put(tmp_path, rows)).noted == {"later turns dropped": 1}
    rows = [{"messages": [*TALK, ASK]}, {"messages": TALK}]
    assert read(put(tmp_path, rows), purpose="texts").noted == {"later turns dropped": 1}


TEXT = f'"{CANARY}"'
BROKEN = [
    ('[{"role": "user"}]', "prompt[0]: a chat message without 'content'"),
    ('[{"from": "human", "content": "x"}]', "prompt[0]: a chat message without 'value'"),
    (f'[{{"role": "user", "content": ["{CANARY}"]}}]', "prompt[0].content must be a string or parts of type text"),
    ('[{"role": "user", "content": null}]', "prompt[0].content must be a string, not null"),
    (f'[{{"role": {TEXT}, "content": "x"}}]', "prompt[0].role must be one of system, developer, user, assistant"),
    (f'[{{"from": {TEXT}, "value": "x"}}]', "prompt[0].from must be one of human, gpt, system"),
    ('[{"role": "human", "content": "x"}]', "prompt[0].role must be one of"),
    (f'[{{"role": "user", "content": "x"}}, {TEXT}]', "prompt[1] must be a chat message, not a string"),
    ('[{"role": "user", "content": "x", "tool_calls": [1]}]', "prompt[0].tool_calls must be an array of objects"),
    (f'[{{"role": "assistant", "content": {TEXT}}}]', "the prompt ends with a message of the assistant"),
    ("[]", "prompt must be a string, not an array"),
]


@pytest.mark.parametrize(("prompt", "words"), BROKEN)
def test_malformed_messages_are_named(tmp_path, prompt, words):
    path = put(tmp_path, f'{{"prompt": {prompt}, "chosen": "a", "rejected": "b"}}\n{json.dumps(COMPARED["all"])}\n')
    message = refusal(path)
    assert message.startswith(f"{path}:1: ") and words in message
    assert read(path, skip_invalid=True).skipped == {"malformed": 1}


def test_a_prompt_that_is_not_in_the_conversations_is_malformed(tmp_path):
    row = {"prompt": CANARY, "chosen": [ASK, GOOD_ANSWER], "rejected": [ASK, BAD_ANSWER]}
    assert "prompt is not part of the conversation before the answer" in refusal(put(tmp_path, [row]))
    row["prompt"] = [SYSTEM, ASK]
    assert "prompt is not part of the conversation" in refusal(put(tmp_path, [row]))


@pytest.mark.parametrize("rows", [(GOOD, COMPARED["all"]), (COMPARED["all"], GOOD)])
def test_texts_and_messages_in_one_file_are_not_mixed(tmp_path, rows):
    path = put(tmp_path, list(rows))
    assert refusal(path).startswith(f"{path}:2: ") and "and the file began with" in refusal(path)
    assert read(path, skip_invalid=True).skipped == {"malformed": 1}


# The prompt as an object.


def test_a_chat_equals_its_transcript_and_survives_writing(tmp_path):
    chat = Chat(BOTH)
    assert chat == "system: Be kind.\n\nuser: p" and isinstance(chat, str)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": chat, "completions": ["x"], "rewards": [1]}])
    [(_, row)] = read_jsonl(tmp_path / "rows.jsonl")
    assert row["prompt"] == [SYSTEM, ASK]
    assert read_one(tmp_path, row, purpose="samples").prompt.messages == BOTH


# Formats of other trainers.


@pytest.mark.parametrize("key", ["instruction", "prompt"])
def test_ultrafeedback(tmp_path, key):
    items = [{"response": text, "overall_score": score, "model": "m"} for text, score in (("a", 8.5), ("b", 3))]
    data = read(put(tmp_path, [{key: "p", "completions": items, "source": "s"}]))
    assert data.examples == [Example("p", ("a", "b"), (8.5, 3.0), 1)]
    assert data.format == f"UltraFeedback completions with scores ({key}/completions)"
    assert read(put(tmp_path, [{key: "p", "completions": items}]), purpose="prompts").examples[0].prompt == "p"
    items[1]["overall_score"] = None
    assert "completions[1].overall_score must be a number, not null" in refusal(
        put(tmp_path, [{key: CANARY, "completions": items}])
    )
    del items[1]["overall_score"]
    assert "completions[1] must be an object with 'response', 'overall_score'" in refusal(
        put(tmp_path, [{key: CANARY, "completions": items}])
    )


def test_nectar_the_best_rank_has_the_highest_reward(tmp_path):
    answers = [{"answer": text, "rank": rank} for text, rank in (("a", 2.0), ("b", 1), ("c", 7))]
    data = read(put(tmp_path, [{"prompt": "p", "answers": answers}]))
    assert data.examples == [Example("p", ("a", "b", "c"), (-2.0, -1.0, -7.0), 1)]
    assert "answers must be an array, and not empty" in refusal(put(tmp_path, [{"prompt": "p", "answers": []}]))
