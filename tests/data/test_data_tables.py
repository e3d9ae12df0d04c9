"""Tables and directories: parquet, csv, arrow, compressed files, shards, splits and names on the hub."""

import bz2
import datetime
import gzip
import json
import lzma
import re
import shutil
import sys

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from data_files import CANARY, GOOD, SCORED, put, refusal

from exo.data import DataError, Example, read, read_jsonl

pytestmark = pytest.mark.filterwarnings("error")  # a file left open warns

GOOD_GROUP = Example("p", (" a", " b"), None, 1)


def parquet(folder, columns, name="data.parquet"):
    table = pyarrow.table(columns) if isinstance(columns, dict) else pyarrow.Table.from_pylist(columns)
    pyarrow.parquet.write_table(table, folder / name)
    return folder / name


# Parquet.


def test_parquet_reads_as_the_lines_would(tmp_path):
    rows = [{**SCORED, "prompt": str(i), "day": datetime.date(2026, 1, 1), "raw": b"\xff"} for i in range(2500)]
    path = parquet(tmp_path, rows, "any.name")
    data = read(path)
    assert [example.line for example in data.examples] == list(range(1, 2501))
    assert data.examples[7] == Example("7", (" a", " b", " c"), (1.0, 0.5, -2.0), 8)
    assert data.format == "completions with rewards (prompt/completions/rewards), parquet"
    assert data.rows == 2500


INVALID = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"\xff" + CANARY.encode()]).buffers())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {**{key: ["x", "y"] for key in ("prompt", "chosen")}, "rejected": ["b", None]},
            "missing 'rejected'; the file began as preferences (prompt/chosen/rejected) (null: 'rejected')",
        ),
        ({"prompt": ["x", "y"], "chosen": ["a", "b"], "rejected": INVALID}, "not UTF-8"),
        (
            {"prompt": [b"x", b"y"], "chosen": ["a", "b"], "rejected": ["", ""]},
            "prompt must be a string, not of type bytes",
        ),
        (
            {"prompt": ["x", CANARY], "completions": [["a", "b"]] * 2, "rewards": [[1.0, 2.0], [float("nan"), 1.0]]},
            "rewards[0] is not finite",
        ),
        (
            {"prompt": ["x", CANARY], "completions": [["a", "b"]] * 2, "rewards": [[1.0, 2.0], [1.0, float("inf")]]},
            "rewards[1] is not finite",
        ),
        (
            {"prompt": ["x", CANARY], "completions": [["a", "b"]] * 2, "rewards": [[1.0, 2.0], [1.0, None]]},
            "rewards[1] must be a number, not null",
        ),
    ],
)
def test_a_malformed_row_of_a_table_is_named(tmp_path, columns, words):
    path = parquet(tmp_path, columns)
    message = refusal(path)
    first_row_too = "bytes" in words
    assert message.startswith(f"{path}:{1 if first_row_too else 2}: ") and words in message
    if not first_row_too:
        data = read(path, skip_invalid=True)
        assert data.skipped == {"malformed": 1} and [example.line for example in data.examples] == [1]


def test_damaged_parquet_is_refused_in_one_line(tmp_path):
    intact = parquet(tmp_path, [GOOD] * 50).read_bytes()
    flipped = bytes(byte ^ (0xFF if 4 <= i < 30 else 0) for i, byte in enumerate(intact))
    for content in (b"PAR1", intact[:-20], intact[: len(intact) // 2], flipped):
        for skip_invalid in (False, True):
            message = refusal(put(tmp_path, content, "cut.parquet"), skip_invalid=skip_invalid)
            assert message.startswith(f"{tmp_path}/cut.parquet: the parquet data is cut off or damaged: ")


def test_an_empty_table_and_twin_columns_are_refused(tmp_path):
    assert refusal(parquet(tmp_path, {"prompt": pyarrow.array([], "string")})).endswith("holds no rows")
    twins = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "chosen", "chosen"])
    pyarrow.parquet.write_table(twins, tmp_path / "twins.parquet")
    assert "column 'chosen' appears twice" in refusal(tmp_path / "twins.parquet")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, package):
    path = str(parquet(tmp_path, [GOOD])) if package == "pyarrow" else "owner/name"
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(path).endswith(f"needs {package}: pip install {package}")


def test_read_jsonl_refuses_tables(tmp_path):
    with pytest.raises(DataError, match="data.parquet:1: "):
        list(read_jsonl(parquet(tmp_path, [GOOD])))


# Directories of shards.


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    put(tmp_path, [{**GOOD, "prompt": "3"}, {**GOOD, "prompt": "4"}], "b.jsonl")
    parquet(tmp_path, [{**GOOD, "prompt": "1"}, {**GOOD, "prompt": "2"}], "a.parquet")
    put(tmp_path, f"[{json.dumps({**GOOD, 'prompt': '5'})}]", "c.json")
    put(tmp_path, "not data", ".hidden")
    data = read(tmp_path)
    assert [(example.prompt, example.line) for example in data.examples] == [(str(i), i) for i in range(1, 6)]
    assert data.format.endswith(", 3 JSON and parquet files") and data.path == str(tmp_path)


