"""Which columns are read, and that no column that could be part of the prompt is silently dropped."""

import json
from dataclasses import dataclass

import pytest
from data_files import CANARY, GOOD, HH, SCORED, put, refusal

from exo.cli.options import DataOptions
from exo.cli.parse import parse
from exo.data import Chat, DataError, read

pytestmark = pytest.mark.filterwarnings("error")

LONG = [f"{CANARY} what is {n} plus two?" for n in range(2)]
PAIR = {"chosen": "The answer is good", "rejected": "The answer is bad"}
ORCA = {"system": "You are helpful", "question": "what is 1 plus two?", **PAIR}


def texts(example) -> list[str]:
    """Return the contents of the prompt's messages, or the plain prompt."""
    return [m.content for m in example.prompt.messages] if isinstance(example.prompt, Chat) else [example.prompt]


@pytest.mark.parametrize("purpose", ["comparisons", "texts", "prompts"])
def test_a_question_in_another_column_is_part_of_the_prompt(tmp_path, purpose):
    data = read(put(tmp_path, [ORCA]), purpose=purpose)
    assert texts(data.examples[0]) == ["You are helpful", "what is 1 plus two?"]
    for name in ("question", "instruction", "query", "problem", "input", "user_prompt", "post", "context"):
        data = read(put(tmp_path, [{name: "what is 1 plus two?", **PAIR}]), purpose=purpose)
        assert texts(data.examples[0]) == ["what is 1 plus two?"], name
        assert data.conversational is (name not in ("post", "context"))
    for name in ("input", "context"):
        row = {"question": "what is it?", name: "1 plus two", **PAIR}
        assert texts(read(put(tmp_path, [row]), purpose=purpose).examples[0]) == ["what is it?\n1 plus two"]


BASES = {
    "preference": (GOOD, "comparisons"),
    "scored": (SCORED, "comparisons"),
    "implicit": (PAIR, "comparisons"),
    "imitated": ({"prompt": "p", "completion": "c"}, "texts"),
    "conversation": (
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
        "texts",
    ),
    "samples": ({"prompt": "p", "completions": ["a", "b"]}, "samples"),
    "prompts": ({"prompt": "p"}, "prompts"),
    "labels": ({"text": "t", "label": 1}, "labels"),
}
WITHOUT_PROMPT = ("implicit", "conversation", "labels")  # any word could be the prompt
LEFT_OVER = {
    "background": LONG,
    "article": LONG,
    "passages": [[text] for text in LONG],
    "documents": [[{"title": "a", "text": text}] for text in LONG],
    "facts": [{"known": text} for text in LONG],
    "thread": [[{"role": "user", "content": text}] for text in LONG],
    "images": [[{"bytes": "x", "path": None}]] * 2,
    "picture": [{"bytes": "x"}, {"bytes": "y"}],
    "frage": ["这是一个很长的问题吗", "那是另外一个问题吗"],
    "question_th": ["เมืองหลวงของฝรั่งเศสคืออะไร", "เมืองหลวงของลาวคืออะไร"],
    "question_lo": ["ນະຄອນຫຼວງຂອງລາວແມ່ນຫຍັງ", "ນະຄອນຫຼວງຂອງໄທແມ່ນຫຍັງ"],
    "question_km": ["រដ្ឋធានីនៃប្រទេសកម្ពុជា", "រដ្ឋធានីនៃប្រទេសឡាវ"],
    "origin": ["เมืองหลวงของฝรั่งเศสคืออะไร" * 2] * 2,
    "source": [f"{text} " * 3 for text in LONG],
    "choices": [["one", "two"], ["two", "three"]],
    "chat_template_kwargs": [{"enable_thinking": False}] * 2,
}
HARMLESS = {
    "id": ["a", "b"],
    "prompt_id": ["0" * 64, "1" * 64],
    "score_chosen": [1.5, 2.5],
    "chosen_model": ["a model of them", "another model of them"],
    "created_at": ["Sat Nov 28 00:42:21 2026", "Sun Nov 29 00:42:21 2026"],
    "url": ["https://a.example/b c d", "https://a.example/e f g"],
    "meta": [{"a": LONG[0]}, {"a": LONG[1]}],
    "part": ["one", "two"],
    "licence_text": ["Apache License, Version 2.0"] * 2,
    "number": [1, 2],
    "flag": [True, False],
    "digest": ["a" * 64, "b" * 64],
    "images": [[], None],
    "documents": ["", []],
}


