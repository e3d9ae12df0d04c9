"""The reference's log-probs of the completions: made once and kept, made anew in every step, or none.

Kept ones are a file of lines in a directory that runs share. Its name is a hash of all that the numbers depend on, to
the last bit: the weights, the rows' tokens, temperature, dtype, and how rows are put into batches. So a sweep of betas,
learning rates, losses, seeds or K makes them once, and a run that was interrupted goes on where it stopped, with the
same numbers. No random state moves.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from exo import models
from exo.cli import console
from exo.cli.options import ReferenceMode
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import fsdp, gather
from exo.models import logps
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record
from exo.runs.jsonl import append

Sums = tuple[float, ...]  # of one group: fp64, one a completion


def mode(asked: ReferenceMode, examples: Sequence[TokenizedExample]) -> Literal["cache", "live", "none", "data"]:
    """Return how the reference is used; print it if the data have its log-probs."""
    having = sum(example.ref_logps is not None for example in examples)
    if asked == "auto" and having == len(examples):
        console.log("the reference's log-probs are those of the data")
        return "data"
    if having:
        console.log(f"  {having:,} of {len(examples):,} rows have a reference's log-probs, which are not used")
    return "cache" if asked == "auto" else asked


def load(
    asked: ReferenceMode,
    name: str | None,
    examples: Sequence[TokenizedExample],
    tokenizer: Any,
    read: Callable[[str], tuple[Any, Any]],
) -> tuple[Literal["cache", "live", "none", "data"], Any]:
    """Return how the reference is used, and its model: None if it is the policy's start.

    `read` returns the model and the tokenizer of a name. ValueError if the model does not fit.
    """
    chosen = mode(asked, examples)
    if name is None:
        return chosen, None
    if chosen in ("none", "data"):
        raise ValueError(f"--ref_model: expected --reference cache or live; --reference {chosen} uses no model")
    model, other = read(run_inputs.source("ref_model", name, "sft", "align", "ppo"))
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError("--ref_model: expected the policy's tokenizer; got another vocabulary")
    models.check_fits(model, examples)
    return chosen, model


def directory() -> Path:
    """Return the default directory of the cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exo" / "reference"


