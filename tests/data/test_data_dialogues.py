"""Pairs of full dialogues, conversations or texts: where the prompt ends, and which later turns are dropped."""

from pathlib import Path

import pytest
from data_files import HH, A, H, put, refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exo.data import Dataset, Example, read
from exo.data.formats.transcripts import as_chat

pytestmark = pytest.mark.filterwarnings("error")  # a file left open warns

# Dialogues: the completions begin at the first difference, and later turns are dropped.


def split(folder: Path, chosen: str, rejected: str) -> Dataset:
    return read(put(folder, [{"chosen": chosen, "rejected": rejected}, HH]))


def test_shared_turns_are_the_prompt_and_the_completions_keep_their_space(tmp_path):
    shared = f"{H} one{A} two\n\nin two paragraphs{H} three"
    example = split(tmp_path, f"{shared}{A} good\n\nend", f"{shared}{A}  bad").examples[0]
    assert example.prompt == shared + A
    assert example.completions == (" good\n\nend", "  bad")


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
    assert data.examples[0].completions == (" good", " bad")
    assert data.noted == {"later turns dropped": 1}


def test_markers_quoted_inside_a_shared_turn_stay_in_the_prompt(tmp_path):
    shared = f"{H} continue this:{H} hey{A} ho{H} and now?"
    data = split(tmp_path, f"{shared}{A} yes", f"{shared}{A} no")
    assert data.examples[0] == Example(shared + A, (" yes", " no"), None, 1)
    assert data.noted == {}


def test_only_a_marker_after_a_blank_line_opens_a_turn(tmp_path):
    chosen = " I said Human: hello\nAssistant: and so on"
    data = split(tmp_path, f"{H} q{A}{chosen}", f"{H} q{A} no")
    assert data.examples[0].completions == (chosen, " no")


def test_text_before_the_first_turn_belongs_to_the_prompt(tmp_path):
    data = split(tmp_path, f"Be kind.{H} q{A} yes", f"Be kind.{H} q{A} no")
    assert data.examples[0].prompt == f"Be kind.{H} q{A}"


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
    assert [example.line for example in data.examples] == [2]


@pytest.mark.parametrize("text", ["just text", "", f"{H} a question alone", "Assistant: no break"])
def test_a_text_without_an_assistant_turn_is_no_dialogue(tmp_path, text):
    path = put(tmp_path, [{"chosen": HH["chosen"], "rejected": text}])
    assert refusal(path).startswith(f"{path}:1: rejected has no turn")


turn = st.tuples(st.sampled_from([H, A]), st.text("aA: \n", max_size=6))


@settings(max_examples=150, deadline=None)
@given(st.lists(turn, max_size=5), st.lists(turn, max_size=4), st.lists(turn, max_size=4))
@example([(H, " q")], [(A, " a\n"), (H, "")], [(A, " a")])
def test_prompt_and_completion_always_begin_the_dialogue(tmp_path_factory, shared, chosen_turns, rejected_turns):
    row = {
        key: "".join(marker + text for marker, text in [*shared, *turns, (A, f" {key}")])
        for key, turns in (("chosen", chosen_turns), ("rejected", rejected_turns))
    }
    folder = tmp_path_factory.mktemp("hh")
    data = read(put(folder, [row, HH]))
    if len(data.examples) == 2:
        example = data.examples[0]
        assert example.prompt.endswith(A)
        for text, completion in zip(row.values(), example.completions, strict=True):
            beginning = example.prompt + completion
            assert text.startswith(beginning)
            assert text == beginning or text[len(beginning) :].startswith((H, A))
            assert H not in completion and A not in completion


# Conversations of messages are split as dialogues are.


def talk(*turns: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (talk("u x", "a y"), talk("u z", "a y"), HUMAN_FIRST),
        (talk("u q", "a x"), talk("u q", "a x"), "identical dialogues"),
        (talk("u q", "a x"), talk("u q", "a x", "u more"), "one dialogue continues the other"),
        (talk("u q", "a "), talk("u q", "a x"), "empty completion"),
        (talk("a x"), talk("a y"), "nothing before the answer"),
    ],
)
def test_conversations_without_two_answers_to_compare_are_skipped(tmp_path, chosen, rejected, reason):
    good = {"chosen": talk("u q", "a x"), "rejected": talk("u q", "a y")}
    data = read(put(tmp_path, [{"chosen": chosen, "rejected": rejected}, good]))
    assert data.skipped == {reason: 1} and data.format == "pairs of conversations (chosen/rejected), chat messages"


def test_conversations_are_split_after_their_shared_beginning(tmp_path):
    shared = ("s be kind", "u q", "a r", "u s")
    row = {"chosen": talk(*shared, "a x", "u t", "a u"), "rejected": talk(*shared, "a y")}
    data = read(put(tmp_path, [row]))
    assert list(data.examples[0].prompt.messages) == talk(*shared)
    assert data.examples[0].completions == ("x", "y") and data.noted == {"later turns dropped": 1}


