"""Files for the fuzz harness: valid files of every format and container, and ways to break them."""

import gzip
import json
import random
import struct
from pathlib import Path
from typing import Any

_ROWS: dict[str, list[Any]] = {
    "comparisons": [
        lambda i: {"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda i: {"prompt": f"p{i}", "completions": [f"a{i}", f"b{i}", "c"], "rewards": [1, 0.5, -i]},
        lambda i: {
            "chosen": f"\n\nHuman: q{i}\n\nAssistant: a{i}", "rejected": f"\n\nHuman: q{i}\n\nAssistant: b{i}"
        },
        lambda i: {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "chosen": [{"role": "assistant", "content": f"a{i}"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
    ],
    "texts": [lambda i: {"prompt": f"p{i}", "completion": f"a{i}"}],
    "prompts": [lambda i: {"prompt": f"p{i}"}],
    "labels": [lambda i: {"text": f"t{i}", "label": i % 2}],
}  # fmt: skip
ODD: list[Any] = [
    None, True, -1, 0, 1.5, 10**30, "", " ", "x" * 3000, "\0", "a\nb", "\u2028", "\ud800", [], {}, [[]], [None],
    {"a": {}}, [1, "x"], {"role": "user"}, "Infinity", 1e308,
]  # fmt: skip


def data_file(rng: random.Random, folder: Path) -> tuple[Path, int, Any, bool]:
    """Write a data file; return its path, its number of rows, their purpose, and True if the file may be mutated."""
    purpose = rng.choice(list(_ROWS))
    make = rng.choice(_ROWS[purpose])
    rows = [make(i) for i in range(rng.randint(1, 6))]
    mutated = rng.random() < 0.8
    if mutated and rng.random() < 0.6:
        replace_somewhere(rng, rows)
    container = rng.choice(["jsonl", "json", "jsonl.gz", "json.gz"])
    dumped = [json.dumps(row) for row in rows]
    text = "\n".join(dumped) + "\n" if "jsonl" in container else "[" + ",\n".join(dumped) + "]"
    content = text.encode()
    if mutated and rng.random() < 0.6:
        content = mutated_bytes(rng, content)
    if container.endswith("gz"):
        content = gzip.compress(content, mtime=0)
        if mutated and rng.random() < 0.2:
            content = mutated_bytes(rng, content)
    path = folder / f"data.{container}"
    path.write_bytes(content)
    return path, len(rows), purpose, mutated


def replace_somewhere(rng: random.Random, value: Any) -> None:
    """Replace, remove, add or rename one item of a nested list or mapping, in place."""
    places = list(_containers(value))
    place = rng.choice(places)
    if isinstance(place, list):
        if not place or rng.random() < 0.2:
            place.append(rng.choice(ODD))
        else:
            place[rng.randrange(len(place))] = rng.choice(ODD)
        return
    key = rng.choice([*place, "odd"])
    how = rng.randrange(3)
    if how == 0:
        place[key] = rng.choice(ODD)
    elif how == 1:
        place.pop(key, None)
    else:
        place[rng.choice(["odd", "", "a\nb", "\0", key.upper()])] = place.pop(key, None)


def _containers(value: Any) -> Any:
    if isinstance(value, list | dict):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return a copy with some bytes changed, removed, repeated or inserted."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif how == 1:
            del data[at:]
        elif how == 2:
            data[at:at] = rng.choice([b"\xef\xbb\xbf", b"\0", b"\xff", b"[" * 3000, b"{", b"}", b'"', b"\r", b"1e999"])
        elif how == 3:
            del data[at : at + rng.randint(1, 9)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 40)]
    return bytes(data)


def mutated_text(rng: random.Random, text: str) -> str:
    return mutated_bytes(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")


_YAML = [
    "[", "{", "- ", ": ", "&a ", "*a", "!!python/object:os.system ", "!!int ", "\t", "'", '"', "|", "---\n", "...\n",
    "%YAML 9.9\n", "[" * 20_000, "9" * 5000, "~", "2024-13-45", "0x1F", "1:30", "<<: ", "? ", "\n\n", "beta_pi: 1\n",
    "\ufeff", "\u2028", "\x85", "max-steps: 3\n", "1: 2\n",
]  # fmt: skip


def write_yaml(rng: random.Random, path: Path, text: str) -> None:
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(_YAML) + text[at + rng.choice([0, 0, 3]) :]
    content = text.encode()
    path.write_bytes(mutated_bytes(rng, content) if rng.random() < 0.3 else content)


def model_directory(rng: random.Random, directory: Path) -> str:
    """Change a file; return "harmless", "broken" (weights are missing) or "changed" (may still be valid)."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    path = rng.choice(files)
    how = rng.randrange(6)
    if how == 0:
        (directory / "notes.txt").write_bytes(rng.randbytes(100))
        return "harmless"
    if how == 1:
        path.unlink()
        return "broken"
    if path.suffix == ".json" and how < 5:
        values = json.loads(path.read_text(encoding="utf-8"))
        replace_somewhere(rng, values)
        path.write_text(json.dumps(values), encoding="utf-8")
    elif path.suffix == ".safetensors" and how < 4:
        _break_header(rng, path)
        return "broken"
    else:
        path.write_bytes(mutated_bytes(rng, path.read_bytes()))
    return "changed"


def _break_header(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    replace_somewhere(rng, header)
    encoded = json.dumps(header).encode()
    stated = rng.choice([len(encoded), len(encoded), len(encoded) + 8, 2**40, 0])
    path.write_bytes(struct.pack("<Q", stated) + encoded + body)
