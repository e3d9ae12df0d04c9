"""The data of the tasks: the exact files made of each source layout, and that no held-out text is trained on."""

import json
import os
from pathlib import Path

import pytest
from data_files import A, H, put
from tasks import lines

from exo import models, prepare
from exo.experiments.tasks import TASKS

TEXTS = [f"the film was number {i} and it was {word}" for i, word in enumerate(["good", "bad", "fine", "dull"] * 5)]


def prepared(tmp_path: Path, task: str, source: Path | str, **options) -> dict[str, list[dict]]:
    """Return the rows of every file that the task writes, by name."""
    out = tmp_path / "data"
    prepare.run(
        prepare.Config(output_dir=str(out), overwrite_output_dir=True, task=task, source=str(source), **options)
    )
    return {file.stem: lines(file) for file in out.glob("*.jsonl")}


def refused(tmp_path: Path, task: str, source: Path | str, **options) -> str:
    with pytest.raises(ValueError) as caught:
        prepared(tmp_path, task, source, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()
    return str(caught.value)


def prompts(rows: list[dict]) -> set[str]:
    return {row["prompt"] for row in rows}


def is_disjoint(made: dict[str, list[dict]]) -> bool:
    """Return whether no held-out prompt is in another file or held out twice."""
    held_out = [row["prompt"] for row in made["test"]]
    trained = set().union(*(prompts(made[name]) for name in ("sft", "prompts", "pairs") if name in made))
    labelled = {row["text"] for row in made.get("labelled", [])}
    imitated = {row["prompt"] + row.get("completion", "") for row in made["sft"]}
    once = len(held_out) == len(set(held_out)) > 0
    return once and not set(held_out) & trained and labelled <= imitated


# Reviews.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """Write a model whose tokens are bytes and a few words of TEXTS; return its directory."""
    directory = tmp_path_factory.mktemp("model")
    model, tokens = models.tiny(TEXTS, vocab_size=300, hidden_size=16, num_layers=1, num_heads=1)
    models.save(model, tokens, directory)
    return str(directory)


RAW = {
    ("train", "pos"): [
        "an entirely lovely film<br /><br />with Zo\u00eb in it.  \n",
        "superb, all of it, truly superb",
    ],
    ("train", "neg"): ["a waste of two good hours, sadly"],
    ("test", "pos"): ["this one was a joy to watch"],
    ("test", "neg"): ["nobody should see such a film", "an entirely lovely mess, and bad"],
}


def unpacked(tmp_path: Path) -> Path:
    for (part, label), texts in RAW.items():
        directory = tmp_path / "aclImdb" / part / label
        directory.mkdir(parents=True)
        for i, text in enumerate(texts):
            (directory / f"{i}_7.txt").write_text(text, encoding="utf-8")
    return tmp_path / "aclImdb"


def labelled(part: str) -> list[dict]:
    return [{"text": t, "label": int(k == "pos")} for (p, k), texts in RAW.items() if p == part for t in texts]


def test_a_review_is_cut_after_ten_tokens_and_no_text_is_lost(tmp_path, tokenizer):
    made = prepared(tmp_path, "imdb", unpacked(tmp_path), tokenizer=tokenizer)
    assert made["labelled"] and is_disjoint(made)
    clean = {
        "an entirely lovely film\n\nwith Zo\u00eb in it.": 1,
        "superb, all of it, truly superb": 1,
        "a waste of two good hours, sadly": 0,
    }
    assert {row["text"]: row["label"] for row in made["labelled"]} == clean
    assert {row["prompt"] + row["completion"] for row in made["sft"]} == set(clean)
    assert [row["prompt"] for row in made["prompts"]] == [row["prompt"] for row in made["sft"]]
    tokens = models.load_tokenizer(tokenizer)
    for row in made["sft"]:
        ids = tokens(row["prompt"] + row["completion"])["input_ids"]
        assert row["prompt"] == tokens.decode(ids[:10])


def test_a_letter_of_several_tokens_is_not_cut_in_two(tmp_path, tokenizer):
    """Check a letter whose first byte is the tenth token: the prompt must not end within it."""
    texts = ["abcdefghi\u00eb and more", "jklmnopqr\u00eb and more", "stuvwxyza\u00eb and more"]
    path = put(tmp_path, [{"text": text, "label": 1} for text in texts])
    made = prepared(tmp_path, "imdb", path, tokenizer=tokenizer)
    assert {row["prompt"][9:] + row["completion"] for row in made["sft"]} == {"\u00eb and more"}


def test_every_layout_of_the_reviews_is_the_same_task(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    expected = prepared(tmp_path, "imdb", unpacked(tmp_path), tokenizer=tokenizer)
    folder = tmp_path / "rows"
    folder.mkdir()
    put(folder, labelled("train"), "train.jsonl")
    datasets.Dataset.from_list(labelled("test")).to_parquet(folder / "test-00000-of-00001.parquet")
    calls = []

    def load_dataset(path, *, name, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_list(labelled(split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in (folder, "owner/imdb"):
        made = prepared(tmp_path, "imdb", source, tokenizer=tokenizer)
        assert {name: sorted(map(str, rows)) for name, rows in made.items()} == {
            name: sorted(map(str, rows)) for name, rows in expected.items()
        }
    assert calls == [("owner/imdb", None, "train"), ("owner/imdb", None, "test")]


def test_the_rows_are_shuffled_by_the_seed(tmp_path, tokenizer):
    """Check a file that is sorted by label, so that its first rows have only one label."""
    path = put(tmp_path, [{"text": f"{i} {'film ' * 8}was seen", "label": int(i < 50)} for i in range(100)])
    made = [prepared(tmp_path, "imdb", path, tokenizer=tokenizer, seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert 10 < sum(row["label"] for row in made[0]["labelled"][:45]) < 35
    few = prepared(tmp_path, "imdb", path, tokenizer=tokenizer, rows=20)
    assert len(few["sft"]) + len(few["test"]) == 20


def test_a_prompt_that_begins_a_training_review_is_not_held_out(tmp_path, tokenizer, capsys):
    folder = tmp_path / "rows"
    folder.mkdir()
    put(folder, [{"text": "the same beginning as before", "label": 1}], "train.jsonl")
    rows = [{"text": text, "label": 0} for text in ("the same beginning but not the end", "quite another beginning")]
    put(folder, rows, "test.jsonl")
    made = prepared(tmp_path, "imdb", folder, tokenizer=tokenizer)
    assert is_disjoint(made) and len(made["test"]) == 1
    assert "1 held-out prompts left out: they are trained on" in capsys.readouterr().out


def sentences(tmp_path: Path, good: bytes, bad: bytes) -> Path:
    (tmp_path / "rt_polarity.pos").write_bytes(good)
    (tmp_path / "rt_polarity.neg").write_bytes(bad)
    return tmp_path


def test_a_sentence_is_cut_after_four_words(tmp_path):
    good = b"a film for the ages , clich\xe9s and all\x85 still good . \r\n" + b"too short a line\n"
    made = prepared(
        tmp_path, "polarity", sentences(tmp_path, good, b"dull , dull , and long .\nbad in every way , sadly")
    )
    assert is_disjoint(made)
    expected = {
        ("a film for the", " ages , clich\u00e9s and all\u2026 still good .", 1),
        ("dull , dull ,", " and long .", 0),
        ("bad in every way", " , sadly", 0),
    }
    (held_out,) = prompts(made["test"])
    trained = {row for row in expected if row[0] != held_out}
    assert len(trained) == 2  # one of four lines is no longer than a prompt, and one is held out
    assert {(row["prompt"], row["completion"]) for row in made["sft"]} == {row[:2] for row in trained}
    assert {(row["text"], row["label"]) for row in made["labelled"]} == {
        (p + completion, label) for p, completion, label in trained
    }


def test_polarity_makes_its_model_from_training_sentences(tmp_path):
    good = b"".join(b"a film of number %d and of zest\n" % i for i in range(30))
    made = prepared(tmp_path, "polarity", sentences(tmp_path, good, good.replace(b"a film of", b"one film of")))
    model, tokens = models.load(tmp_path / "data" / "base")
    assert models.parameter_count(model) < 2e6
    text = made["sft"][0]["prompt"] + made["sft"][0]["completion"]
    assert tokens.decode(tokens(text)["input_ids"]) == text


def test_the_real_sentences(tmp_path):
    if not (folder := os.environ.get("EXO_SHARED_DATA")):
        pytest.skip("EXO_SHARED_DATA names no folder of real data")
    made = prepared(tmp_path, "polarity", folder)
    assert is_disjoint(made)
    assert (len(made["sft"]), len(made["test"])) == (9439, 1000)
    assert 0.48 < sum(row["label"] for row in made["labelled"]) / len(made["labelled"]) < 0.52
    held_out = prompts(made["test"])
    pos = (Path(folder) / "rt_polarity.pos").read_bytes().decode("cp1252").split("\n")
    neg = (Path(folder) / "rt_polarity.neg").read_bytes().decode("cp1252").split("\n")
    long = {line.strip() for line in pos + neg if len(line.split()) > 4}
    assert {row["text"] for row in made["labelled"]} == {t for t in long if " ".join(t.split(" ")[:4]) not in held_out}


# Summaries.


def comparison(heading: str, *, choice: int = 1, split: str = "train", **changes) -> dict:
    info = {"id": "1", "subreddit": "tifu", "title": heading, "post": "I did.", "site": None, "article": None}
    summaries = [{"text": "  long one. ", "policy": "a"}, {"text": "short one.", "policy": "b"}]
    return {"info": info | changes, "summaries": summaries, "choice": choice, "split": split}


def post(title: str) -> dict:
    return {"id": "2", "subreddit": "tifu", "title": title, "post": "I did.", "summary": "Did it. "}


def prompt(title: str) -> str:
    return f"SUBREDDIT: r/tifu\nTITLE: {title}\nPOST: I did.\nTL;DR:"


COMPARISONS = [
    comparison("one"),
    comparison("one", choice=0),
    comparison("two", split="valid1"),
    comparison("three", split="valid2", choice=0),
    comparison("four", split="valid2"),
    comparison("one", split="valid2"),
    comparison("news", subreddit=None, post=None, article="What happened.", split="valid2"),
]
TLDR = {
    "sft": [{"prompt": prompt("four"), "completion": " Did it."}],
    "prompts": [{"prompt": prompt("one")}],
    "pairs": [
        {"prompt": prompt("one"), "chosen": " short one.", "rejected": " long one."},
        {"prompt": prompt("one"), "chosen": " long one.", "rejected": " short one."},
    ],
    "test": [
        {"prompt": prompt("two"), "chosen": " short one."},
        {"prompt": prompt("three"), "chosen": " long one."},
    ],
}


def equal_in_any_order(made: dict[str, list[dict]], expected: dict[str, list[dict]]) -> bool:
    """Return whether the rows are equal in any order."""
    return {name: sorted(map(str, rows)) for name, rows in made.items()} == {
        name: sorted(map(str, rows)) for name, rows in expected.items()
    }


@pytest.mark.parametrize("layout", ["files", "folders"])
def test_summaries_from_files(tmp_path, capsys, layout):
    source = tmp_path / "tldr"
    for name, rows in (("comparisons", COMPARISONS), ("sft", [post("four")])):
        folder = source / name if layout == "folders" else source
        folder.mkdir(parents=True, exist_ok=True)
        put(folder, json.dumps(rows), "part.json" if layout == "folders" else f"{name}.json")
    assert equal_in_any_order(prepared(tmp_path, "tldr", source), TLDR)
    out = capsys.readouterr().out
    assert "1 comparisons skipped: of news" in out and "2 held-out prompts left out" in out


def test_summaries_from_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = {
        ("openai/summarize_from_feedback", "comparisons", "train+validation"): COMPARISONS,
        ("UCL-DARK/openai-tldr-filtered", None, "train"): [post("four")],
    }
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, *, name, split: datasets.Dataset.from_list(hub[path, name, split])
    )
    assert equal_in_any_order(prepared(tmp_path, "tldr", "openai/summarize_from_feedback"), TLDR)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        comparison("x") | {"choice": 2},
        comparison("x") | {"summaries": [{"text": "a"}]},
        comparison("x", title=None),
        comparison("x", post=None),
    ],
)
def test_a_row_that_is_no_comparison_is_refused(tmp_path, row):
    put(tmp_path, [post("four")], "sft.jsonl")
    path = put(tmp_path, [comparison("one"), row], "comparisons.jsonl")
    assert refused(tmp_path, "tldr", tmp_path).startswith(f"{path}:2: expected a comparison with info")


# Preferences of any format.


def dialogue(n: int) -> dict:
    shared = f"{H} question {n}?{A}"
    return {"chosen": f"{shared} a good answer", "rejected": f"{shared} a bad one"}


def test_dialogues_of_one_file(tmp_path):
    rows = [dialogue(n // 2) for n in range(40)]  # two of each question
    made = prepared(tmp_path, "preferences", put(tmp_path, rows))
    assert is_disjoint(made)
    assert (len(made["test"]), len(made["prompts"]), len(made["sft"]), len(made["pairs"])) == (2, 18, 18, 36)
    train_prompts = prompts(made["prompts"])
    assert train_prompts | prompts(made["test"]) == {f"{H} question {n}?{A}" for n in range(20)}
    assert train_prompts == prompts(made["sft"]) == prompts(made["pairs"])
    assert {row["completion"] for row in made["sft"]} == {row["chosen"] for row in made["test"]} == {" a good answer"}
    assert {(row["chosen"], row["rejected"]) for row in made["pairs"]} == {(" a good answer", " a bad one")}


def test_a_directory_with_parts_and_prompts(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    put(source, [dialogue(n) for n in range(3)], "train.jsonl")
    put(source, [dialogue(n) for n in (2, 7)], "test.jsonl")
    put(source, [{"prompt": "only asked"}, {"prompt": f"{H} question 7?{A}"}], "prompts.jsonl")
    made = prepared(tmp_path, "preferences", source)
    assert is_disjoint(made)
    assert prompts(made["test"]) == {f"{H} question 7?{A}"}
    assert prompts(made["pairs"]) == {f"{H} question {n}?{A}" for n in range(3)}
    assert prompts(made["prompts"]) == {"only asked"}


def test_the_best_of_scored_completions_is_chosen(tmp_path):
    rows = [{"prompt": f"p{n}", "completions": [" a", " b", " c"], "rewards": [0, 2, -1]} for n in range(4)]
    rows.append({"prompt": "even", "completions": [" a", " b"], "rewards": [1, 1]})
    made = prepared(tmp_path, "preferences", put(tmp_path, rows))
    assert is_disjoint(made) and len(made["pairs"]) == 3
    assert made["pairs"][0] | {"prompt": ""} == {"prompt": "", "chosen": " b", "rejected": " c"}
    assert made["test"][0]["chosen"] == " b"


def test_chat_messages_stay_messages(tmp_path):
    chats = [[{"role": "user", "content": f"question {n}"}] for n in range(3)]
    rows = [{"prompt": messages, "chosen": "yes", "rejected": "no"} for messages in chats]
    made = prepared(tmp_path, "preferences", put(tmp_path, rows))
    train_prompts = [row["prompt"] for row in made["pairs"]]
    assert len(train_prompts) == 2 and all(messages in chats for messages in train_prompts)
    assert made["test"][0]["prompt"] in chats and made["test"][0]["prompt"] not in train_prompts


def test_a_folder_on_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, *, split, **part):
        calls.append((path, part, split))
        return datasets.Dataset.from_list([dialogue(n) for n in range({"train": 4, "test": 8}[split])])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = prepared(tmp_path, "preferences", "Anthropic/hh-rlhf:helpful-base/")
    assert [call[2] for call in calls] == ["train", "test"]
    assert all(call[:2] == ("Anthropic/hh-rlhf", {"data_dir": "helpful-base"}) for call in calls)
    assert is_disjoint(made) and len(made["test"]) == 4


def test_the_real_dialogues(tmp_path):
    if not (folder := os.environ.get("EXO_SHARED_DATA")):
        pytest.skip("EXO_SHARED_DATA names no folder of real data")
    made = prepared(tmp_path, "preferences", Path(folder) / "hh_harmless_base_test.jsonl.gz")
    assert is_disjoint(made)
    assert len(made["pairs"]) > 2000 and 200 < len(made["test"]) < 240
    assert all(row["prompt"].endswith(A) for row in made["pairs"] + made["test"])


# Sources and options that cannot be used.


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("imdb", "expected train/pos, train/neg, test/pos and test/neg"),
        ("polarity", "expected a directory with rt_polarity.pos and rt_polarity.neg"),
        ("tldr", "expected openai/summarize_from_feedback, or a directory with comparisons.* and sft.*"),
        ("preferences", "expected a directory of data files alone"),
    ],
)
def test_an_unknown_layout_is_refused_in_one_line(tmp_path, tokenizer, task, expected):
    source = tmp_path / "source"
    source.mkdir()
    put(source, "notes", "notes.md")
    options = {"tokenizer": tokenizer} if task == "imdb" else {}
    assert refused(tmp_path, task, source, **options).startswith(f"{source}: {expected}")


def test_an_incomplete_archive_is_refused(tmp_path, tokenizer):
    source = unpacked(tmp_path)
    for file in (source / "test" / "neg").iterdir():
        file.unlink()
    assert f"{source / 'test' / 'neg'}: expected the .txt files of aclImdb" in refused(
        tmp_path, "imdb", source, tokenizer=tokenizer
    )


@pytest.mark.parametrize(("name", "encoding"), [("rt_polarity.neg", "cp1252"), ("train/neg/0_7.txt", "utf-8")])
def test_another_encoding_names_the_file(tmp_path, tokenizer, name, encoding):
    task, options = ("polarity", {}) if encoding == "cp1252" else ("imdb", {"tokenizer": tokenizer})
    source = unpacked(tmp_path) if task == "imdb" else sentences(tmp_path, b"a good film , this one", b"")
    (source / name).write_bytes(b"it\x81s bad")
    assert refused(tmp_path, task, source, **options) == f"{source / name}: not {encoding} (byte 3)"


def test_unsuitable_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--source: expected the files of the task; got None"):
        prepare.Config(task="preferences")
    with pytest.raises(ValueError, match="--tokenizer: expected a model, whose tokenizer cuts the texts; got None"):
        prepare.Config(task="imdb", source="x")
    with pytest.raises(ValueError, match="--tokenizer: expected none, because this task needs none; got 'gpt2'"):
        prepare.Config(task="tldr", source="x", tokenizer="gpt2")
    with pytest.raises(ValueError, match="--tokenizer: expected a model whose first 10 tokens .*; got 'tiny'"):
        prepare.run(prepare.Config(task="imdb", source="x", tokenizer="tiny", output_dir=str(tmp_path / "out")))


def test_one_prompt_is_not_enough(tmp_path):
    message = refused(tmp_path, "preferences", put(tmp_path, [dialogue(1)] * 3))
    assert "expected two prompts at least" in message


def test_every_task_is_listed():
    assert list(TASKS) == ["quickstart", "polarity", "imdb", "tldr", "preferences"]
