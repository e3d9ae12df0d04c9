"""Blind comparison by human raters: sheets to fill in, and what the filled ones say.

python -m exo.label --systems exo=FILE,dpo=FILE --matchups exo:dpo --references FILE --output_dir DIR
python -m exo.label --mode import --sheets DIR/sheets --key DIR/key.json --output_dir DIR2
The protocol is the paper's: 100 instructions, every matchup of systems on each, 3 raters, win, tie or lose. Only
DIR/sheets goes to the raters; key.json alone says which answer is whose. Left out: how sheets travel and payment.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from exo.evaluation import answers as evaluation_answers

from exo.cli import console
from exo.cli.fields import at_least, option, require
from exo.cli.main import command
from exo.cli.options import Stage
from exo.runs.stage import Start, stage

SIDES = ("answer 1", "answer 2")


@dataclass(frozen=True)
class Config(Stage):
    output_dir: str = option("runs/label", "directory of the run")
    mode: Literal["export", "import"] = option("export", "make sheets, or count filled ones")
    systems: str | None = option(
        None, "export: name=FILE,name=FILE,... of samples, texts or preferences (their chosen)"
    )
    matchups: str | None = option(None, "export: name:name,name:name,...; results are from the first one's view")
    references: str | None = option(None, "export: texts to show as the reference answer")
    raters: int = option(3, "export: sheets to make, one a rater", at_least(1))
    limit: int | None = option(100, "export: prompts, chosen by seed; none means all", at_least(1))
    sheets: str | None = option(None, "import: directory of filled sheets, or files with commas between")
    key: str | None = option(None, "import: key.json of the export")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("systems", "matchups") if self.mode == "export" else ("sheets", "key"):
            require(bool(getattr(self, name)), name, f"a value for --mode {self.mode}", getattr(self, name))
        if self.mode == "export":
            self.pairs()

    def files(self) -> dict[str, str]:
        """The systems' files by name."""
        entries = [entry.partition("=")[::2] for entry in (self.systems or "").split(",")]
        names = [name for name, _ in entries]
        good = all(re.fullmatch(r"[\w.-]+", name) and file for name, file in entries) and len(set(names)) == len(names)
        require(good, "systems", "name=FILE,name=FILE,... with every name once", self.systems)
        return dict(entries)

    def pairs(self) -> list[tuple[str, str]]:
        """The matchups; each is two systems."""
        entries = [tuple(entry.split(":")) for entry in (self.matchups or "").split(",")]
        names = set(self.files())
        good = all(len(set(entry)) == len(entry) == 2 and set(entry) <= names for entry in entries)
        expected = f"name:name,... of {', '.join(sorted(names))}, every matchup once"
        require(good and len({frozenset(e) for e in entries}) == len(entries), "matchups", expected, self.matchups)
        return [(first, second) for first, second in entries]


@stage("label", reads=("references", "key"), makes="label.json")
def run(config: Config, start: Start) -> Path:
    """Make the sheets, or count them, and return the run directory."""
    return _export(config, start) if config.mode == "export" else _import(config, start)


