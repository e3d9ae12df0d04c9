"""Sheets for raters: they are blind and safe to open, and verdicts are counted exactly in any dialect of CSV."""

import csv
import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from exo import label
from exo.evaluation import raters, sheets

MATCHUPS = ("zeta:theta", "zeta:iota")
SYSTEMS = ("zeta", "theta", "iota")


def rows(path: Path, content: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return str(path)


def export(folder: Path, *argv: str, prompts: int = 6, name: str = "run") -> Path:
    files = [
        rows(folder / f"{n}.jsonl", [{"prompt": f"p{i}", "completions": [f"{i} by {k}"]} for i in range(prompts)])
        for k, n in enumerate(SYSTEMS)
    ]
    systems = ",".join(f"{n}={file}" for n, file in zip(SYSTEMS, files, strict=True))
    directory = folder / name
    flags = [f"--systems={systems}", f"--matchups={','.join(MATCHUPS)}", f"--output_dir={directory}", *argv]
    assert label.main(flags) == 0
    return directory


def import_sheets(folder: Path, run: Path, *argv: str) -> int:
    flags = [f"--sheets={run / 'sheets'}", f"--key={run / 'key.json'}", f"--output_dir={folder / 'counted'}"]
    return label.main(["--mode=import", "--overwrite_output_dir", *flags, *argv])


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "counted" / "label.json").read_text())


