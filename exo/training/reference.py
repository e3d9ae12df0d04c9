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
from exo.runs.jsonl import JsonlCache

IDENTITY = "identity"  # the key of the entry with everything that the log-probs depend on
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
    cache = None
    if keep:
        identity = _identity(model, examples, accelerator, collator, temperature)
        with accelerator.main_process_first():  # it removes what is damaged before others read it
            cache = _open_cache(keep, identity, writes=accelerator.is_main_process)
        known = len(cache.entries.keys() - {IDENTITY})
        console.log(f"  {known:,} of {len(examples):,} prompts are known from {cache.path}, which may be deleted")
    places = {id(example): place for place, example in enumerate(examples)}
    progress = console.Progress("prompts", len(examples), every=max(1, len(examples) // 5))
    with logps.logps_function(model, accelerator, collator, temperature) as of:

        def sums(part: Sequence[TokenizedExample]) -> list[Sums]:
            return [tuple(float(row.sum()) for row in rows) for rows in of(part)]

        scored: dict[int, Sums] = {}
        world, together = accelerator.num_processes, fsdp.is_sharded(model)
        # a micro-batch is made whole or not at all, so that an interruption changes no bit; and by all processes where
        # one does not know it, which may have read the file before another run added to it, or a file of its own
        parts = collator.micro_batches(examples)
        entries = cache.entries if cache else {}
        local = [i for i, part in enumerate(parts) if any(places[id(example)] not in entries for example in part)]
        missing = sorted({i for some in gather.all_gather_json(local, accelerator) for i in some})
        for i in sorted({*range(len(parts))} - {*missing}):
            scored |= {id(example): tuple(entries[places[id(example)]]) for example in parts[i]}
            progress.advance(len(parts[i]))
        unknown = [parts[i] for i in missing]
        for first in range(0, len(unknown), world):
            now = unknown[first : first + world]
            for part, found in zip(now, gather.map_over_ranks(now, sums, accelerator, together=together), strict=True):
                for example, row in zip(part, found, strict=True):
                    scored[id(example)] = tuple(row)
                    if cache:
                        cache.put(places[id(example)], row)
                progress.advance(len(part))
    if cache:
        cache.close()
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


def _open_cache(directory: Path, identity: dict[str, Any], *, writes: bool) -> JsonlCache:
    """Open the file of log-probs of that identity: an entry for each example, and one for the identity itself."""
    name = json.dumps(identity, sort_keys=True)
    path = directory / f"{_sha(name)}.jsonl"
    cache = JsonlCache(path, writes=writes)
    if cache.entries and json.dumps(cache.entries.get(IDENTITY), sort_keys=True) != name:
        console.log(f"  {path} is not of this model and these rows: made again")
        cache.close()
        path.unlink(missing_ok=True)
        cache = JsonlCache(path, writes=writes)
    elif cache.damaged:
        console.log(f"  {len(cache.damaged):,} lines of {path} are damaged: made again")
    cache.put(IDENTITY, identity)
    return cache
