"""Public data sets by their documented columns: the table of docs/data.md, checked on rows made for these tests."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_files import put
from data_sets import ASK, BAD, GOOD, ROWS

from exo.cli.options import DataOptions
from exo.cli.parse import parse
from exo.data import Chat, DataError, read

TABLE = Path(__file__).parents[2] / "docs" / "data.md"
STAGES = {"align": "comparisons", "sft": "texts", "reward": "comparisons"}
FLAGS = re.compile("`(--.*)`")


def table() -> dict[str, dict[str, str]]:
    text = TABLE.read_text(encoding="utf-8").partition("## Public data sets")[2]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0].rstrip("*"): dict(zip(names[1:], row[1:], strict=True)) for row in rows}


def options(cell: str) -> dict:
    """Return the options that a stage passes to the reader for these flags."""

    @dataclass(frozen=True)
    class Config(DataOptions):
        pass

    parsed = parse(Config, shlex.split(cell), prog="test", description=None)
    return parsed.reading()


def test_the_table_names_the_data_sets_and_columns_that_are_tested():
    documented = table()
    assert documented.keys() == ROWS.keys() and len(documented) >= 40
    for name, row in documented.items():
        columns = list(dict.fromkeys(column for item in ROWS[name] for column in item))
        assert row["columns"].split(", ") == columns, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_data_set_trains_as_the_table_says(tmp_path, stage):
    for name, row in table().items():
        path, cell = put(tmp_path, ROWS[name]), row[stage]
        if cell == "`--labels`":
            assert [example.label for example in read(path, purpose="labels").examples] == [0, 1, 0]
            continue
        if cell == "-":
            with pytest.raises(DataError):
                read(path, purpose=STAGES[stage])
            continue
        flags = FLAGS.fullmatch(cell)
        assert flags or cell == "yes", (name, cell)
        if flags:  # the flags are needed
            with pytest.raises(DataError) as caught:
                read(path, purpose=STAGES[stage])
            assert flags[1].split()[0] in str(caught.value), name
        data = read(path, purpose=STAGES[stage], **options(flags[1] if flags else ""))
        assert len(data.examples) == 3, name
        for i, example in enumerate(data.examples):
            check(name, i, example, data.conversational)


def check(name: str, i: int, example, conversational: bool) -> None:
    """Check that the question is in the prompt, and that the better answer is the preferred one."""
    if name == "stanfordnlp/imdb":
        assert example.completions == (f"{ASK[i]} {GOOD[i]}",) and example.prompt == ""
        return
    assert ASK[i] in example.prompt, name
    good, bad = [text.strip() for text in (GOOD[i], BAD[i])]
    texts = [text.strip() for text in example.completions]
    if len(texts) == 1:
        assert texts == [good], name
    elif example.rewards is None:
        assert texts == [good, bad], name
    else:
        assert set(texts) == {good, bad}, name
        assert example.rewards[texts.index(good)] > example.rewards[texts.index(bad)], name
    assert not (conversational and isinstance(example.prompt, Chat))
    assert "<extra_id" not in example.prompt and ("Human:" not in example.prompt or not conversational), name


CONVERSATIONAL = {
    "openbmb/UltraFeedback": True,
    "berkeley-nest/Nectar": True,
    "argilla/ultrafeedback-binarized-preferences": True,
    "stanfordnlp/SHP": True,
    "PKU-Alignment/PKU-SafeRLHF": True,
    "openai/webgpt_comparisons": True,
    "lvwerra/stack-exchange-paired": True,
    "nvidia/HelpSteer2, preference": True,
    "tatsu-lab/alpaca": True,
    "openai/gsm8k": True,
    "Anthropic/hh-rlhf": False,
    "openai/summarize_from_feedback, comparisons": False,
    "trl-lib/tldr": False,
    "trl-lib/tldr-preference": False,
    "allenai/reward-bench": False,
    "TRL, implicit prompt": False,
    "stanfordnlp/imdb": False,
}


def test_only_questions_of_chat_data_sets_are_conversational(tmp_path):
    for name, expected in CONVERSATIONAL.items():
        purpose = "comparisons" if table()[name]["align"] != "-" else "texts"
        assert read(put(tmp_path, ROWS[name]), purpose=purpose).conversational is expected, name


def test_a_system_prompt_in_one_row_makes_every_row_a_chat(tmp_path):
    examples = read(put(tmp_path, ROWS["Intel/orca_dpo_pairs"])).examples
    assert [len(example.prompt.messages) for example in examples] == [2, 1, 2]
    assert examples[0].prompt.messages == (
        {"role": "system", "content": "You are a patient teacher."},
        {"role": "user", "content": ASK[0]},
    )
    without = [{**row, "system": ""} for row in ROWS["Intel/orca_dpo_pairs"]]
    data = read(put(tmp_path, without))
    assert data.conversational and data.examples[0].prompt == ASK[0]


def test_an_input_follows_its_instruction(tmp_path):
    examples = read(put(tmp_path, ROWS["tatsu-lab/alpaca"]), purpose="texts").examples
    assert [example.prompt for example in examples] == [ASK[0], f"{ASK[1]}\nTake it slow.", ASK[2]]


def test_transcripts_in_prompts_become_messages(tmp_path):
    last = read(put(tmp_path, ROWS["nvidia/HelpSteer2"])).examples[2]
    assert [(m.role, m.content) for m in last.prompt.messages] == [
        ("user", "Hello there!"), ("assistant", "Hello, how are you?"), ("user", ASK[2]),
    ]  # fmt: skip
    row = ROWS["berkeley-nest/Nectar"][0]
    talk = "\n\nHuman: Hi!\n\nAssistant: Hello!\n\nHuman: And now?\n\nAssistant: "
    examples = read(put(tmp_path, [row, {**row, "prompt": talk}])).examples
    assert [len(example.prompt.messages) for example in examples] == [1, 3]


def test_ties_are_skipped_and_counted(tmp_path):
    for name, change in {
        "openai/webgpt_comparisons": {"score_0": 0, "score_1": 0},
        "nvidia/HelpSteer2, preference": {"preference_strength": 0},
        "nvidia/HelpSteer3": {"overall_preference": 0},
        "lmsys/chatbot_arena_conversations": {"winner": "tie (bothbad)"},
    }.items():
        rows = ROWS[name]
        data = read(put(tmp_path, [{**rows[0], **change}, *rows[1:]]))
        assert data.skipped == {"tie": 1} and len(data.examples) == 2, name


def test_a_flag_selects_the_safer_response_of_saferlhf(tmp_path):
    path = put(tmp_path, ROWS["PKU-Alignment/PKU-SafeRLHF"])
    safer = read(path, **options("--columns better_response_id=safer_response_id"))
    assert safer.examples[0].completions == (BAD[0], GOOD[0])


def test_messages_without_a_parent_are_refused_and_deleted_ones_are_skipped(tmp_path):
    rows = ROWS["OpenAssistant/oasst1, oasst2"]
    with pytest.raises(DataError, match="parent_id names no message"):
        read(put(tmp_path, rows[1:]))
    deleted = [{**row, "deleted": row["message_id"] == "b0"} for row in rows]
    assert len(read(put(tmp_path, deleted)).examples) == 2
    texts = read(put(tmp_path, deleted), purpose="texts").examples
    assert [example.completions for example in texts] == [(text,) for text in GOOD]


def oasst(name: str, parent: str | None, text: str, rank: int | None = None, **columns) -> dict:
    role = "prompter" if name[0] == "q" else "assistant"
    row = {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, **columns}
    return row | {"message_tree_id": "q0"}


def nine_messages() -> list[dict]:
    """Return the messages of a tree, among them ranked, unranked, deleted and refused replies and a second question."""
    return [
        oasst("q0", None, "first?"), oasst("a0", "q0", "good", 0), oasst("a1", "q0", "bad", 1),
        oasst("a2", "q0", "unranked"), oasst("a3", "q0", "deleted", 2, deleted=True), oasst("q1", "a3", "below?"),
        oasst("q2", "a0", "second?"), oasst("a4", "q2", "alone", 0),
        oasst("a5", "q2", "refused", 1, review_result=False),
    ]  # fmt: skip


def nested(rows: list[dict]) -> list[dict]:
    """Return the same messages as one nested tree."""
    nodes = {row["message_id"]: {**row, "replies": []} for row in rows}
    for node in nodes.values():
        if node["parent_id"]:
            nodes[node["parent_id"]]["replies"].append(node)
    return [{"message_tree_id": "q0", "prompt": nodes["q0"]}]


GONE = {"deleted message": 1, "below a message that is not used": 1, "message that failed its review": 1}
COUNTS = {  # purpose: number of examples, number of used rows, and why the other rows are skipped
    "comparisons": (1, 3, {**GONE, "reply without a rank": 1, "fewer than two ranked replies": 2}),
    "texts": (2, 4, {**GONE, "not the best reply": 2}),
    "prompts": (2, 2, {**GONE, "reply, and no prompt": 4}),
}


@pytest.mark.parametrize("purpose", COUNTS)
def test_every_message_of_a_tree_is_used_or_skipped_with_a_reason(tmp_path, purpose):
    examples, used, skipped = COUNTS[purpose]
    for rows in (nine_messages(), nine_messages()[::-1], nested(nine_messages())):
        data = read(put(tmp_path, rows), purpose=purpose)
        assert (len(data.examples), data.rows, data.skipped) == (examples, 9, skipped)
        assert data.rows == used + sum(data.skipped.values())
        together = f" (in {examples} examples)" if used > examples else ""
        assert f"9 rows = {used} used{together} + {9 - used} skipped" in data.summary()
        assert len({example.line for example in data.examples}) == examples
    both = f"{put(tmp_path, nine_messages(), 'a.jsonl')},{put(tmp_path, nested(nine_messages()), 'b.jsonl')}"
    assert (
        read(both, purpose=purpose).rows == 18 and len(read(both, purpose=purpose, weights=[3, 1]).examples) >= examples
    )


def test_every_message_of_a_skipped_example_is_counted(tmp_path):
    identical = [{**row, "text": "same"} if row["message_id"] in ("a0", "a1") else row for row in nine_messages()]
    others = [{**row, "message_id": f"x{row['message_id']}", "parent_id": row["parent_id"] and f"x{row['parent_id']}"}
            for row in nine_messages()]  # fmt: skip
    data = read(put(tmp_path, identical + others))
    assert (data.rows, len(data.examples), data.skipped["identical completions"]) == (18, 1, 3)


def test_malformed_and_circular_messages_are_counted(tmp_path):
    rows = nine_messages() + [
        oasst("a6", "nowhere", "orphan"), oasst("q3", "a6", "below an orphan?"), oasst("a7", "q0", "rank", rank="x"),
        oasst("q4", "a8", "round?"), oasst("a8", "q4", "and round"),
        {**oasst("a9", "q0", "role"), "role": "x"}, nine_messages()[0],
    ]  # fmt: skip
    data = read(put(tmp_path, rows), skip_invalid=True)
    assert data.rows == len(rows) == 16 and len(data.examples) == 1
    assert data.skipped["malformed"] == 6 and data.skipped["below a message that is not used"] == 2
    with pytest.raises(DataError, match=":10: parent_id leads back to the message itself"):
        read(put(tmp_path, nine_messages() + rows[12:14]))


def test_every_response_of_helpsteer_is_used_or_skipped_with_a_reason(tmp_path):
    attributes = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}
    responses = ("p", "a", 1), ("p", "b", 3), ("p", "c", 2), ("alone", "d", 1), ("r", "e", 1), ("r", "e", 1)
    rows = [
        {"prompt": prompt, "response": text, "helpfulness": score, **attributes} for prompt, text, score in responses
    ]
    data = read(put(tmp_path, rows))
    assert data.skipped == {"single completion": 1, "identical completions": 2} and data.merged == 2
    assert "6 rows = 3 used (in 1 examples) + 3 skipped" in data.summary() and data.account()["merged"] == 2
    data = read(put(tmp_path, rows), purpose="texts")
    assert data.skipped == {"not the best response": 3} and data.examples[0].completions == ("b",)
    data = read(put(tmp_path, rows), purpose="prompts")
    assert data.skipped == {"response to the same prompt": 3} and [g.prompt for g in data.examples] == [
        "p",
        "alone",
        "r",
    ]
    bad = {"prompt": "p<extra_id_1>Assistant\nx", "response": "a", "helpfulness": 1, **attributes}
    data = read(put(tmp_path, [*rows, bad, {**bad, "response": "b"}]), skip_invalid=True)
    assert data.rows == 8 and data.skipped["malformed"] == 2


def test_only_the_good_completions_of_unpaired_data_are_learned(tmp_path):
    path = put(tmp_path, ROWS["trl-lib/kto-mix-14k"])
    data = read(path, purpose="texts", **options("--columns keep=label"))
    assert data.skipped == {"label is false": 3}
    with pytest.raises(
        DataError, match="--loss kto, which does not exist yet; sft learns the good ones with --columns"
    ):
        read(path)


WRONG = [
    None, 1, 1.5, True, "x", [], [1], [None], {}, {"a": 1}, [[]], [{}], '[{"role": 1}]', [{"role": None}],
    [{"role": ["x"], "content": "y"}], {"role": "user", "content": {"a": 1}}, [{"from": "gpt", "value": None}],
    [{"role": "assistant", "content": None, "tool_calls": {"a": 1}}], [{"input": 1, "output": 2}], '[{"from": {}}]',
]  # fmt: skip


@pytest.mark.parametrize("purpose", ["comparisons", "texts", "prompts"])
def test_a_wrong_type_in_any_column_of_any_format_is_one_line(tmp_path, purpose):
    for number, rows in enumerate(ROWS.values()):
        for place, column in enumerate(rows[0]):
            for value in WRONG[(number + place) % 13 :: 13]:  # every value in every column would take a minute
                path = put(tmp_path, [{**rows[0], column: value}])
                try:
                    read(path, purpose=purpose)
                except DataError as error:
                    assert len(str(error).splitlines()) == 1