def sheet(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def fill(file: Path, rule, **dialect) -> None:
    """Write verdicts by `rule(row)`, in the given dialect of CSV."""
    filled = [row | {"verdict": rule(row)} for row in sheet(file)]
    with open(file, "w", encoding=dialect.pop("encoding", "utf-8"), newline="") as handle:
        writer = csv.DictWriter(handle, sheets.COLUMNS, **dialect)
        writer.writeheader()
        writer.writerows(filled)


def number(row: dict[str, str], column: str) -> int:
    """Return the index in SYSTEMS of the author of an answer; 0 is the first system of every matchup."""
    return int(row[column].split(" by ")[1])


def first_wins(row: dict[str, str]) -> str:
    return "1" if number(row, "answer 1") == 0 else "2"


def test_help_and_a_file_of_options(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        label.main(["--help"])
    assert stop.value.code == 0 and "--matchups" in capsys.readouterr().out
    file = tmp_path / "label.yaml"
    file.write_text("raters: 1\nlimit: 2\n")
    assert len(sheet(export(tmp_path, "--config", str(file)) / "sheets" / "rater-1.csv")) == 4


# Export.


def test_every_rater_judges_every_item_in_a_different_order(tmp_path):
    run = export(tmp_path)
    files = sorted((run / "sheets").glob("*.csv"))
    assert [file.name for file in files] == ["rater-1.csv", "rater-2.csv", "rater-3.csv"]
    orders = [[row["item"] for row in sheet(file)] for file in files]
    key = json.loads((run / "key.json").read_text())
    assert all(sorted(order) == sorted(key["items"]) for order in orders) and len(key["items"]) == 12
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(tuple(row) == sheets.COLUMNS and row["verdict"] == "" for row in sheet(files[0]))
    assert "Helpfulness" in (run / "sheets" / "instructions.txt").read_text()


def test_the_key_names_the_system_of_each_side_and_sides_are_balanced(tmp_path):
    run = export(tmp_path)
    key = json.loads((run / "key.json").read_text())["items"]
    for row in sheet(run / "sheets" / "rater-1.csv"):
        about = key[row["item"]]
        assert [SYSTEMS[number(row, side)] for side in sheets.SIDES] == [about[side] for side in sheets.SIDES]
        assert set(about["matchup"].split(":")) == {about[side] for side in sheets.SIDES}
        assert row["instruction"] == f"p{about['line'] - 1}"
    sides = Counter((about["matchup"], about["answer 1"] == "zeta") for about in key.values())
    assert set(sides.values()) == {3} and len(sides) == 4


def test_the_sheets_name_no_system(tmp_path):
    run = export(tmp_path)
    seen = b"".join(str(file.name).encode() + file.read_bytes() for file in (run / "sheets").iterdir()).decode()
    assert not any(name in seen for name in SYSTEMS)


def test_sheets_cannot_be_unblinded_with_the_systems_files_and_the_seed(tmp_path, monkeypatch):
    """Check that the names and the sides of items depend on a secret salt, and not on the files and the seed alone."""
    salts = iter(["a" * 32, "b" * 32])  # fixed, because two random ones may give the same sides
    monkeypatch.setattr(label.secrets, "token_hex", lambda size: next(salts))
    runs = [export(tmp_path, name=name) for name in ("one", "same")]
    keys = [json.loads((run / "key.json").read_text()) for run in runs]
    assert not keys[0]["items"].keys() & keys[1]["items"].keys() and keys[0]["salt"] != keys[1]["salt"]
    sides = [{(about["matchup"], about["line"]): about["answer 1"] for about in key["items"].values()} for key in keys]
    assert sides[0].keys() == sides[1].keys() and sides[0] != sides[1]
    for item, about in keys[0]["items"].items():
        row = next(row for row in sheet(runs[0] / "sheets" / "rater-1.csv") if row["item"] == item)
        shown = {column: row[column] for column in ("instruction", "reference answer", *sheets.SIDES)}
        unsalted = hashlib.sha256(json.dumps([about, shown]).encode()).hexdigest()[:10]
        assert item != f"q{unsalted}"
    seen = b"".join(file.read_bytes() for file in (runs[0] / "sheets").iterdir()).decode()
    assert keys[0]["salt"] not in seen


def test_references_limit_and_seed(tmp_path):
    references = rows(tmp_path / "ref.jsonl", [{"prompt": f"p{i}", "completion": f"ref {i}"} for i in range(5)])
    runs = {
        name: sheet(export(tmp_path, f"--references={references}", "--limit=3", seed, name=name) / "sheets/rater-1.csv")
        for name, seed in {"one": "--seed=1", "same": "--seed=1", "two": "--seed=2"}.items()
    }
    shown = {name: {row["instruction"] for row in sheet_rows} for name, sheet_rows in runs.items()}
    assert shown["one"] == shown["same"] != shown["two"]
    assert len({row["instruction"] for row in runs["one"]}) == 3 and len(runs["one"]) == 6
    assert all(row["reference answer"] == f"ref {row['instruction'][1:]}" for row in runs["one"])


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_cell_is_a_formula(tmp_path, text):
    assert sheets.escape_formula(text) == "'" + text
    file = tmp_path / "s.csv"
    sheets.write(
        file, [{"item": "q1", "instruction": text, "answer 1": 'a "quoted", one\nof two lines', "answer 2": "é"}]
    )
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    assert sheet(file)[0]["instruction"] == "'" + text and sheet(file)[0]["answer 1"] == 'a "quoted", one\nof two lines'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--systems=a=x,a=y", "--matchups=a:b"], "--systems: expected name=FILE"),
        (["--systems=a=x,b", "--matchups=a:b"], "--systems: expected name=FILE"),
        (["--systems=a=x,b=y", "--matchups=a:c"], "--matchups: expected name:name,... of a, b"),
        (["--systems=a=x,b=y", "--matchups=a:a"], "--matchups: expected"),
        (["--systems=a=x,b=y", "--matchups=a:b,b:a"], "every matchup once"),
        (["--mode=import", "--sheets=x"], "--key: expected a value for --mode import"),
    ],
)
def test_unusable_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        label.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_export_does_not_remove_its_inputs(tmp_path, capsys):
    run = export(tmp_path)
    source = rows(run / "mine.jsonl", [{"prompt": "p0", "completions": ["x"]}])
    flags = [f"--systems=a={source},b={tmp_path / 'iota.jsonl'}", "--matchups=a:b", f"--output_dir={run}"]
    assert label.main([*flags, "--overwrite_output_dir"]) == 1
    assert "holds" in capsys.readouterr().err and Path(source).exists()


# Import.


@given(data=st.data(), prompts=st.integers(1, 4), num_raters=st.integers(1, 3))
@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes
def test_verdicts_are_counted_as_filled_in(data, prompts, num_raters):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = export(folder, f"--raters={num_raters}", prompts=prompts)
        names = sorted(json.loads((run / "key.json").read_text())["items"])
        outcome = st.sampled_from(["win", "tie", "lose", "", "?"])
        verdicts = {(item, r): data.draw(outcome) for item in names for r in range(1, num_raters + 1)}
        verdicts[names[0], 1] = "win"  # at least one
        matchups = {}
        for r in range(1, num_raters + 1):

            def rule(row, r=r):
                matchups[row["item"]] = MATCHUPS[0] if 1 in (number(row, s) for s in sheets.SIDES) else MATCHUPS[1]
                side = {"win": first_wins(row), "lose": "12".replace(first_wins(row), "")}
                return side.get(verdicts[row["item"], r], verdicts[row["item"], r])

            fill(run / "sheets" / f"rater-{r}.csv", rule)
        assert import_sheets(folder, run) == 0
        summary = read_summary(folder)
    for matchup in MATCHUPS:
        items = [[verdicts[i, r] for r in range(1, num_raters + 1)] for i in names if matchups[i] == matchup]
        outcomes = Counter(w for item in items for w in item if w not in ("", "?"))
        pooled = summary["matchups"][matchup]["pooled"]
        assert outcomes == Counter() if pooled is None else outcomes == Counter({n: pooled[n] for n in raters.OUTCOMES})
    for kind, mark in (("missing", ""), ("unreadable", "?")):
        left_out = {(entry["item"], f"{entry['rater']}") for entry in summary[kind]}
        assert left_out == {(item, f"rater-{r}") for (item, r), w in verdicts.items() if w == mark}


