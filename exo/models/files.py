"""Check a model's files before transformers reads them: they must not name files or code elsewhere.

Symbolic links are followed. The weights themselves are checked in loading.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from exo.models.errors import one_line_errors

OPTIONAL = ("generation_config.json", "processor_config.json", "preprocessor_config.json")
LEGACY = ("special_tokens_map_file", "tokenizer_file")  # paths of tokenizer_config.json that are never read
KERNELS = ("attn_implementation", "experts_implementation")  # with underscores around them too
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    dtype: torch.dtype  # fp32 for all but bf16 and fp16
    size: int  # elements


def check(name: str) -> None:
    """Raise ValueError with file and key if a config file would make transformers read or run other files.

    Of a model on the hub, config.json, tokenizer_config.json and the index of its weights are checked.
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
    with one_line_errors(name, "a hub name"):
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=required,
            _raise_exceptions_for_connection_errors=required,
        )
    return None if path is None else Path(path)


def read(name: str, path: Path) -> dict[str, Any]:
    with one_line_errors(name, f"a JSON object in {path.name}"):
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"a {type(entries).__name__}")
    return entries


def _check_entries(where: str, entries: dict[str, Any]) -> None:
    for key, value in _walk(entries):
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
        is_file = key in ("vocab", "merges") or key.endswith(("_file", "_files")) and key not in LEGACY
        if "tokenizer_config" in where and is_file and any(map(_is_path_elsewhere, _texts(value))):
            raise ValueError(f"{where}: {key}: expected a file beside it; got {value!r}; remove the entry")
    heads = entries.get("architectures")
    if heads is not None and not (isinstance(heads, list) and all(isinstance(head, str) for head in heads)):
        raise ValueError(f"{where}: architectures: expected a list of names; got {str(heads)[:80]}")


def _walk(entries: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of nested objects with its value."""
    stack = [entries]  # no recursion: a file may be nested deeper than Python's stack
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield from node.items()
        stack += list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _texts(value: Any) -> list[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _is_path_elsewhere(text: str) -> bool:
    try:
        return Path(text).name != text and Path(text).exists()
    except (OSError, ValueError):  # too long, or with a NUL in it: no path
        return False


def _check_shards(name: str) -> None:
    """Raise ValueError for an index that names files of other directories."""
    directory = Path(name)
    index = "model.safetensors.index.json"
    for path in directory.glob("*.index.json") if directory.is_dir() else filter(None, [find(name, index)]):
        with one_line_errors(name, f"an index of weights in {path.name}"):
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"model {name!r}: expected shards beside their index; {path.name} names {shard!r}")


def base_of(name: str) -> str:
    """Return the base model of a peft adapter; ValueError if its config names none."""
    path = Path(name) / "adapter_config.json"
    entries = read(name, path)
    _check_entries(f"model {name!r}: {path.name}", entries)
    base = entries.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"model {name!r}: {path.name}: base_model_name_or_path: expected a model; got {base!r}")
    if entries.get("revision") not in (None, "main") and not Path(base).is_dir():
        raise ValueError(
            f"model {name!r}: {path.name}: revision: expected none; got {entries['revision']!r}: download that "
            f"revision of {base} and set base_model_name_or_path to its directory"
        )
    return base


def is_adapter(name: str) -> bool:
    """Return whether a directory holds a peft adapter instead of a model."""
    return (Path(name) / "adapter_config.json").is_file()


def root_of(name: str) -> str:
    """Return the model at the end of a chain of adapters; ValueError if there is none."""
    seen: list[Path] = []
    while is_adapter(name):
        if Path(name).resolve() in seen:
            raise ValueError(
                f"model {name!r}: adapter_config.json: base_model_name_or_path: expected a model; got an adapter whose "
                "base is, in the end, itself"
            )
        seen.append(Path(name).resolve())
        name = base_of(name)
    return name


def stored_tensors(name: str) -> dict[str, StoredTensor]:
    """Return the tensors in a model's safetensors, from their headers alone; ValueError for a damaged header."""
    config = find(name, "config.json")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(config.parent.glob("*.safetensors")) if config else ():
        if file.name == "adapter_model.safetensors":
            continue
        with one_line_errors(name, f"weights in {file.name}"), safe_open(file, "pt") as shard:
            for key in shard.keys():
                part = shard.get_slice(key)
                dtype = DTYPES.get(part.get_dtype(), torch.float32)
                tensors[key] = StoredTensor(file, dtype, math.prod(part.get_shape()))
    return tensors