def score(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    collator: Collator,
    temperature: float,
    keep: Path | None,
) -> list[TokenizedExample]:
    """The groups with this model's log-probs as their reference; kept in the directory `keep`, and taken from there.

    What an adapter adds to the model must be switched off.
    """
    kept = None
    if keep:
        identity = _identity(model, examples, accelerator, collator, temperature)
        with accelerator.main_process_first():  # it mends what is damaged, before others read it
            kept = LogprobCache(keep, identity, examples, writes=accelerator.is_main_process)
    if kept:
        console.log(
            f"  {len(kept.known):,} of {len(examples):,} prompts are known from {kept.path}, which may be deleted"
        )
    progress = console.Progress("prompts", len(examples), every=max(1, len(examples) // 5))
    with logps.logps_function(model, accelerator, collator, temperature) as of:

        def sums(part: Sequence[TokenizedExample]) -> list[Sums]:
            return [tuple(float(row.sum()) for row in rows) for rows in of(part)]

        scored: dict[int, Sums] = {}
        world, together = accelerator.num_processes, fsdp.is_sharded(model)
        # a micro-batch is made whole or not at all, so that an interruption changes no bit; and by all processes where
        # one does not know it, which may have read the file before another run added to it, or a file of its own
        parts = collator.micro_batches(examples)
        known = [kept.of(part) if kept else None for part in parts]
        own = [i for i, sums_of in enumerate(known) if sums_of is None]
        missing = sorted({i for some in gather.all_gather_json(own, accelerator) for i in some})
        for i in sorted({*range(len(parts))} - {*missing}):
            scored |= zip(map(id, parts[i]), known[i] or (), strict=True)
            progress.advance(len(parts[i]))
        unknown = [parts[i] for i in missing]
        for first in range(0, len(unknown), world):
            now = unknown[first : first + world]
            for part, found in zip(now, gather.map_over_ranks(now, sums, accelerator, together=together), strict=True):
                if kept:
                    kept.add(part, found)
                scored |= zip(map(id, part), map(tuple, found), strict=True)
                progress.advance(len(part))
    if kept:
        kept.close()
    return [replace(example, ref_logps=scored[id(example)]) for example in examples]


def _identity(
    model: Any, examples: Sequence[TokenizedExample], accelerator: Accelerator, collator: Collator, temperature: float
) -> dict[str, Any]:
    """All that the numbers depend on."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "weights": _digest_of_weights(model, accelerator),
        "config": _sha(json.dumps(config, sort_keys=True, default=str)),
        "attention": model.config._attn_implementation,
        "rows": _sha("".join(map(_row, examples))),
        "temperature": temperature,
        "dtype": accelerator.mixed_precision,
        # then a model in shards has norms and embeddings in 16 bits too
        "sharded": fsdp.is_sharded(model) and accelerator.mixed_precision != "no",
        "device": accelerator.device.type,
        "packing": [collator.max_tokens, collator.layout, collator.one_row],
        "versions": run_record.versions(),
    }


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _row(example: TokenizedExample) -> str:
    return _sha(json.dumps([example.prompt, example.completions]))


def _digest_of_weights(model: nn.Module, accelerator: Accelerator) -> str:
    """The main process hashes for all; of a model in shards each gives its own."""
    whole = hashlib.sha256()
    own = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    for name, tensor in sorted(own.items()):
        tensor = fsdp.full_tensor(tensor.detach())
        if accelerator.is_main_process:
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest: str = gather.all_gather_json(whole.hexdigest()[:24], accelerator)[0]
    return digest


class LogprobCache:
    """A file of log-probs, a group a line, each with a hash of its row; only ever added to, a line a write."""

    def __init__(
        self, where: Path, identity: dict[str, Any], examples: Sequence[TokenizedExample], *, writes: bool
    ) -> None:
        where.mkdir(parents=True, exist_ok=True)
        self.path = where / f"{_sha(json.dumps(identity, sort_keys=True))}.jsonl"
        self._rows = {id(example): (i, _row(example)) for i, example in enumerate(examples)}
        self.known: dict[int, Sums] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        head = json.dumps({"of": identity}, sort_keys=True).encode()
        if lines[0] not in (b"", head):
            console.log(f"  {self.path} is not of this model and these rows: made again")
            self.path.unlink(missing_ok=True)
            lines = [b""]
        bad = sum(not self._take(line, examples) for line in lines[1:] if line)
        if bad:
            console.log(f"  {bad:,} lines of {self.path} are damaged: made again")
        self._file = open(self.path, "ab", buffering=0) if writes else None
        if self._file is None:
            return
        if not lines[0]:
            self._file.write(head + b"\n")
        elif lines[-1]:
            self._file.write(b"\n")  # what a crash cut stays a line of its own

    def _take(self, line: bytes, examples: Sequence[TokenizedExample]) -> bool:
        """Whether a line holds what it should; its numbers are known from then on."""
        try:
            row = json.loads(line)
            place, sums = row["row"], tuple(row["logps"])
            example = examples[place]
            sound = row["sha"] == _line_hash(_row(example), sums) and len(sums) == len(example.completions)
        except (ValueError, LookupError, TypeError):
            return False
        if sound:
            self.known[place] = sums
        return sound

    def of(self, part: Sequence[TokenizedExample]) -> list[Sums] | None:
        """Of every group of a micro-batch, or nothing."""
        places = [self._rows[id(example)][0] for example in part]
        return [self.known[place] for place in places] if all(place in self.known for place in places) else None

    def add(self, part: Sequence[TokenizedExample], found: Sequence[Sums]) -> None:
        rows = [self._rows[id(example)] for example in part]
        lines = (
            json.dumps({"row": place, "logps": sums, "sha": _line_hash(name, sums)})
            for (place, name), sums in zip(rows, found, strict=True)
        )
        if self._file:
            append(self._file, "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()


def _line_hash(row: str, sums: Sums) -> str:
    return _sha(f"{row} {json.dumps(sums)}")[:8]
