"""The inspect command: statistics counted by hand, and the exit code and the error of the stage."""

import io
import json
import random
import shutil
import sys

import pytest

from exo import align, data, inspect, models, reward, sample, sft
from exo.cli import console
from exo.data import Example, preview, split, statistics
from exo.data.text.tokenize import TokenizedExample
from exo.runs import record as run_record
from tests.chat_templates import CHATML
from tests.data_files import put
from tests.tasks import write_model
from tests.tokenizer_kinds import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

# One token per word, and an end of sequence after each completion.
PAIRS = [
    {"prompt": "red round", "chosen": " good good", "rejected": " bad"},
    {"prompt": "red round", "chosen": " bad", "rejected": " good good"},
    {"prompt": "red round", "chosen": " good good", "rejected": " bad"},
    {"prompt": "blue", "chosen": " good", "rejected": " bad"},
    {"prompt": "green square big small", "chosen": " good", "rejected": " bad bad bad"},
]
SCORED = [
    {"prompt": "red", "completions": [" good", " good", " big"], "rewards": [1, 1, 0]},
    {"prompt": "green", "completions": [" good", " bad", " big"], "rewards": [0.5, 0.5, 0.5]},
    {"prompt": "blue", "completions": [" good", " bad", " big"], "rewards": [1, 2, 3]},
    {"prompt": "square", "completions": [" good", " bad"], "rewards": [0, -4]},
]
LABELLED = [{"text": "good big", "label": 1}, {"text": "bad", "label": 0}, {"text": "bad bad", "label": 0}]
CHATS = [
    {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "good"}]},
    {"messages": [{"role": "user", "content": "one<|im_end|>two"}, {"role": "assistant", "content": "bad"}]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("inspect") / "model")