def test_a_malformed_row_of_a_shard_names_the_shard(tmp_path):
    put(tmp_path, [GOOD], "a.jsonl")
    bad = put(tmp_path, [GOOD, {"prompt": CANARY}], "b.jsonl")
    assert refusal(tmp_path).startswith(f"{bad}:2: ")
    assert read(tmp_path, skip_invalid=True).skipped == {"malformed": 1}


@pytest.mark.parametrize("extra", ["README.md", "sub"])
def test_a_directory_with_other_files_is_refused(tmp_path, extra):
    assert "a directory without a data file; accepted" in refusal(tmp_path)
    put(tmp_path, [GOOD])
    (tmp_path / extra).mkdir()
    message = refusal(tmp_path)
    assert "directory of data files alone (.jsonl, .json, .csv, " in message and f".arrow), found '{extra}'" in message


# Hub names.


@pytest.fixture
def hub(monkeypatch):
    """Replace the hub by one with a single data set; return the list of calls."""
    calls = []

    def load_dataset(path, *, name, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_list([GOOD, {**GOOD, "chosen": None}, GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/na-me_1.5:con.fig", ("owner/na-me_1.5", "con.fig", "train")),
        ("owner/name@test", ("owner/name", None, "test")),
        ("owner/name:config@train[:10%]", ("owner/name", "config", "train[:10%]")),
    ],
)
def test_a_hub_name_consists_of_name_config_and_split(hub, name, call):
    with pytest.raises(DataError, match=r"^owner/na\S*:2: missing 'chosen'; the file began as .* \(null: 'chosen'\)$"):
        read(name)
    data = read(name, skip_invalid=True)
    assert hub == [call] * 2
    assert data.examples == [GOOD_GROUP, Example("p", (" a", " b"), None, 3)] and data.skipped == {"malformed": 1}
    assert re.search(", from the hub, fingerprint [0-9a-f]+$", data.format)


def test_an_existing_path_precedes_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    put(tmp_path / "owner", [GOOD], "name")
    assert read("owner/name").examples == [GOOD_GROUP] and not hub
    for slip in ("owner/nam", "elsewhere/name.jsonl", "./owner/nam", "name", "a/b/c", "/owner/name", "owner/name@"):
        assert "no such file or directory" in refusal(slip)
    assert not hub
    shutil.rmtree("owner")
    read("owner/name", skip_invalid=True)
    assert hub


@pytest.mark.parametrize("error", [FileNotFoundError, ConnectionError, ValueError, RuntimeError])
def test_errors_of_the_hub_are_one_line(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error("Unknown split\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("owner/name@x") == "owner/name@x: no such path here, and from the hub: Unknown split"


def test_offline_mode_does_not_use_the_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was used"))
    assert "from the hub: Couldn't reach 'owner/name'" in refusal("owner/name")


def test_the_real_library_accepts_the_call(tmp_path, monkeypatch):
    """Call the real load_dataset, with a directory in place of the hub."""
    real = datasets.load_dataset
    (tmp_path / "repo").mkdir()
    put(tmp_path / "repo", [{**GOOD, "meta": {"score": None}}, GOOD], "train.jsonl")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **options: real(str(tmp_path / "repo"), cache_dir=tmp_path, **options)
    )
    assert read("owner/name").examples[0] == GOOD_GROUP
    assert "Unknown split" in refusal("owner/name@nope")
    assert "'config' not found" in refusal("owner/name:config")


# csv, tsv, compressed files, arrow, save_to_disk.

CSV = 'prompt,chosen,rejected,score\n"a, ""b""\nc",é,x,1\np2,y,z,\n'


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv_and_tsv_are_read_by_name(tmp_path, delimiter):
    text = CSV.replace("a, ", "a; ").replace(",", delimiter)
    path = put(tmp_path, "\ufeff" + text, "data.csv" if delimiter == "," else "data.tsv")
    data = read(path)
    assert data.examples == [Example('a; "b"\nc', ("é", "x"), None, 1), Example("p2", ("y", "z"), None, 2)]
    assert data.examples[0].source == f"{path}:3" and data.unread == ("score",)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("prompt,chosen,rejected\na,b\n", 2, "2 fields, and the header has 3"),
        (f"prompt,chosen,rejected\na,b,c,{CANARY}\n", 2, "4 fields"),
        ('prompt,chosen,rejected\na,b,"c\n', 2, "bad csv: unexpected end of data"),
        ('prompt,chosen,rejected\na,b,"c"d\n', 2, "bad csv: "),
        ("prompt;chosen;rejected\na;b;c\n", 1, "one column alone"),
        ("prompt,chosen,rejected\na,b,\udce9\n", 2, "not UTF-8"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, text, place, words):
    message = refusal(put(tmp_path, text.encode("utf-8", "surrogateescape"), "data.csv"))
    assert message.startswith(f"{tmp_path}/data.csv:{place}: ") and words in message


def test_twin_columns_of_a_csv_are_refused_and_an_empty_one_has_no_rows(tmp_path):
    assert "column 'prompt' appears twice" in refusal(put(tmp_path, "prompt,prompt\na,b\n", "data.csv"))
    assert "holds no rows" in refusal(put(tmp_path, "prompt,chosen,rejected\n", "data.csv"))
    assert "holds no rows" in refusal(put(tmp_path, "", "data.csv"))


def test_numbers_and_lists_of_a_csv(tmp_path):
    path = put(tmp_path, "text,label\ngood one,1\nbad one,0\n", "data.csv")
    assert [example.label for example in read(path, purpose="labels").examples] == [1, 0]
    row = 'p,"[""a"", ""b""]","[1, 2.5]"\n'
    path = put(tmp_path, "prompt,completions,rewards\n" + row, "data.csv")
    assert read(path).examples == [Example("p", ("a", "b"), (1.0, 2.5), 1)]


def test_compressed_files_are_detected_by_content(tmp_path):
    lines = (json.dumps(GOOD) + "\n").encode() * 3
    for name, compress in {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}.items():
        packed = compress(lines)
        assert len(read(put(tmp_path, packed, "a.jsonl.zst")).examples) == 3
        assert f"the {name} data is cut off or damaged" in refusal(put(tmp_path, packed[:-9], "a.jsonl"))
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(lines)
    assert len(read(tmp_path / "b.jsonl.zst").examples) == 3
    with pyarrow.CompressedOutputStream(str(tmp_path / "c.csv.zst"), "zstd") as file:
        file.write(CSV.encode())
    assert len(read(tmp_path / "c.csv.zst").examples) == 2
    intact = (tmp_path / "b.jsonl.zst").read_bytes()
    assert "the zstd data is cut off or damaged" in refusal(put(tmp_path, intact[:-6], "d.jsonl.zst"))
    assert "a zip archive; unpack it" in refusal(put(tmp_path, b"PK\x03\x04" + lines, "a.zip"))


def test_arrow_files_and_streams(tmp_path):
    table = pyarrow.Table.from_pylist([GOOD] * 3)
    for name, make in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        path = tmp_path / f"{name}.arrow"
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
        data = read(path)
        assert data.examples[0] == GOOD_GROUP and data.format.endswith(", arrow") and data.rows == 3
        assert "the arrow data is cut off or damaged" in refusal(put(tmp_path, path.read_bytes()[:-60], "cut.arrow"))


def test_directories_of_save_to_disk_are_read(tmp_path):
    part = datasets.Dataset.from_list([{**GOOD, "prompt": str(i)} for i in range(4)])
    part.select([3, 1]).save_to_disk(tmp_path / "one")
    assert [example.prompt for example in read(tmp_path / "one").examples] == ["3", "1"]
    assert "has no splits" in refusal(f"{tmp_path}/one@test")
    datasets.DatasetDict(train=part, test=part.select([0])).save_to_disk(tmp_path / "two")
    data = read(tmp_path / "two")
    assert len(data.examples) == 4 and data.format.endswith("save_to_disk, split train out of test, train")
    assert len(read(f"{tmp_path}/two@test").examples) == 1
    assert "expected one of the splits test, train" in refusal(f"{tmp_path}/two@valid")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "the directory of save_to_disk is damaged" in refusal(tmp_path / "one")


# Splits of a directory.


def test_only_the_train_split_of_a_directory_is_read(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation"):
        put(tmp_path, [{**GOOD, "prompt": name}], f"{name}.jsonl")
    put(tmp_path, "about it", "README.md")
    data = read(tmp_path)
    assert [example.prompt[:8] for example in data.examples] == ["train-00"] * 2
    assert data.format.endswith("2 JSON files of split train, out of test, train, validation")
    assert [example.prompt for example in read(f"{tmp_path}@validation").examples] == ["validation"]
    assert "found splits" in refusal(f"{tmp_path}@dev")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("test.jsonl", "valid.jsonl"), "'train'; found splits"),
        (("train.jsonl", "more.jsonl"), "and 'more.jsonl'; name one"),
        (("train_sft.jsonl", "test_sft.jsonl"), "@train_sft"),
    ],
)
def test_a_directory_with_ambiguous_splits_is_refused(tmp_path, names, words):
    for name in names:
        put(tmp_path, [GOOD], name)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize("names", [("a.jsonl", "b.jsonl"), ("part-0.jsonl", "part-1.jsonl"), ("testimony.jsonl",),
                                   ("test.jsonl",), ("my-train-1.jsonl", "my-train-2.jsonl")])  # fmt: skip
def test_every_file_of_a_directory_without_splits_is_read(tmp_path, names):
    for name in names:
        put(tmp_path, [GOOD], name)
    assert len(read(tmp_path).examples) == len(names)


def test_files_called_training_and_testing_are_splits(tmp_path):
    put(tmp_path, [GOOD], "training.jsonl")
    put(tmp_path, [GOOD | {"prompt": "another"}] * 2, "testing.jsonl")
    assert len(read(tmp_path).examples) == 1 and len(read(f"{tmp_path}@testing").examples) == 2
