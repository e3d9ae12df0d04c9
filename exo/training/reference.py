"""Reference log-probs of the completions: computed once and cached, computed in every step, or none.

The cache is an append-only file in a directory that runs share. Its name is a hash of everything that the numbers
depend on: the weights, the rows' tokens, temperature, dtype, and the micro-batches. So a sweep of betas, learning
rates, losses, seeds or K computes them once, and an interrupted run continues with the same numbers. No random state
changes.
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
Sums = tuple[float, ...]  # log-probs of an example's completions, in fp64


def mode(requested: ReferenceMode, examples: Sequence[TokenizedExample]) -> Literal["cache", "live", "none", "data"]:
    """Return how the reference is used; print it if the data have its log-probs."""
    having = sum(example.ref_logps is not None for example in examples)
    if requested == "auto" and having == len(examples):
        console.log("the reference's log-probs come from the data")
        return "data"
    if having:
        console.log(f"  {having:,} of {len(examples):,} rows have a reference's log-probs, which are not used")
    return "cache" if requested == "auto" else requested


def load(
    requested: ReferenceMode,
    name: str | None,
    examples: Sequence[TokenizedExample],
    tokenizer: Any,
    read: Callable[[str], tuple[Any, Any]],
) -> tuple[Literal["cache", "live", "none", "data"], Any]:
    """Return how the reference is used, and its model: None if it is the policy's start.

    `read` returns the model and the tokenizer of a name. ValueError if the model does not fit.
    """
    chosen = mode(requested, examples)
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


def score_as(
    mode: str,
    model: nn.Module,
    parts: Sequence[list[TokenizedExample]],
    accelerator: Accelerator,
    collator: Collator,
    temperature: float,
    cache_directory: Path | None,
) -> list[list[TokenizedExample]]:
    """Return each list of examples with the `ref_logps` of a mode: cached ones, zeros (none), or as they are."""
    if mode == "none":
        return [[replace(example, ref_logps=(0.0,) * len(example.completions)) for example in part] for part in parts]
    if mode != "cache":
        return list(parts)
    examples = [example for part in parts for example in part]
    scored = iter(score(model, examples, accelerator, collator, temperature, cache_directory))
    return [[next(scored) for _ in part] for part in parts]


def score(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    collator: Collator,
    temperature: float,
    cache_directory: Path | None,
) -> list[TokenizedExample]:
    """Return the examples with this model's log-probs as `ref_logps`, through the cache if there is a directory.

    An adapter on the model must be disabled.
    """
    cache = None
    if cache_directory:
        identity = _identity(model, examples, accelerator, collator, temperature)
        with accelerator.main_process_first():  # it repairs the file before others read it
            cache = _open_cache(cache_directory, identity, writes=accelerator.is_main_process)
        number = len(cache.entries.keys() - {IDENTITY})
        console.log(f"  {number:,} of {len(examples):,} prompts are cached in {cache.path} (safe to delete)")
    places = {id(example): place for place, example in enumerate(examples)}
    progress = console.Progress("prompts", len(examples), every=max(1, len(examples) // 5))
    with logps.logps_function(model, accelerator, collator, temperature) as of:

        def sums(part: Sequence[TokenizedExample]) -> list[Sums]:
            return [tuple(float(row.sum()) for row in rows) for rows in of(part)]

        scored: dict[int, Sums] = {}
        world, together = accelerator.num_processes, fsdp.is_sharded(model)
        # a micro-batch is computed as a unit, so that an interruption changes no bit; and by all ranks if one lacks it,
        # because a rank may have read the file before another run added to it, or its own file
        parts = collator.micro_batches(examples)
        cached = cache.entries if cache else {}
        incomplete = [i for i, part in enumerate(parts) if any(places[id(example)] not in cached for example in part)]
        missing = sorted({i for some in gather.all_gather_json(incomplete, accelerator) for i in some})
        for i in sorted({*range(len(parts))} - {*missing}):
            scored |= {id(example): tuple(cached[places[id(example)]]) for example in parts[i]}
            progress.advance(len(parts[i]))
        for first in range(0, len(missing), world):
            batch = [parts[i] for i in missing[first : first + world]]
            results = gather.map_over_ranks(batch, sums, accelerator, together=together)
            for part, part_sums in zip(batch, results, strict=True):
                for example, row in zip(part, part_sums, strict=True):
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
    """Return everything that the numbers depend on."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "weights": _digest_of_weights(model, accelerator),
        "config": _sha(json.dumps(config, sort_keys=True, default=str)),
        "attention": model.config._attn_implementation,
        "rows": _sha("".join(map(_row, examples))),
        "temperature": temperature,
        "dtype": accelerator.mixed_precision,
        # a sharded model has norms and embeddings in 16 bits too
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
    """Return a hash of the base model's weights; rank 0 computes it, and all ranks call."""
    sha = hashlib.sha256()
    base = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    for name, tensor in sorted(base.items()):
        tensor = fsdp.full_tensor(tensor.detach())
        if accelerator.is_main_process:
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest: str = gather.all_gather_json(sha.hexdigest()[:24], accelerator)[0]
    return digest


def _open_cache(directory: Path, identity: dict[str, Any], *, writes: bool) -> JsonlCache:
    """Open the cache of that identity: an entry for each example, and one for the identity itself."""
    name = json.dumps(identity, sort_keys=True)
    path = directory / f"{_sha(name)}.jsonl"
    cache = JsonlCache(path, writes=writes)
    if cache.entries and json.dumps(cache.entries.get(IDENTITY), sort_keys=True) != name:
        console.log(f"  {path} belongs to another model or other rows; it is computed again")
        cache.close()
        path.unlink(missing_ok=True)
        cache = JsonlCache(path, writes=writes)
    elif cache.damaged:
        console.log(f"  {len(cache.damaged):,} lines of {path} are damaged and computed again")
    cache.put(IDENTITY, identity)
    return cache