@pytest.fixture
def report(capsys):
    """Return a function that runs the command and returns its exit code, its output and its error."""

    def run(*arguments):
        code = inspect.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write_config(directory, **settings):
    """Write the config.json of a small Llama, with other settings."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **small, **settings}))


def unusable_models(directory, model):
    """Return directories that no stage accepts as --model, each with the tokenizer of `model`."""
    settings = {
        "t5": {"model_type": "t5", "is_encoder_decoder": True},
        "bert": {"model_type": "bert"},
        "router": {"model_type": "mixtral", "output_router_logits": True},
        "rounded": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "unknown": {"model_type": "nobody's"},
        "text for a number": {"vocab_size": "x"},
        "text for positions": {"max_position_embeddings": "a"},
        "text for a config": {"text_config": "x"},
    }
    for name in (*settings, "broken", "list", "none"):
        shutil.copytree(model, directory / name, ignore=shutil.ignore_patterns("config.json"))
    for name, values in settings.items():
        write_config(directory / name, **values)
    (directory / "broken" / "config.json").write_text('{"model_type":')
    (directory / "list" / "config.json").write_text("[]")
    bases = {"itself": "itself", "one": "other", "other": "one", "lost": "nowhere", "null": None}
    for name, base in bases.items():
        (directory / name).mkdir()
        entries = {"base_model_name_or_path": base and str(directory / base)}
        (directory / name / "adapter_config.json").write_text(json.dumps(entries))
        (directory / name / "adapter_model.safetensors").touch()
    return [directory / name for name in (*settings, "broken", "list", "none", *bases)]


def too_small_models(directory, model):
    """Return directories of models that cannot be trained on PAIRS: one lacks positions, one lacks embeddings."""
    shutil.copytree(model, directory / "positions")
    config = json.loads((directory / "positions" / "config.json").read_text())
    (directory / "positions" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    write_model(directory / "embeddings", words=["red", "round"])
    models.load_tokenizer(model).save_pretrained(directory / "embeddings")
    return [directory / "positions", directory / "embeddings"]


def test_statistics_equal_those_counted_by_hand(report, tmp_path, model):
    pairs, scored = put(tmp_path, PAIRS, "pairs.jsonl"), put(tmp_path, SCORED, "scored.jsonl")
    code, out, err = report("--data", pairs, "--model", model, "--eval_fraction", 0, "--batch_size", 2)
    assert (code, err) == (0, "")
    for line in (
        "prompt: median 2, 95th percentile 4, longest 4",
        "completion, its end included: median 2, 95th percentile 4, longest 4",
        "prompt and longest completion: median 5, 95th percentile 8, longest 8; 0 over --max_length 1024",
        "the limits cut nothing",
        "completions of a row: 2 (5 rows)",
        "tokens: chosen 2.4, rejected 2.6 on average",
        "the chosen is longer in 2 of 5 rows (40.0%), as long in 1",
        "rows equal to an earlier one: 1 (line 3 = line 1)",
        "prompts of several rows: 1, in 3 rows",
        "rows that prefer what an earlier one rejects: 2 (line 2 = line 1, line 3 = line 2)",
    ):
        assert line in out.splitlines(), line
    assert out.endswith("\nTraining would start: 5 rows, 3 steps of 2\n")
    code, out, _ = report("--data", scored, "--model", model, "--eval_fraction", 0)
    assert code == 0
    for line in (
        "completions of a row: 2 (1 rows), 3 (3 rows)",
        "rewards: -4 to 3, median 0.5",
        "ties: all rewards equal in 1 of 4 rows (25.0%); the best is a tie in 1 more",
        "rows with a completion repeated: 1",
    ):
        assert line in out.splitlines(), line


def test_effects_of_the_length_limits(report, tmp_path, model):
    pairs = put(tmp_path, PAIRS)
    limits = ("--max_completion_length", 2, "--truncate", "drop", "--eval_fraction", 0)
    code, out, _ = report("--data", pairs, "--model", model, *limits)
    assert code == 0 and "  4 rows dropped: over-long\n" in out
    assert "longest 4; 4 over --max_completion_length 2\n" in out and "6  <- --max_completion_length 2\n" in out
    assert "Training would start: 1 rows, 1 steps of 64" in out
    # The statistics are printed even if the limits leave no row, because they show which limits to set.
    code, out, err = report("--data", pairs, "--model", model, "--max_length", 4)
    assert code == 2 and "raise --max_length" in err and "longest 8; 4 over --max_length 4\n" in out
    assert "line 1 (first row, 5 tokens)" in out


def test_held_out_texts_that_are_trained_on_are_named(report, tmp_path, model):
    pairs = put(tmp_path, PAIRS, "pairs.jsonl")
    held_out = [
        {"prompt": "blue", "chosen": " small", "rejected": " big"},
        {"prompt": "square", "chosen": " good good\n", "rejected": " big"},
        # prompt and completion together are the text of line 1
        {"prompt": "red", "chosen": " round good good", "rejected": " big"},
        {"prompt": "small", "chosen": " round", "rejected": " big"},
    ]
    code, out, _ = report("--data", pairs, "--model", model, "--eval_data", put(tmp_path, held_out, "test.jsonl"))
    assert code == 0
    assert "held-out rows with a prompt of --data: 1 of 4 (line 1 = line 4)\n" in out
    leaks = statistics.find_leaks(data.read(pairs).examples, data.read(tmp_path / "test.jsonl").examples)
    assert leaks.completions == [("line 2", "line 1"), ("line 3", "line 1")]
    implicit = put(tmp_path, [{"chosen": "red round good good", "rejected": "red big"}], "implicit.jsonl")
    leaks = statistics.find_leaks(data.read(pairs).examples, data.read(implicit).examples)
    assert leaks.completions == [("line 1", "line 1")], "the same text with its prompt cut elsewhere"
    prompts = put(tmp_path, [{"prompt": "blue"}, {"prompt": "big"}, {"prompt": ""}], "prompts.jsonl")
    for stage in ("sft", "reward", "sample"):
        code, out, _ = report("--stage", stage, "--data", pairs, "--model", model, "--eval_data", prompts)
        assert code == 0 and "held-out rows with a prompt of --data: 1 of 3 (line 1 = line 4)\n" in out


def test_leaks_agree_with_the_shared_rows_that_align_warns_of():
    texts = ["", "red", "red ", " red", "blue", "red blue", "\n"]
    rng = random.Random(0)
    for _ in range(200):
        rows = [
            Example(rng.choice(texts), (rng.choice(texts[1:]), rng.choice(texts[1:])), None, i) for i in range(1, 7)
        ]
        trained, held_out = rows[:3], rows[3:]
        leaks = statistics.find_leaks(trained, held_out)
        assert len({row for row, _ in leaks.prompts + leaks.completions}) == split.count_shared(trained, held_out), rows
        prompts = {row.prompt.strip() for row in trained if row.prompt}
        same_prompt = [row.prompt and row.prompt.strip() in prompts for row in held_out]
        assert {row for row, _ in leaks.prompts} >= {f"line {i}" for i, same in enumerate(same_prompt, 4) if same}


def test_every_stage(report, tmp_path, model):
    files = {"pairs": PAIRS, "scored": SCORED, "labelled": LABELLED}
    paths = {name: put(tmp_path, rows, f"{name}.jsonl") for name, rows in files.items()}
    for stage, name, options, end in (
        (
            "align",
            "scored",
            ["--target", "pref", "--eval_fraction", "0"],
            "Training would start: 3 rows, 1 steps of 64",
        ),
        ("align", "scored", ["--max_completions", "2", "--max_steps", "7"], "2 rows, 7 steps of 64"),
        ("sft", "pairs", ["--num_train_epochs", "3", "--batch_size", "5"], "5 rows, 3 steps of 5"),
        ("sft", "pairs", ["--data_weights", "2"], "5 rows, 1 steps of 64"),
        ("reward", "scored", ["--eval_fraction", "0"], "3 rows, 1 steps of 64"),
        ("reward", "labelled", ["--labels", "--eval_fraction=0"], "3 rows, 1 steps of 64"),
        ("sample", "pairs", ["--k", "3", "--first", "1"], "Sampling would start: 4 prompts x 3 completions"),
    ):
        code, out, err = report("--stage", stage, "--data", paths[name], "--model", model, *options)
        assert (code, err) == (0, "") and out.endswith(f"{end}\n"), (stage, name, out, err)
    assert not (tmp_path / "runs").exists() and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("stage", [align, sft, reward, sample], ids=lambda stage: stage.__name__)
def test_exit_code_and_error_are_those_of_the_stage(stage, report, capsys, tmp_path, model):
    name = stage.__name__.removeprefix("exo.")
    long = " " + " ".join(["good"] * 3000)
    cases = [
        ([], []),
        ([{"nothing": 1}], []),
        (b"\xff\xfe not JSON\n", []),
        ([PAIRS[0], {"prompt": "red"}] if name != "sample" else [PAIRS[0], {"chosen": 3}], []),
        ([PAIRS[0] | {"question": "which one is it"}], []),
        (PAIRS, ["--data_weights", "1,2"]),
        (PAIRS, ["--columns", "prompt=nowhere"]),
        (PAIRS, ["--model", str(tmp_path / "nowhere")]),
        (PAIRS, ["--data", str(tmp_path / "nowhere.jsonl")]),
    ]
    if name != "sample":
        cases.append(([PAIRS[0] | {"chosen": long, "rejected": f" bad {long}"}], ["--max_length", "5000"]))
        cases.append((PAIRS, ["--max_length", "4", "--truncate", "error"]))
        cases.append((PAIRS[:3], ["--max_length", "3", "--truncate", "drop"]))
    if name != "reward":
        cases.append((PAIRS, ["--chat_template", "always"]))
        cases.append((PAIRS, ["--template_kwargs", "[1]"]))
    if name in ("align", "sft"):
        cases.append((PAIRS, ["--model", "tinny"]))
        cases.append((PAIRS, ["--model", "tiny", "--lora_r", "2", "--lora_output", "adapter"]))
    if name == "align":
        cases.append((PAIRS, ["--target", "rw"]))
        cases.append((PAIRS, ["--eval_data", str(put(tmp_path, [], "empty.jsonl"))]))
    if name == "reward":
        cases.append((LABELLED[1:], ["--labels"]))
    if name == "sample":
        cases.append((PAIRS, ["--first", "5"]))
    (tmp_path / "models").mkdir()
    unusable = unusable_models(tmp_path / "models", model)
    unusable += too_small_models(tmp_path / "models", model) if name != "sample" else []
    cases += [(PAIRS, ["--model", str(path)]) for path in unusable]
    if name == "align":
        cases += [(PAIRS, ["--ref_model", str(path)]) for path in unusable if path.name != "embeddings"]
        other = write_model(tmp_path / "other", words=["red", "round"])
        cases.append((PAIRS, ["--ref_model", other]))
        cases.append((PAIRS, ["--ref_model", model, "--reference", "none"]))
    for i, (rows, options) in enumerate(cases):
        arguments = ["--data", str(put(tmp_path, rows)), "--model", model, *options]
        assert stage.main([*arguments, "--output_dir", str(tmp_path / f"run-{i}"), "--device", "cpu"]) == 2, options
        expected = capsys.readouterr().err
        code, out, err = report("--stage", name, *arguments)
        assert (code, err) == (2, expected), options
        work = "Sampling" if name == "sample" else "Training"
        assert out.endswith(f"\n{work} would not start: {err.removeprefix('error: ')}"), options


def test_renamed_columns_may_be_absent_from_the_held_out_file(report, capsys, tmp_path, model):
    renamed = [{"prompt": row["prompt"], "better": row["chosen"], "rejected": row["rejected"]} for row in PAIRS]
    data_file, held_out = put(tmp_path, renamed, "renamed.jsonl"), put(tmp_path, PAIRS[:2], "test.jsonl")
    arguments = ["--data", data_file, "--model", model, "--columns", "chosen=better", "--eval_data", held_out]
    assert (
        align.main([*map(str, arguments), "--max_steps", "1", "--device", "cpu", f"--output_dir={tmp_path}/run"]) == 0
    )
    for stage in ("align", "sft", "reward"):
        assert report("--stage", stage, *arguments)[0] == 0, stage
    held_out = tmp_path / "nowhere.jsonl"
    assert align.main([*map(str, arguments[:-1]), str(held_out), f"--output_dir={tmp_path}/other"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --eval_data {held_out}: no such file")
    assert report(*arguments[:-1], held_out)[2].startswith(f"error: --eval_data {held_out}: no such file")


def test_warnings_of_the_stage_are_printed(report, tmp_path, model, monkeypatch):
    connected = [{"prompt": word, "chosen": " good", "rejected": " bad"} for word in ("red", "green", "blue", "big")]
    pairs = put(tmp_path, connected)
    for options, warning in (
        (
            ["--stage", "reward", "--eval_fraction", 0.5],
            "2 of 2 held-out rows share a completion with rows that are trained on",
        ),
        (
            ["--stage", "align", "--eval_fraction", 0.5],
            "2 of 2 held-out rows share a completion with rows that are trained on",
        ),
        (["--stage", "align", "--eval_data", pairs], "4 of 4 held-out rows share a prompt or a completion with --data"),
    ):
        monkeypatch.setattr(console, "_warned", set())
        code, out, _ = report("--data", pairs, "--model", model, *options)
        warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
        assert code == 0 and len(warnings) == 1 and warning in warnings[0], options


def test_templates_show_the_same_date_as_in_the_stage(report, tmp_path):
    """Check that the date is that of the resumed run, or of the run that made the model, and not today's."""
    tokenizer = KINDS["byte-level, no BOS (GPT-2, Qwen)"]()
    tokenizer.save_pretrained(tmp_path / "model")
    write_config(tmp_path / "model", vocab_size=len(tokenizer))
    template = put(tmp_path, "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}.{% endfor %}", "t")
    arguments = ["--data", put(tmp_path, PAIRS), "--model", tmp_path / "model", "--chat_template", template]
    arguments += ["--output_dir", tmp_path / "run"]
    options = align.Config(model="m", data="d")
    run_record.write_run(tmp_path / "model", options, "sft", template_date="2020-02-03", finished="then")
    assert "2020-02-03" in report(*arguments)[1]
    (tmp_path / "run").mkdir()
    run_record.write_run(tmp_path / "run", options, "align", template_date="2021-03-04")
    assert "2021-03-04" in report(*arguments)[1]
    assert "2020-02-03" in report(*arguments, "--overwrite_output_dir")[1]