@pytest.mark.parametrize("base", BASES)
def test_unread_columns_are_refused_or_listed(tmp_path, base):
    """Check that a column that could be part of the prompt is refused, and that a harmless one is only listed."""
    row, purpose = BASES[base]
    for name, values in LEFT_OVER.items():
        path = put(tmp_path, [{**row, name: value} for value in values])
        for skip_invalid in (False, True):
            message = refusal(path, purpose=purpose, skip_invalid=skip_invalid)
            assert f"column '{name}' of " in message and f"--ignore_columns {name} leaves it out" in message
        for ignored in ([name], ["all"]):
            assert read(path, purpose=purpose, ignore_columns=ignored).unread == (name,)
    for name, values in HARMLESS.items():
        if base in WITHOUT_PROMPT and name in ("part", "digest"):
            continue
        data = read(put(tmp_path, [{**row, name: value} for value in values]), purpose=purpose)
        assert data.unread == (name,) and f"columns not used: {name}" in data.summary(), name


def test_a_column_that_is_nested_too_deeply_is_malformed(tmp_path):
    for depth in (100, 800, 940, 970, 985):
        path = put(tmp_path, f'{{"prompt": "p", "chosen": "a", "rejected": "b", "deep": {"[" * depth + "]" * depth}}}')
        try:
            read(path)
        except DataError as error:
            assert "nested too deeply" in str(error)


def test_columns_that_would_change_the_loss_are_refused_for_training(tmp_path):
    for name in ("margin", "weight", "loss_mask"):
        path = put(tmp_path, [{**GOOD, name: 0.5}])
        for purpose in ("comparisons", "texts"):
            assert "would change what is learned, and is not read" in refusal(path, purpose=purpose)
        assert read(path, purpose="prompts").unread == (name,)


def test_a_text_in_a_single_row_is_not_a_constant(tmp_path):
    assert "column 'thoughts'" in refusal(put(tmp_path, [{**GOOD, "thoughts": LONG[0]}]))
    read(put(tmp_path, [{**GOOD, "thoughts": LONG[0]}] * 2))


def test_a_column_of_single_words_is_refused_without_a_prompt(tmp_path):
    rows = [{"word": word, "chosen": f"{word} is nice", "rejected": f"I like {word}"} for word in ("cat", "dog")]
    assert "column 'word'" in refusal(put(tmp_path, rows)) and "column 'word'" in refusal(put(tmp_path, rows[:1]))
    assert read(put(tmp_path, [{**GOOD, **row, "prompt": "p"} for row in rows])).unread == ("word",)


