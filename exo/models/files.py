"""Checks of a model's files before transformers reads them: nothing in them may name files or code elsewhere.

Symbolic links are followed. Left out: what is in the weights (loading).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from transformers.utils import cached_file

from exo.models.quiet import explained

OPTIONAL = ("generation_config.json", "processor_config.json", "preprocessor_config.json")
LEGACY = ("special_tokens_map_file", "tokenizer_file")  # of tokenizer_config.json; where it was made, never read
KERNELS = ("attn_implementation", "experts_implementation")  # with underscores around them too


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    dtype: str  # as safetensors name it: F32, BF16
    shape: tuple[int, ...]


def check(name: str) -> None:
    """ValueError, naming file and key, if a config file of the model would make transformers read or run other files.

    Of a model on the hub config.json, tokenizer_config.json and the index of its weights are checked.
    """
    files = ("config.json", "tokenizer_config.json", *OPTIONAL * Path(name).is_dir())
    for file in files:
        if path := find(name, file):
            _check_entries(f"model {name!r}: {file}", read(name, path))
    _check_shards(name)


def find(name: str, file: str) -> Path | None:
    """Return the path of a model's file, or None; ValueError if a hub name has no config.json that can be reached."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    required = file == "config.json"  # checked first: each lookup without a network is retried for 20 s
    with explained(name, "a hub name"):
        path = cached_file(
            name, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=required,
            _raise_exceptions_for_connection_errors=required,
        )  # fmt: skip
    return None if path is None else Path(path)


def read(name: str, path: Path) -> dict[str, Any]:
    """Return a JSON object."""
    with explained(name, f"a JSON object in {path.name}"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    return found


def _check_entries(where: str, entries: dict[str, Any]) -> None:
    for key, value in _every(entries):
        plain = key.strip("_").removesuffix("_internal")
        if plain in KERNELS and any("/" in text or ":" in text for text in _texts(value)):
            raise ValueError(
                f"{where}: {key}: expected a kernel that transformers has; got {value!r}; remove the entry"
            )
        if key == "transformers_weights" and value is not None:
            if not isinstance(value, str) or Path(value).name != value:
                raise ValueError(f"{where}: {key}: expected a file beside it; got {value!r}")
        if key in ("use_pretrained_backbone", "megatron_config") and value:
            raise ValueError(f"{where}: {key}: expected none; it loads what is not in the model's own directory")
        if "tokenizer_config" in where and _names_a_file(key) and any(map(_leads_away, _texts(value))):
            raise ValueError(f"{where}: {key}: expected a file beside it; got {value!r}; remove the entry")
    heads = entries.get("architectures")
    if heads is not None and not (isinstance(heads, list) and all(isinstance(head, str) for head in heads)):
        raise ValueError(f"{where}: architectures: expected a list of names; got {str(heads)[:80]}")


def _every(entries: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys with their values, however deep."""
    todo = [entries]  # no recursion: a file may be nested deeper than Python's stack
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            yield from one.items()
        todo += list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []


def _texts(value: Any) -> list[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _names_a_file(key: str) -> bool:
    return key in ("vocab", "merges") or key.endswith(("_file", "_files")) and key not in LEGACY


def _leads_away(text: str) -> bool:
    try:
        return Path(text).name != text and Path(text).exists()
    except (OSError, ValueError):  # too long, or with a NUL in it: no path
        return False


def _check_shards(name: str) -> None:
    """ValueError for an index that names files elsewhere than beside itself."""
    directory = Path(name)
    index = "model.safetensors.index.json"
    for path in directory.glob("*.index.json") if directory.is_dir() else filter(None, [find(name, index)]):
        with explained(name, f"an index of weights in {path.name}"):
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        if odd := [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]:
            raise ValueError(f"model {name!r}: expected shards beside their index; {path.name} names {odd[0]!r}")


def base_of(name: str) -> str:
    """Return the model that an adapter of peft's is for; ValueError if its config leads elsewhere than to a model."""
    path = Path(name) / "adapter_config.json"
    entries = read(name, path)
    _check_entries(f"model {name!r}: {path.name}", entries)
    below = entries.get("base_model_name_or_path")
    if not isinstance(below, str) or not below:
        raise ValueError(f"model {name!r}: {path.name}: base_model_name_or_path: expected a model; got {below!r}")
    if entries.get("revision") not in (None, "main") and not Path(below).is_dir():
        raise ValueError(
            f"model {name!r}: {path.name}: revision: expected none; got {entries['revision']!r}: download that "
            f"revision of {below} and set base_model_name_or_path to its directory"
        )
    return below


def is_adapter(name: str) -> bool:
    """Return whether a directory holds a peft adapter instead of a model."""
    return (Path(name) / "adapter_config.json").is_file()


def root_of(name: str) -> str:
    """Return the model at the end of a chain of adapters; ValueError if there is none."""
    seen: list[Path] = []
    while is_adapter(name):
        if Path(name).resolve() in seen:
            raise ValueError(f"model {name!r}: adapter_config.json: base_model_name_or_path: expected a model; got an "
                             "adapter whose base is, in the end, itself")  # fmt: skip
        seen.append(Path(name).resolve())
        name = base_of(name)
    return name


def stored(name: str) -> dict[str, Stored]:
    """Return the tensors in a model's safetensors, from their headers alone; ValueError for a damaged header."""
    config = find(name, "config.json")
    found: dict[str, Stored] = {}
    for file in sorted(config.parent.glob("*.safetensors")) if config else ():
        if file.name == "adapter_model.safetensors":
            continue
        with explained(name, f"weights in {file.name}"), safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                part = tensors.get_slice(key)
                found[key] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
    return found