def test_one_row_and_an_unfinished_input(report, tmp_path, model):
    code, out, _ = report("--data", put(tmp_path, PAIRS[:1]), "--model", model)
    assert code == 0 and out.count("line 1 (") == 1 and out.endswith("would start: 1 rows, 1 steps of 64\n")
    assert "duplicates: none\n" in out
    run = tmp_path / "scoring"
    run.mkdir()
    run_record.write_run(run, align.Config(model="m", data="d"), "score", makes="scored.jsonl")
    code, out, err = report("--data", run, "--model", model)
    assert code == 2 and "its run did not finish" in err and err.removeprefix("error: ") in out


def test_a_model_without_weights_is_enough(report, tmp_path):
    """Check that no weights are read, and that an adapter uses its tokenizer or that of its base model."""
    pairs = put(tmp_path, PAIRS)
    model = tmp_path / "model"
    write_model(model)
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    assert report("--data", pairs, "--model", model)[0] == report("--data", pairs, "--model", adapter)[0] == 0
    (adapter / "adapter_config.json").write_text("[]")
    code, _, err = report("--data", pairs, "--model", adapter)
    assert code == 2 and len(err.splitlines()) == 1
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    tokenizer = models.load_tokenizer(str(model))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(adapter)
    code, out, _ = report("--data", pairs, "--model", adapter)
    assert code == 0 and "the tokenizer has a chat template" in out


