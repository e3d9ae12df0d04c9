"""Compare systems blindly by human raters: make sheets to fill in, and count the verdicts of the filled ones.

    python -m exo.label --systems exo=FILE,dpo=FILE --matchups exo:dpo --references FILE --output_dir DIR
    python -m exo.label --mode import --sheets DIR/sheets --key DIR/key.json --output_dir DIR2

The protocol is the paper's: 100 instructions, every matchup of systems on each, 3 raters, win, tie or lose. Only
DIR/sheets goes to the raters; only key.json tells which answer is whose.
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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from exo.cli import console
from exo.cli.fields import at_least, option, require
from exo.cli.main import command
from exo.cli.options import Stage
from exo.runs.stage import Start, stage

if TYPE_CHECKING:
    from exo.evaluation.answers import Answers, Key


@dataclass(frozen=True)
class Config(Stage):
    output_dir: str = option("runs/label", "directory of the run")
    mode: Literal["export", "import"] = option("export", "make sheets, or count the filled ones")
    systems: str | None = option(
        None, "export: name=FILE,name=FILE,... of samples, texts or preferences (their chosen)"
    )
    matchups: str | None = option(None, "export: name:name,name:name,...; outcomes are those of the first system")
    references: str | None = option(None, "export: texts to show as the reference answer")
    raters: int = option(3, "export: number of raters; each gets a sheet", at_least(1))
    limit: int | None = option(100, "export: number of prompts, chosen by seed; none means all", at_least(1))
    sheets: str | None = option(None, "import: directory of filled sheets, or files separated by commas")
    key: str | None = option(None, "import: key.json of the export")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("systems", "matchups") if self.mode == "export" else ("sheets", "key"):
            require(bool(getattr(self, name)), name, f"a value for --mode {self.mode}", getattr(self, name))
        if self.mode == "export":
            self.pairs()

    def files(self) -> dict[str, str]:
        """Return the file of each system by name."""
        entries = [entry.partition("=")[::2] for entry in (self.systems or "").split(",")]
        valid = all(re.fullmatch(r"[\w.-]+", name) and file for name, file in entries)
        valid = valid and len(dict(entries)) == len(entries)
        require(valid, "systems", "name=FILE,name=FILE,... with every name once", self.systems)
        return dict(entries)

    def input_files(self) -> dict[str, str]:
        """Return what the stage reads besides its `reads`, by name: the files in --systems."""
        return {f"systems {name}": file for name, file in self.files().items()} if self.systems else {}

    def pairs(self) -> list[tuple[str, str]]:
        """Return the two systems of each matchup."""
        entries = [tuple(entry.split(":")) for entry in (self.matchups or "").split(",")]
        names = set(self.files())
        valid = all(len(set(entry)) == len(entry) == 2 and set(entry) <= names for entry in entries)
        valid = valid and len(set(map(frozenset, entries))) == len(entries)
        expected = f"name:name,... of {', '.join(sorted(names))}, every matchup once"
        require(valid, "matchups", expected, self.matchups)
        return [(first, second) for first, second in entries]


class Item(NamedTuple):
    """One comparison to judge."""

    entry: dict[str, Any]  # of key.json: the matchup, the line of the prompt, and the system on each side
    texts: dict[str, str]  # by column of the sheets


@stage("label", reads=("references", "key", "sheets"), makes="label.json")
def run(config: Config, start: Start) -> Path:
    """Make the sheets or count them, and return the run directory."""
    return _export(config, start) if config.mode == "export" else _import(config, start)


def _export(config: Config, start: Start) -> Path:
    from exo.evaluation import answers, judge_prompts, sheets
    from exo.runs import directory as run_directory
    from exo.runs import stage as run_stage
    from exo.runs.atomic import atomic_directory, write_json

    files = {name: answers.source("systems", file) for name, file in config.files().items()}
    run_directory.check_inputs(config.output_dir, files.values())
    systems = {name: answers.read(file) for name, file in files.items()}
    references = answers.read_references(config.references)[0] if config.references else {}
    keys = answers.shared(systems | ({"references": references} if references else {}), config.limit, config.seed)
    salt, matchups = secrets.token_hex(16), config.pairs()
    texts = {
        (name, key): answers.choose(system, key, 1, seed=config.seed, name=files[name])[0]
        for name, system in systems.items()
        for key in keys
    }
    items = _blind_items(config, systems, texts, references, keys, salt)
    directory = run_stage.begin(start)
    key = {"matchups": [":".join(pair) for pair in matchups], "raters": config.raters, "salt": salt}
    write_json(directory / "key.json", key | {"items": {name: item.entry for name, item in items.items()}})
    with atomic_directory(directory / "sheets") as staging:
        for rater in range(1, config.raters + 1):
            rows = [{"item": name} | item.texts for name, item in items.items()]
            random.Random(f"{config.seed}/rater {rater}").shuffle(rows)
            sheets.write(staging / f"rater-{rater}.csv", rows)
        text = (judge_prompts.FOLDER / "raters.txt").read_text(encoding="utf-8")
        (staging / "instructions.txt").write_text(text, encoding="utf-8")
    run_stage.finish(directory, items=len(items))
    console.log(
        f"{len(items):,} items = {len(keys):,} prompts x {len(matchups)} matchups, for {config.raters} raters\n"
        f"for the raters: {directory / 'sheets'}   not for the raters: {directory / 'key.json'}"
    )
    return directory


def _blind_items(
    config: Config,
    systems: Mapping[str, Answers],
    texts: Mapping[tuple[str, Key], str],
    references: Answers,
    keys: Sequence[Key],
    salt: str,
) -> dict[str, Item]:
    """Return the items by name, one for each matchup and prompt; `texts` has the answer of each system to each prompt.

    The name of an item is a hash of its content, so a sheet of another export does not fit this key. Only the key has
    the salt: without it, names and sides cannot be computed from the systems' files and the seed.
    """
    from exo.evaluation.sheets import SIDES

    rng = random.Random(f"{salt}/{config.seed}")
    items = {}
    for pair in config.pairs():
        swapped = [i % 2 == 1 for i in range(len(keys))]  # balanced: each system is on each side half of the time
        rng.shuffle(swapped)
        for key, swap in zip(keys, swapped, strict=True):
            sides = dict(zip(SIDES, reversed(pair) if swap else pair, strict=True))
            entry = {"matchup": ":".join(pair), "line": systems[pair[0]][key].line} | sides
            shown = {"instruction": key[0], "reference answer": references[key].completions[0] if references else ""}
            shown |= {side: texts[name, key] for side, name in sides.items()}
            shown = {column: text.strip() for column, text in shown.items()}
            digest = hashlib.sha256(json.dumps([salt, entry, shown]).encode()).hexdigest()
            items[f"q{digest[:10]}"] = Item(entry, shown)  # because of the letter, no program reads it as a number
    assert len(items) == len(keys) * len(config.pairs())
    return dict(sorted(items.items()))


def _import(config: Config, start: Start) -> Path:
    from exo.data import DataError
    from exo.evaluation import raters, sheets
    from exo.runs import directory as run_directory
    from exo.runs import stage as run_stage
    from exo.runs.atomic import write_json

    assert config.sheets and config.key
    files = _sheet_files(config.sheets)
    run_directory.check_inputs(config.output_dir, map(str, files))
    key = sheets.read_key(Path(config.key))
    if len(files) > key["raters"]:
        raise ValueError(f"--sheets {config.sheets}: expected at most {key['raters']}, one per rater; got {len(files)}")
    result = raters.count(key, {file.stem: sheets.read(file, key["items"]) for file in files}, config.seed)
    if not any(statistics["items"] for statistics in result["matchups"].values()):
        raise DataError(f"--sheets {config.sheets}: no verdict could be read; expected 1, 2 or tie in 'verdict'")
    directory = run_stage.begin(start)
    write_json(directory / "label.json", result)
    run_stage.finish(directory)
    raters.show(result, key["raters"])
    console.log(f"{directory / 'label.json'}")
    return directory


def _sheet_files(paths: str) -> list[Path]:
    """Return the files of filled sheets; the name of a file is the name of its rater."""
    files: list[Path] = []
    for path in map(Path, paths.split(",")):
        files += sorted(path.glob("*.csv")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise ValueError(f"--sheets {file}: no such file; python -m exo.label --mode export makes sheets")
    if not files:
        raise ValueError(f"--sheets {paths}: expected filled sheets; found no .csv file in it")
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"--sheets {paths}: two files have the same name, which is the rater's; rename one")
    return files


main = command(Config, run)

if __name__ == "__main__":
    raise SystemExit(main())