def _export(config: Config, start: Start) -> Path:
    from exo.evaluation import answers as evaluation_answers
    from exo.evaluation import judge_prompts
    from exo.evaluation import raters as evaluation_raters
    from exo.runs import directory as run_directory
    from exo.runs import inputs as run_inputs
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_directory, write_json

    files = {name: evaluation_answers.source("systems", file) for name, file in config.files().items()}
    run_directory.check_inputs(config.output_dir, files.values())
    answers = {name: evaluation_answers.read(file) for name, file in files.items()}
    references = evaluation_answers.read_references(config.references)[0] if config.references else {}
    keys = evaluation_answers.shared(
        answers | ({"references": references} if references else {}), config.limit, config.seed
    )
    salt = secrets.token_hex(16)
    items = _items(config, salt, files, answers, references, keys)
    hashes = {name: run_inputs.fingerprint(file) for name, file in files.items()}
    directory = run_stage.begin(start, systems=hashes)
    write_json(directory / "key.json", {
        "matchups": [":".join(pair) for pair in config.pairs()],
        "raters": config.raters,
        "salt": salt,
        "items": {item: about for item, (about, _) in items.items()},
    })  # fmt: skip
    with atomic_directory(directory / "sheets") as staging:
        for rater in range(1, config.raters + 1):
            rows = [{"item": item} | texts for item, (_, texts) in items.items()]
            random.Random(f"{config.seed}/rater {rater}").shuffle(rows)
            evaluation_raters.write(staging / f"rater-{rater}.csv", rows)
        text = (judge_prompts.FOLDER / "raters.txt").read_text(encoding="utf-8")
        (staging / "instructions.txt").write_text(text, encoding="utf-8")
    run_stage.finish(directory, items=len(items))
    console.log(
        f"{len(items):,} items = {len(keys):,} prompts x {len(config.pairs())} matchups, for {config.raters} raters\n"
        f"for the raters: {directory / 'sheets'}   not for the raters: {directory / 'key.json'}"
    )
    return directory


def _items(
    config: Config,
    salt: str,
    files: Mapping[str, str],
    answers: Mapping[str, evaluation_answers.Answers],
    references: evaluation_answers.Answers,
    keys: Sequence[evaluation_answers.Key],
) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """By item: what the key says of it, and the texts shown.

    An item's name is a hash of all that, so that a sheet of another export does not fit this one's key. The salt, which
    is in the key alone, keeps those who know the systems and their answers from computing the names or the sides.
    """
    from exo.evaluation import answers as evaluation_answers

    rng = random.Random(f"{salt}/{config.seed}")
    texts = {
        (name, key): evaluation_answers.choose(own, key, 1, seed=config.seed, name=files[name])[0]
        for name, own in answers.items()
        for key in keys
    }
    items = {}
    for pair in config.pairs():
        swapped = [i % 2 == 1 for i in range(len(keys))]  # balanced: each side half of the time
        rng.shuffle(swapped)
        for key, swap in zip(keys, swapped, strict=True):
            sides = dict(zip(SIDES, reversed(pair) if swap else pair, strict=True))
            about = {"matchup": ":".join(pair), "line": answers[pair[0]][key].line} | sides
            shown = {"instruction": key[0], "reference answer": references[key].completions[0] if references else ""}
            shown |= {side: texts[name, key] for side, name in sides.items()}
            shown = {column: text.strip() for column, text in shown.items()}
            digest = hashlib.sha256(json.dumps([salt, about, shown]).encode()).hexdigest()
            items[f"q{digest[:10]}"] = about, shown  # the letter keeps a program from reading it as a number
    assert len(items) == len(keys) * len(config.pairs())
    return dict(sorted(items.items()))


def _import(config: Config, start: Start) -> Path:
    from exo import data
    from exo.evaluation import raters as evaluation_raters
    from exo.runs import directory as run_directory
    from exo.runs import inputs as run_inputs
    from exo.runs import stage as run_stage
    from exo.runs.atomic import write_json

    assert config.sheets and config.key
    files = _sheets(config.sheets)
    run_directory.check_inputs(config.output_dir, map(str, files))
    key = _read_key(Path(config.key))
    if len(files) > key["raters"]:
        raise ValueError(f"--sheets {config.sheets}: expected at most {key['raters']}, one a rater; got {len(files)}")
    filled = {file.stem: evaluation_raters.read(file, key["items"]) for file in files}
    outcomes: dict[str, list[list[str]]] = {matchup: [] for matchup in key["matchups"]}
    for item, about in key["items"].items():
        said = [_outcome(about, own.verdicts[item]) for own in filled.values() if item in own.verdicts]
        if said:
            outcomes[about["matchup"]].append(said)
    if not any(outcomes.values()):
        raise data.DataError(f"--sheets {config.sheets}: no verdict could be read; expected 1, 2 or tie in 'verdict'")
    found = [
        {"item": item, "rater": rater, "found": own.unreadable.get(item, "")}
        for rater, own in filled.items()
        for item in key["items"]
        if item not in own.verdicts
    ]
    result = {
        "raters": sorted(filled),
        "matchups": {name: _summary(items, config.seed) for name, items in outcomes.items()},
        "missing": [{"item": f["item"], "rater": f["rater"]} for f in found if not f["found"]],
        "unreadable": [f for f in found if f["found"]],
    }
    directory = run_stage.begin(start, sheets={file.name: run_inputs.fingerprint(str(file)) for file in files})
    write_json(directory / "label.json", result)
    run_stage.finish(directory)
    _show(result, key["raters"], directory)
    return directory