def test_chats_show_their_special_tokens_and_how_a_turn_ends(report, tmp_path):
    tokenizer = KINDS["byte-level, no BOS (GPT-2, Qwen)"]()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    write_config(tmp_path / "chat", vocab_size=len(tokenizer))
    chats, pairs = put(tmp_path, CHATS, "chats.jsonl"), put(tmp_path, PAIRS, "pairs.jsonl")
    code, out, _ = report("--stage", "sft", "--data", chats, "--model", tmp_path / "chat")
    assert code == 0 and "chat template: the tokenizer's; a turn ends with '<|im_end|>'\n" in out
    flat = " ".join(out.split())
    assert r"'<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n'" in flat and "[['good<|im_end|>']]" in flat
    assert "control tokens in chat messages, which are read as plain text: 1 rows\n" in out
    _, out, _ = report("--data", pairs, "--model", tmp_path / "chat", "--chat_template", "plain")
    assert "chat template: plain; it ends no turn with a token, so a completion ends with '</s>'\n" in out
    _, out, _ = report("--data", pairs, "--model", tmp_path / "chat", "--chat_template", "none")
    assert "chat template: not used, texts are read as they are; a completion ends with '</s>'\n" in out
    code, _, err = report("--data", pairs, "--model", "tiny", "--chat_template", "jinja?")
    assert code == 2 and err.startswith("error: --chat_template jinja?: expected a file")