def test_the_suggested_fix_for_a_column_of_single_words_works(tmp_path):
    implicit = [
        {"q": f"{place}?", "chosen": f"The capital is {good}", "rejected": f"The capital is {bad}"}
        for place, good, bad in (("France", "Paris", "Rome"), ("Italy", "Rome", "Paris"))
    ]
    message = refusal(put(tmp_path, implicit))
    assert "column 'q'" in message and "--columns prompt=q reads it as such" in message
    examples = read(put(tmp_path, implicit), columns={"prompt": "q"}).examples
    assert examples[0].prompt == "France?" and examples[0].completions == (
        "The capital is Paris",
        "The capital is Rome",
    )
    text = [{"q": f"{word}?", "text": f"It is {word}"} for word in ("one", "two")]
    assert "--columns prompt=q,completion=text" in refusal(put(tmp_path, text), purpose="texts")
    example = read(put(tmp_path, text), purpose="texts", columns={"prompt": "q", "completion": "text"}).examples[0]
    assert (example.prompt, example.completions) == ("one?", ("It is one",))
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    others = {
        "dialogues": (HH, "comparisons"),
        "whole": ({"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "b"}]}, "comparisons"),
        "conversation": ({"messages": turns}, "texts"),
        "to be continued": ({"messages": turns[:1]}, "prompts"),
    }  # fmt: skip
    for name, (row, purpose) in others.items():
        message = refusal(put(tmp_path, [{**row, "q": word} for word in ("one", "two")]), purpose=purpose)
        assert "column 'q'" in message and "prompt=q" not in message, name
        read(put(tmp_path, [{**row, "q": "one"}] * 2), purpose=purpose)


def test_a_column_that_another_one_replaces_is_refused_as_unread(tmp_path):
    row = {"context": "in a far land", "prompt": "what is it?", "chosen": "a", "rejected": "b"}
    message = refusal(put(tmp_path, [row]))
    assert "column 'context'" in message and "prompt=context" not in message
    path = put(tmp_path, [row])
    message = refusal(path, columns={"prompt": "context"})
    assert "column 'prompt' is not read, because 'context' takes its place; --ignore_columns prompt" in message
    for ignored in (["prompt"], ["all"]):
        data = read(path, columns={"prompt": "context"}, ignore_columns=ignored)
        assert data.examples[0].prompt == "in a far land" and data.unread == ("prompt",)
    both = put(tmp_path, [{**GOOD, "system": "be kind", "persona": "a pirate"}])
    assert "column 'system' is not read, because 'persona'" in refusal(both, system_column="persona")
    data = read(both, system_column="persona", ignore_columns=["system"])
    assert texts(data.examples[0]) == ["a pirate", "p"]
    nulls = put(tmp_path, [{**GOOD, "system": None, "persona": "a pirate"}])
    assert texts(read(nulls, system_column="persona").examples[0]) == ["a pirate", "p"]
    assert read(put(tmp_path, [{**GOOD, "a_id": 1, "label": 1}]), columns={"label": "a_id"}).unread == ("label",)


def test_an_unknown_name_in_columns_is_refused_with_a_suggestion(tmp_path):
    path = put(tmp_path, [GOOD])
    for wrong, words in {
        "promt": "did you mean prompt?",
        "chose": "did you mean chosen?",
        "zzz": "docs/data.md",
    }.items():
        with pytest.raises(ValueError, match=f"--columns {wrong}=.*{words.replace('?', '.')}") as caught:
            read(path, columns={wrong: "question"})
        assert not isinstance(caught.value, DataError)
    with pytest.raises(ValueError, match="--system_column: expected none beside --columns system="):
        read(path, columns={"system": "a"}, system_column="b")
    for name in ("question", "history", "ref_logps", "keep", "better_response_id", "helpfulness", "temperature"):
        assert "no column 'nowhere'" in refusal(path, columns={name: "nowhere"})


def test_a_column_that_first_appears_in_a_later_row_is_refused(tmp_path):
    rows = [GOOD, GOOD, {**GOOD, "question": LONG[0]}]
    assert refusal(put(tmp_path, rows)).startswith(f"{tmp_path}/data.jsonl:3: column 'question'")


def test_a_column_that_repeats_texts_of_other_columns_is_harmless(tmp_path):
    ask, good, bad = "What is the sum?", "It is four I think.", "I do not know."
    row = {"prompt": ask, "chosen": good, "rejected": bad}
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": good}]
    for name, value in {
        "question": ask, "messages": messages, "text": f"Q: {ask}\nA: {good} or {bad}", "responses": [good, bad],
    }.items():  # fmt: skip
        assert read(put(tmp_path, [{**row, name: value}])).unread == (name,)
    assert "column 'question'" in refusal(put(tmp_path, [{**row, "question": "Another one?"}]))


def test_columns_of_skipped_rows_are_not_refused(tmp_path):
    talk = [{"role": "user", "content": "What is the sum?"}, {"role": "assistant", "content": "It is four I think."}]
    other = [talk[0], {"role": "assistant", "content": "I do not know."}]
    rows = [{"chosen": talk, "rejected": answer, "messages": talk, "kind": answer[1]["content"][:2]}
            for answer in (talk, other, talk)]  # fmt: skip
    data = read(put(tmp_path, rows))
    assert data.skipped == {"identical dialogues": 2} and data.unread == ("messages", "kind")


def test_columns_by_other_names(tmp_path):
    rows = [{"ask": "p", "better": "a", "worse": "b", "sys": "s", "note": "x y z"} for _ in range(2)]
    path = put(tmp_path, rows)
    names = {"prompt": "ask", "chosen": "better", "rejected": "worse"}
    data = read(path, columns=names, system_column="sys")
    assert texts(data.examples[0]) == ["s", "p"] and data.examples[0].completions == ("a", "b")
    swapped = read(put(tmp_path, [GOOD], "pair.jsonl"), columns={"chosen": "rejected", "rejected": "chosen"})
    assert swapped.examples[0].completions == (" b", " a")
    for renamed in ({"prompt": "nowhere"}, {**names, "history": "nowhere"}):
        assert "no column 'nowhere', which --columns or --system_column names" in refusal(path, columns=renamed)
    with pytest.raises(DataError, match="no column 'nowhere'"):
        read(put(tmp_path, [GOOD]), columns={"prompt": "nowhere"})
    held_out = read(put(tmp_path, [GOOD]), columns={"prompt": "nowhere"}, columns_required=False)
    assert held_out.examples[0].prompt == "p"
    read(put(tmp_path, [{**ORCA, "context": "x"}]), ignore_columns=["context"])


def test_null_columns_are_absent(tmp_path):
    nothing = {"completions": None, "rewards": None, "ref_chosen_logps": None, "ref_logps": None, "question": None}
    data = read(put(tmp_path, [{**GOOD, **nothing}]))
    assert data.examples[0].ref_logps is None and data.format == "preferences (prompt/chosen/rejected)"
    assert "missing 'chosen'" in refusal(put(tmp_path, [{**GOOD, "chosen": None}]))


# Columns beside the prompt: system, history and tools.

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
PAST = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_system_history_and_tools_are_read_in_every_format(tmp_path):
    chat = [{"role": "user", "content": "p"}]
    rows = {
        "comparisons": [
            GOOD, SCORED, {"prompt": chat, "chosen": "a", "rejected": "b"},
            {"chosen": [*chat, {"role": "assistant", "content": "a"}],
             "rejected": [*chat, {"role": "assistant", "content": "b"}]},
            {"instruction": "p", "completions": [{"response": t, "overall_score": i} for i, t in enumerate("ab")]},
        ],
        "texts": [{"question": "p", "answer": "c"}, {"messages": [*chat, {"role": "assistant", "content": "a"}]}],
        "prompts": [{"prompt": "p"}, {"messages": chat}],
        "samples": [{"prompt": "p", "completions": ["a"]}],
    }  # fmt: skip
    for purpose, rows_of_purpose in rows.items():
        for row in rows_of_purpose:
            for history in (PAST, [["hi", "hello"]], json.dumps(PAST)):
                for tools in (TOOLS, json.dumps(TOOLS)):
                    extended = {**row, "system_prompt": "s", "history": history, "tools": tools}
                    prompt = read(put(tmp_path, [extended]), purpose=purpose).examples[0].prompt
                    assert [m.role for m in prompt.messages] == ["system", "user", "assistant", "user"]
                    assert [m.content for m in prompt.messages] == ["s", "hi", "hello", "p"]
                    assert list(prompt.tools) == TOOLS
    empty = {**GOOD, "system": " ", "history": [], "tools": []}
    assert read(put(tmp_path, [empty])).examples[0].prompt == "p"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**PAIR, "system": CANARY}, "beside a text that is no user's turn"),
        ({**GOOD, "tools": CANARY}, "tools must be an array"),
        ({**GOOD, "history": CANARY}, "history must be an array"),
        ({**GOOD, "history": [CANARY]}, "history must be messages, or pairs"),
        ({**GOOD, "system": [CANARY]}, "system must be a string, not an array"),
        (
            {
                **GOOD,
                "prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
                "system": CANARY,
            },
            "different system prompts",
        ),
        (
            {"question": [{"role": "user", "content": "b"}], "input": CANARY, **PAIR},
            "input beside a prompt of messages",
        ),
    ],
)
def test_invalid_system_history_and_tools_are_refused(tmp_path, row, words):
    assert words in refusal(put(tmp_path, [row]))