def _sheets(paths: str) -> list[Path]:
    """The files, in order; a rater is the name of a file."""
    files = [
        file
        for path in map(Path, paths.split(","))
        for file in (sorted(path.glob("*.csv")) if path.is_dir() else [path])
    ]
    for file in files:
        if not file.is_file():
            raise ValueError(f"--sheets {file}: no such file; python -m exo.label --mode export makes sheets")
    if not files:
        raise ValueError(f"--sheets {paths}: expected filled sheets; found no .csv file in it")
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"--sheets {paths}: two files have the same name, which is the rater's; rename one")
    return files


def _read_key(path: Path) -> dict[str, Any]:
    from exo import data

    if not path.is_file():
        raise ValueError(f"--key {path}: no such file; python -m exo.label --mode export makes it")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(key["raters"], int) and all(
            about["matchup"] in key["matchups"] and {about[side] for side in SIDES} == set(about["matchup"].split(":"))
            for about in key["items"].values()
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise data.DataError(f"--key {path}: expected the key.json that --mode export wrote")
    return key


def _outcome(about: Mapping[str, str], verdict: str) -> str:
    """Win, tie or lose of the matchup's first system."""
    if verdict == "tie":
        return "tie"
    return "win" if about[f"answer {verdict}"] == about["matchup"].split(":")[0] else "lose"


def _summary(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    from exo.evaluation import raters as evaluation_raters

    if not items:
        return {"items": 0, "pooled": None, "majority": None, "agreement": None, "kappa": None}
    agreed, kappa = evaluation_raters.agreement(items)
    return {
        "items": len(items),
        "pooled": evaluation_raters.pool(items, seed),
        "majority": evaluation_raters.majority(items, seed),
        "agreement": agreed,
        "kappa": kappa,
    }


def _show(result: Mapping[str, Any], raters: int, directory: Path) -> None:
    from exo.evaluation import raters as evaluation_raters

    console.log(f"{len(result['raters'])} sheets of {raters}: {', '.join(result['raters'])}\n")
    console.log(f"{'matchup':<24}{'':<10}{'win':>6}{'tie':>6}{'lose':>6}{'split':>6}  win rate, 95% interval")
    for name, found in result["matchups"].items():
        for view in ("pooled", "majority") if found["items"] else ():
            counts = found[view]
            numbers = "".join(f"{counts.get(outcome, ''):>6}" for outcome in (*evaluation_raters.OUTCOMES, "split"))
            rate = counts["win_rate"]
            shown = f"{rate['mean']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
            console.log(f"{name if view == 'pooled' else '':<24}{view:<10}{numbers}  {shown}")
        console.log(f"{'':<24}{_agreement(found)}")
    for kind in ("missing", "unreadable"):
        if gone := result[kind]:
            listed = ", ".join(f"{g['item']} of {g['rater']}" for g in gone[:10]) + ", ..." * (len(gone) > 10)
            console.log(f"{len(gone):,} {kind} verdicts, left out: {listed}")
    console.log(f"{directory / 'label.json'}")


def _agreement(found: Mapping[str, Any]) -> str:
    if not found["items"]:
        return "no verdict"
    if found["agreement"] is None:
        return "agreement undefined: no item has two verdicts"
    kappa = "undefined: everyone said the same" if found["kappa"] is None else f"{found['kappa']:.2f}"
    return f"{found['items']:,} items; pairs of raters agree {found['agreement']:.1%}, Fleiss' kappa {kappa}"


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