DIALECTS = {
    "semicolons": {"delimiter": ";"},
    "tabs in UTF-16": {"delimiter": "\t", "encoding": "utf-16"},
    "everything quoted, with a BOM": {"quoting": csv.QUOTE_ALL, "encoding": "utf-8-sig"},
    "unix line ends": {"lineterminator": "\n"},
    "another encoding": {"encoding": "cp1252"},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_sheets_in_other_dialects_are_read(tmp_path, name):
    run = export(tmp_path, "--raters=1")
    file = run / "sheets" / "rater-1.csv"
    noisy = [
        row | {"instruction": 'é; "x",\r\n=1', "verdict": {"1": " 1.0 ", "2": "2"}[first_wins(row)]}
        for row in sheet(file)
    ]
    dialect = dict(DIALECTS[name])
    with open(file, "w", encoding=dialect.pop("encoding", "utf-8"), newline="") as handle:
        writer = csv.DictWriter(handle, sheets.COLUMNS, **dialect)
        writer.writeheader()
        writer.writerows(noisy)
        handle.write("\r\n")
    assert import_sheets(tmp_path, run) == 0
    for matchup in read_summary(tmp_path)["matchups"].values():
        assert (matchup["pooled"]["win"], matchup["pooled"]["lose"]) == (6, 0)
    assert not read_summary(tmp_path)["missing"] and not read_summary(tmp_path)["unreadable"]


def test_columns_may_be_moved_and_rows_sorted(tmp_path):
    run = export(tmp_path, "--raters=1")
    file = run / "sheets" / "rater-1.csv"
    fill(file, first_wins)
    sorted_rows = sorted(sheet(file), key=lambda row: row["item"])
    text = "".join(f"{row['verdict']},,{row['item']}\n" for row in sorted_rows)
    file.write_text("Verdict,extra,Item\n" + text)
    assert import_sheets(tmp_path, run) == 0
    assert read_summary(tmp_path)["matchups"][MATCHUPS[1]]["pooled"]["win"] == 6


@pytest.mark.parametrize("change", ["edited", "twice", "other export", "no header"])
def test_sheets_that_do_not_match_the_key_are_refused(tmp_path, capsys, change):
    run = export(tmp_path, "--raters=1")
    file = run / "sheets" / "rater-1.csv"
    fill(file, first_wins)
    lines = file.read_text().splitlines()
    if change == "other export":
        other = export(tmp_path, "--seed=7", name="other") / "sheets" / "rater-1.csv"
        lines = other.read_text("utf-8-sig").splitlines()
    edited = {"edited": [*lines[:2], "x" + lines[2]], "twice": [*lines, lines[3]], "no header": lines[1:]}
    file.write_text("\n".join(edited.get(change, lines)))
    assert import_sheets(tmp_path, run) == 2
    message = {
        "edited": "rater-1.csv:3: item 'xq",
        "twice": "appears twice",
        "other export": "is not in the key; do not edit the column 'item'",
        "no header": "rater-1.csv:1: expected a CSV file",
    }[change]
    assert message in capsys.readouterr().err and not (tmp_path / "counted").exists()


def test_a_deleted_row_is_missing_and_empty_sheets_are_an_error(tmp_path, capsys):
    run = export(tmp_path)
    assert import_sheets(tmp_path, run) == 2 and "no verdict could be read" in capsys.readouterr().err
    fill(run / "sheets" / "rater-2.csv", first_wins)
    file = run / "sheets" / "rater-2.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]))
    assert import_sheets(tmp_path, run, f"--sheets={file}") == 0
    assert read_summary(tmp_path)["missing"] == [{"item": lines[-1].split(",")[0], "rater": "rater-2"}]
    assert read_summary(tmp_path)["raters"] == ["rater-2"]
    out = capsys.readouterr().out
    assert "1 sheets of 3: rater-2" in out and "agreement undefined: no item has two verdicts" in out
    assert f"1 missing verdicts, left out: {lines[-1].split(',')[0]} of rater-2" in out


def test_the_printed_table(tmp_path, capsys):
    run = export(tmp_path)
    for r in (1, 2, 3):
        fill(run / "sheets" / f"rater-{r}.csv", first_wins)
    assert import_sheets(tmp_path, run) == 0
    out = capsys.readouterr().out
    assert "pairs of raters agree 100.0%, Fleiss' kappa undefined: all verdicts are equal" in out
    assert " ".join(["zeta:theta", "pooled", "18", "0", "0", "100.0%"]) in " ".join(out.split())
    assert read_summary(tmp_path)["matchups"][MATCHUPS[0]]["kappa"] is None


def test_two_sheets_of_one_name_and_an_invalid_key_are_refused(tmp_path, capsys):
    run = export(tmp_path)
    file = run / "sheets" / "rater-1.csv"
    assert import_sheets(tmp_path, run, f"--sheets={file},{file}") == 2 and "the same name" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text('{"items": {"q1": {"matchup": "a:b"}}}')
    assert import_sheets(tmp_path, run, f"--key={other}") == 2
    assert "expected the key.json that --mode export wrote" in capsys.readouterr().err


# Agreement and outcomes of all raters.


def test_kappa_of_a_worked_example():
    """Check ten items, fourteen raters and five categories: agreement 0.378, by chance 0.213, kappa 0.210."""
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    items = [[str(c) for c, n in enumerate(row) for _ in range(n)] for row in table]
    agreed, kappa = raters.agreement(items)
    assert agreed == pytest.approx(0.378, abs=5e-4) and kappa == pytest.approx(0.210, abs=5e-4)


def test_kappa_of_extreme_tables():
    assert raters.agreement([["win", "win"], ["lose", "lose"]]) == (1.0, 1.0)
    assert raters.agreement([["win", "lose"], ["lose", "win"]]) == (0.0, -1.0)
    assert raters.agreement([["win", "win"], ["lose"]]) == (1.0, None)
    assert raters.agreement([["win"], ["lose"]]) == (None, None)


def test_majority_and_pooled_views():
    items = [["win", "win", "lose"], ["win", "tie", "lose"], ["tie", "tie", "lose"], ["lose"]]
    most = raters.majority(items, seed=0)
    assert [most[name] for name in ("win", "tie", "lose", "split")] == [1, 1, 1, 1]
    assert most["win_rate"]["mean"] == (1 + 0.5 + 0.5 + 0) / 4
    pooled = raters.pool(items, seed=0)
    assert [pooled[name] for name in raters.OUTCOMES] == [3, 3, 4]
    assert pooled["win_rate"]["mean"] == pytest.approx((2 / 3 + 1 / 2 + 1 / 3 + 0) / 4)
    assert pooled["win_rate"]["low"] < pooled["win_rate"]["mean"] < pooled["win_rate"]["high"]


def test_sheets_of_real_data(tmp_path):
    """Check texts with quotes, formulas, several scripts and line breaks of every kind."""
    if not (folder := os.environ.get("EXO_SHARED_DATA")):
        pytest.skip("EXO_SHARED_DATA names no folder of real data")
    files = [Path(folder) / name for name in ("kway_rewards.jsonl", "kway_ragged.jsonl")]
    flags = [f"--systems=zeta={files[0]},iota={files[1]}", "--matchups=zeta:iota", "--raters=2", "--limit=none"]
    assert label.main([*flags, f"--output_dir={tmp_path / 'run'}"]) == 0
    verdicts = itertools.cycle(["1", "2", "tie"])
    for file in (tmp_path / "run" / "sheets").glob("*.csv"):
        fill(file, lambda row: next(verdicts), delimiter=";")
    assert import_sheets(tmp_path, tmp_path / "run") == 0
    summary = read_summary(tmp_path)
    pooled = summary["matchups"]["zeta:iota"]["pooled"]
    assert summary["missing"] == summary["unreadable"] == [] and summary["matchups"]["zeta:iota"]["items"] == 300
    assert pooled["tie"] == 200 and pooled["win"] + pooled["lose"] == 400


def test_more_sheets_than_raters_are_refused(tmp_path, capsys):
    """Check a copy under another name, which would count twice."""
    run = export(tmp_path, "--raters=1")
    (run / "sheets" / "rater-9.csv").write_bytes((run / "sheets" / "rater-1.csv").read_bytes())
    assert import_sheets(tmp_path, run) == 2
    assert "expected at most 1, one per rater; got 2" in capsys.readouterr().err
