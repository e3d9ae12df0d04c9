"""Templates of the judge, the choice in its answer, and the interval of a win rate."""

import pytest

from exo.evaluation import metrics as evaluation_metrics
from exo.evaluation.judge_prompts import TEMPLATES, AnswerCache, JudgeTemplate


@pytest.fixture
def template(tmp_path):
    def make(text: str) -> JudgeTemplate:
        path = tmp_path / "template.txt"
        path.write_text(text, encoding="utf-8")
        return JudgeTemplate(str(path))

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_contain_every_text(name):
    texts = {"prompt": "<p>", "a": "<first>", "b": "<second>", "reference": "<r>"}
    built_in = JudgeTemplate(name)
    filled = built_in.fill(**texts)
    assert filled.index("<p>") < filled.index("<first>") < filled.index("<second>")
    assert ("<r>" in filled) == built_in.shows_reference == built_in.ties == (name == "instruction")
    assert built_in.choice(filled) is None  # a judge that repeats the question has not decided


def test_braces_of_the_texts_survive(template):
    text = template("{prompt}|{a}|{b}").fill(prompt="{a} {}", a="\\1 {b}", b=" {'x': {reference}} %s\n", reference="")
    assert text == "{a} {}|\\1 {b}|{'x': {reference}} %s"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt} {a}", "expected {a} and {b} for the answers; add {b}"),
        ("{prompt} {b}", "expected {a} and {b} for the answers; add {a}"),
        ("{prompt} {a} {b} {refrence}", "unknown placeholder {refrence}; expected some of a, b, prompt, reference"),
    ],
)
def test_a_template_without_its_placeholders_is_refused(template, text, message):
    with pytest.raises(ValueError, match=message):
        template(text)


def test_an_unknown_template_is_refused():
    with pytest.raises(ValueError, match="--template sumary: expected summary, dialogue, instruction, or a text file"):
        JudgeTemplate("sumary")


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Comparison: A is better than B.\nPreferred: B", "B"),
        ('**Preferred:** "A"\n', "A"),
        ("More helpful: [[B]].", "B"),
        ("> `A`", "A"),
        ("Preferred: Response B", "B"),
        ("Preferred:\n\n  A  ", "A"),
        ("Preferred: A\nOn reflection:\nPreferred: B\nThank you!", "B"),
        ("Better：“A”", "A"),
        ("Preferred: **Summary A**", "A"),
        ("tie", "tie"),
        ("Better: Tie.", "tie"),
        ('Preferred: "A" or "B"', None),
        ("Preferred: A, narrowly", None),
        ("A good answer, B is not", None),
        ("a", None),
        ("AB", None),
        ("C", None),
        ("", None),
    ],
)
def test_the_last_line_that_states_a_choice_decides(template, answer, choice):
    assert template('{a}{b} "tie"').choice(answer) == choice
    assert template("{a}{b} no tie").choice(answer) == (None if choice == "tie" else choice)


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Preferred: A\nWait, the second has the point.\nPreferred: B", "B"),
        ("Preferred: B\nSummary:\nA", "B"),
        ("preferred: b", None),
        ("**Preferred**: **A**\nB", "A"),
        ("Preferred: A\nOn reflection neither is.\nPreferred: neither", None),
        ("Preferred:\n\nB", "B"),
        ("B", "B"),
        ("<think>\nPreferred: A\n</think>\nPreferred: B", "B"),
        ("<think>\nPreferred: A\n", None),
        ("A\n</think>\nComparison: both.", None),
    ],
)
def test_the_last_line_with_the_label_decides(answer, choice):
    """Check that neither a label in earlier reasoning nor a later letter without the label decides."""
    summary = JudgeTemplate("summary")
    assert summary.label == "Preferred" and summary.choice(answer) == choice
    assert [JudgeTemplate(name).label for name in TEMPLATES] == ["Preferred", "More helpful", "Better"]


def test_the_cache_key_depends_on_template_endpoint_and_body():
    keys = [("summary", "u", b"x"), ("dialogue", "u", b"x"), ("summary", "v", b"x"), ("summary", "u", b"y")]
    assert len({AnswerCache.key(JudgeTemplate(name), url, body) for name, url, body in keys}) == 4


def test_the_bootstrap_interval_is_close_to_the_normal_interval():
    values = [0.0] * 40 + [1.0] * 60
    low, high = evaluation_metrics.bootstrap(values, seed=0)
    half = 1.96 * 0.049
    assert low == pytest.approx(0.6 - half, abs=0.02) and high == pytest.approx(0.6 + half, abs=0.02)
    assert (low, high) == evaluation_metrics.bootstrap(values, seed=0) != evaluation_metrics.bootstrap(values, seed=1)
    assert evaluation_metrics.bootstrap([0.5] * 3, seed=0) == (0.5, 0.5)
