"""Split options that name one data file or several."""

import os

from exo.cli.errors import ConfigError

StrPath = str | os.PathLike[str]
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst", ".parquet", ".arrow")


def split_paths(path: StrPath) -> list[StrPath]:
    """Return the paths between commas; a path that exists with its commas is one."""
    text = os.fspath(path)
    if not isinstance(text, str) or "," not in text or os.path.exists(text):
        return [path]
    paths = [part.strip() for part in text.split(",")]
    if not all(paths):
        shown = text if text.isprintable() else ascii(text)
        raise ConfigError(f"{shown}: an empty name between commas; expected paths joined by commas")
    return list(paths)