# Reference log-probs.


def test_reference_log_probs_are_read_in_every_format_or_refused(tmp_path):
    chat = [{"role": "user", "content": "p"}]
    conversations = {key: [*chat, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    listed = {"ref_logps": [-1.5, -2.0]}
    rated = {"instruction": "p", "completions": [{"response": t, "overall_score": 1} for t in "ab"]}
    for row in (GOOD, conversations, {"conversations": chat, "chosen": "a", "rejected": "b"}):
        for logps in (listed, {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2},
                      {"reference_chosen_logps": -1.5, "reference_rejected_logps": -2}):  # fmt: skip
            assert read(put(tmp_path, [{**row, **logps}])).examples[0].ref_logps == (-1.5, -2.0)
    scored = {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 2]}
    for row in (rated, scored):
        assert read(put(tmp_path, [{**row, **listed}])).examples[0].ref_logps == (-1.5, -2.0)
    for row in (PAIR, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}):
        assert "log-probs that cannot be used here" in refusal(put(tmp_path, [{**row, **listed}]))
    assert read(put(tmp_path, [{**GOOD, **listed}]), purpose="texts").examples[0].ref_logps is None


@pytest.mark.parametrize(
    ("logps", "words"),
    [
        ({"ref_logps": [0.5, -1]}, "ref_logps[0] must be a log-prob, at most 0"),
        ({"ref_chosen_logps": -1, "ref_rejected_logps": 1e-3}, "ref_rejected_logps must be a log-prob, at most 0"),
        ({"ref_chosen_logps": -1}, "2 completions but 1 log-probs"),
        ({"ref_logps": [-1]}, "2 completions but 1 log-probs"),
        ({"ref_logps": [-1, -2], "ref_chosen_logps": -1, "ref_rejected_logps": -2}, "twice"),
        ({"ref_logps": [CANARY, -2]}, "ref_logps[0] must be a number"),
    ],
)
def test_wrong_reference_log_probs_are_malformed(tmp_path, logps, words):
    assert words in refusal(put(tmp_path, [{**GOOD, **logps}]))