def test_color_is_used_only_on_terminals(report, tmp_path, model, monkeypatch):
    pairs = put(tmp_path, [{"prompt": "red \x1b[31m", "chosen": "good \x1b[0m", "rejected": "bad"}])
    code, out, _ = report("--data", pairs, "--model", "tiny")
    assert code == 0 and "\x1b" not in out and r"[['good \x1b[0m<eos>']]" in out
    _, out, _ = report("--data", pairs, "--model", model, "--color", "always")
    assert out.count(preview.SCORED) == out.count(preview.PLAIN) > 0 and "[[" not in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert preview.is_colored("auto") and not preview.is_colored("never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not preview.is_colored("auto") and preview.is_colored("always")


def test_characters_outside_the_encoding_are_escaped(tmp_path, model, monkeypatch):
    path = put(
        tmp_path, [{"prompt": "rot", "chosen": "schön", "rejected": "\u4e2d\u6587 \ud83d\ude00"}], "r\u00e9d.jsonl"
    )
    for encoding in ("ascii", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert inspect.main(["--data", str(path), "--model", "tiny"]) == 0
        stream.seek(0)
        out = stream.read()
        assert r"\u4e2d\u6587 \U0001f600" in out and "########" in out and "Training would start" in out


def test_options(report, tmp_path, model, capsys):
    """Check that options of the stage are accepted, also from a file, and that those of other stages are unknown."""
    pairs = put(tmp_path, PAIRS)
    recipe = put(tmp_path, f"data: {pairs}\nmodel: {model}\nlearning_rate: 1e-5\nexamples: 0\nnproc: 4\n", "o.yaml")
    code, out, _ = report("--config", recipe)
    assert code == 0 and "[[" not in out and "Training would start" in out, "one process, even if nproc is 4"
    code, _, err = report("--config", put(tmp_path, f"data: {pairs}\nmodel: {model}\nstage: sft\n", "s.yaml"))
    assert code == 2 and err.startswith("error: --stage")
    for bad in (["--stage", "ppo"], ["--stage", "sft", "--target", "rw"], ["--examples", "-1"], ["--max_length", "1"]):
        with pytest.raises(SystemExit) as caught:
            report("--data", pairs, "--model", model, *bad)
        assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_chosen_examples_and_shortened_texts():
    rows = [TokenizedExample((0,) * n, ((1,), (2,)), None, n) for n in (5, 9, 1, 3, 7)]
    assert [(e.reason, e.example.line) for e in preview.choose(rows, 3)] == [
        ("first row", 5), ("longest", 9),
    ], "the first row is the one of median length too"  # fmt: skip
    assert [e.example.line for e in preview.choose(rows[1:], 5)] == [9, 1 + 2, 7]
    assert [e.example.line for e in preview.choose(rows, 1)] == [5]
    assert preview.choose(rows, 0) == preview.choose([], 3) == []


def test_histograms_cover_every_length():
    for lengths in ([1], [7] * 9, list(range(1, 101)), [10] * 99 + [100_000], [0, 0, 3]):
        bins = statistics.histogram(lengths)
        assert sum(each.rows for each in bins) == len(lengths) and len(bins) <= 7
        for low, high, count in bins:
            assert count == sum(low <= n <= high for n in lengths)
    assert statistics.histogram(list(range(1, 101)))[0] == (0, 19, 19)
    assert statistics.percentile(range(1, 101), 0.95) == 95


def test_can_print(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert console.can_print("a") and not console.can_print("é")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert console.can_print("é")
    assert models.is_adapter(".") is False