# Plain texts: the shared beginning is the prompt.


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Q: x\nA: yes", "Q: x\nA: no", "Q: x\nA:"),
        ("Q: x\nA:\nyes", "Q: x\nA:\nno", "Q: x\nA:\n"),
        ("one two", "one twofold x", "one"),
        ("问题。答：蓝色", "问题。答：绿色", "问题。答："),
        ("yes", "no", ""),
        ("prefix", "pretext", ""),
        ("é1 x", "é1  y", "é1"),
    ],
)
def test_the_shared_beginning_is_the_prompt_and_no_word_is_cut(tmp_path, chosen, rejected, prompt):
    data = read(put(tmp_path, [{"chosen": chosen, "rejected": rejected}]))
    assert data.examples == [Example(prompt, (chosen[len(prompt) :], rejected[len(prompt) :]), None, 1)]
    assert data.format == "texts with an implicit prompt (chosen/rejected)"
    assert data.noted == ({} if prompt else {"empty prompt": 1})


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [("a b", "a b", "identical completions"), ("a b", "a b c", "one text continues the other")],
)
def test_texts_without_two_different_endings_are_skipped(tmp_path, chosen, rejected, reason):
    rows = [{"chosen": chosen, "rejected": rejected}, {"chosen": "a b", "rejected": "a c"}]
    data = read(put(tmp_path, rows))
    assert data.skipped == {reason: 1} and data.examples == [Example("a", (" b", " c"), None, 2)]


def test_dialogues_and_plain_texts_are_not_mixed(tmp_path):
    plain = {"chosen": "a b", "rejected": "a c"}
    for rows, name in (((plain, HH), "texts with an implicit prompt"), ((HH, plain), "Anthropic HH dialogues")):
        assert f":2: another format; the file began as {name}" in refusal(put(tmp_path, list(rows)))


# Transcripts as messages.


def test_a_transcript_beside_a_system_prompt_becomes_its_turns(tmp_path):
    talk = f"{H} hi{A} hello{H} and now?{A}"
    rows = {
        "preferences": ({"prompt": talk, "chosen": " a", "rejected": " b"}, "comparisons"),
        "scored": ({"prompt": talk, "completions": [" a", " b"], "rewards": [2, 1]}, "comparisons"),
        "dialogues": ({"chosen": f"{talk} a", "rejected": f"{talk} b"}, "comparisons"),
        "imitated": ({"prompt": talk, "completion": " a"}, "texts"),
    }
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "and now?")]
    for name, (row, purpose) in rows.items():
        path = put(tmp_path, [{**row, "system": "be nice"}, row])
        first, second = read(path, purpose=purpose).examples
        assert [(m.role, m.content) for m in first.prompt.messages] == [("system", "be nice"), *turns], name
        assert [(m.role, m.content) for m in second.prompt.messages] == turns, name
        assert first.completions == second.completions == (("a",) if purpose == "texts" else ("a", "b")), name
    assert read(put(tmp_path, [rows["preferences"][0]])).examples == [Example(talk, (" a", " b"), None, 1)]


def test_text_before_the_first_marker_becomes_a_system_turn(tmp_path):
    row = {"prompt": f"Be kind.{H} hi{A}", "chosen": " a", "rejected": " b"}
    for columns in ({"system": "Be kind."}, {"history": [["x", "y"]], "prompt": f"{H} hi{A}", "system": "Be kind."}):
        [example] = read(put(tmp_path, [{**row, **columns}])).examples
        roles = [m.role for m in example.prompt.messages]
        assert roles in (["system", "user"], ["system", "user", "assistant", "user"]) and example.completions == (
            "a",
            "b",
        )
        assert example.prompt.messages[0].content == "Be kind." and example.prompt.messages[-1].content == "hi"
    assert "different system prompts" in refusal(put(tmp_path, [{**row, "system": "Be rude."}]))
    [alone] = read(put(tmp_path, [{**row, "tools": [{"name": "add"}]}])).examples
    assert [m.role for m in alone.prompt.messages] == ["system", "user"]


def test_nectars_prompts_are_transcripts_with_or_without_the_last_marker(tmp_path):
    answers = [{"answer": " a", "rank": 1}, {"answer": "b", "rank": 2}]
    rows = [{"prompt": prompt, "answers": answers} for prompt in (f"Be kind.{H} hi{A} ", f"{H} hi{A} yes{H} ok", "hi")]
    chats = read(put(tmp_path, rows)).examples
    assert [[m.role for m in example.prompt.messages] for example in chats] == [
        ["system", "user"], ["user", "assistant", "user"], ["user"],
    ]  # fmt: skip
    assert chats[0].completions == ("a", "b")
    [example] = read(put(tmp_path, [{"prompt": f"{H} hi{A}", "answers": answers}])).examples
    assert example.prompt == "hi" and example.completions == ("a", "b")
    assert "ends with a turn of the assistant" in refusal(put(tmp_path, [{**rows[0], "prompt": f"{H} hi{A} yes"}]))


def test_a_text_that_is_no_transcript_is_one_turn_of_the_user():
    for text in ("hi", f"quote:{H} a{A} b", f"{A} a", A, f"{H} a", ""):
        assert [(m.role, m.content) for m in as_chat(text).messages] == [("user", text)]
    chat = as_chat(f"{H} a{A}")
    assert as_chat(chat) is chat