def test_reference_log_probs_of_answers_whose_later_turns_are_dropped_are_refused(tmp_path):
    answer = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    row = {"prompt": "p", "chosen": answer, "rejected": "c", "ref_logps": [-1, -2]}
    assert "answers of several turns" in refusal(put(tmp_path, [row]))


# Options.


def test_bad_options_are_named(capsys):
    @dataclass(frozen=True)
    class Config(DataOptions):
        pass

    for flags in (["--columns", "prompt"], ["--columns", "a=b,a=c"], ["--data_weights", "1,0"],
                  ["--data_weights", "x"], ["--columns", "=b"]):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            parse(Config, flags, prog="test", description=None)
        assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "purpose", "words"),
    [
        ({"prompt": CANARY, "completion": "b"}, "comparisons", "this is texts (prompt/completion), which sft takes"),
        (
            {"question": CANARY, "chosen": "b"},
            "comparisons",
            "nearest is preferences (question/chosen/rejected), missing",
        ),
        ({"prompt": CANARY, "completions": ["a"]}, "comparisons", "samples without rewards; python -m exo.score"),
        ({"prompt": CANARY, "completions": ["a"]}, "texts", "no rewards that tell which to learn"),
        (
            {"frage": CANARY, "gut": "b"},
            "comparisons",
            "; set --columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN",
        ),
        ({"prompt": CANARY, "chosen": "a", "rejected": "b"}, "labels", "which align and reward take"),
        ({"prompt": CANARY, "chosen": "a", "rejected": "b"}, "samples", "which align and reward take"),
    ],
)
def test_an_unknown_row_names_the_nearest_format_or_the_stage_that_takes_it(tmp_path, row, purpose, words):
    assert words in refusal(put(tmp_path, [row]), purpose=purpose)


def test_sft_learns_the_best_of_scored_completions(tmp_path):
    [example] = read(put(tmp_path, [{**SCORED, "rewards": [0, 2, 1]}]), purpose="texts").examples
    assert (example.completions, example.rewards, example.tokens) == ((" b",), None, None)


def test_completions_that_begin_with_their_prompt_are_noted(tmp_path):
    row = {"prompt": "What is it?", "chosen": "What is it? This.", "rejected": "What is it? That."}
    assert read(put(tmp_path, [row])).noted == {"every completion begins with its prompt": 1}


@pytest.mark.parametrize("name", ["source", "task", "info", "is_question", "category", "key", "meta"])
def test_a_question_in_a_column_with_a_harmless_name_is_noticed(tmp_path, name):
    pairs = [{name: f"what is {i} plus two?", "chosen": f"It is {i + 2}", "rejected": f"It is {i}"} for i in range(3)]
    assert f"column '{name}' of texts with an implicit prompt" in refusal(put(tmp_path, pairs))
    constant = [row | {name: "my data set"} for row in pairs]
    assert len(read(put(tmp_path, constant)).examples) == 3


def test_a_column_with_verdicts_is_not_ignored(tmp_path):
    """Check that a column that marks bad rows is refused.

    Otherwise sft would learn bad answers, and align would learn some pairs the wrong way round.
    """
    for name, good, bad in (("feedback", 1, -1), ("desirable", True, False), ("is_good", 1, 0), ("score", 1.0, -1.0)):
        rows = [{"prompt": "a", "completion": "b", name: good}, {"prompt": "c", "completion": "d", name: bad}]
        message = refusal(put(tmp_path, rows), purpose="texts")
        assert f"column '{name}' of texts" in message and f"--columns keep={name}" in message
        assert len(read(put(tmp_path, [row | {name: good} for row in rows]), purpose="texts").examples) == 2
    for name, first, second in (("winner", "chosen", "rejected"), ("better", 0, 1), ("preference", "A", "B")):
        rows = [GOOD | {name: first}, GOOD | {"prompt": "other", name: second}]
        assert f"column '{name}' of preferences" in refusal(put(tmp_path, rows))
        assert len(read(put(tmp_path, rows), ignore_columns=[name]).examples) == 2
