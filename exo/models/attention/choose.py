"""Choose the batch layout and the attention implementation, and print the choice with its reason.

A model that does not support several texts in a row, or computes other log-probs there, gets padded rows.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from exo.cli import console
from exo.cli.options import SharePrompt
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import gather
from exo.models import logps as model_logps
from exo.models.attention import flash, masks
from exo.models.attention.flex import attend

MAX_SHARE = 0.9  # of the padded tokens; with 0.90 to 0.94, a dense mask took 1.05 to 1.27 times as long
DENSE = "a dense mask"  # with the attention implementation of the model
NUM_ESTIMATED = 256  # examples on which the saving is estimated
NUM_COMPARED = 3  # examples on which log-probs are compared, the longest among them


def choose_layout(
    models: Sequence[Any],
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    padded: Collator,
    share: SharePrompt,
    temperature: float,
    dropout: bool = False,
) -> Collator:
    """Return the collator for these examples, print the choice, and set the models' attention implementation."""
    implementations = [model.config._attn_implementation for model in models]
    flex = accelerator.device.type == "cuda" and not dropout
    dense = padded._replace(layout="packed" if share == "off" else "shared")
    joined = dense._replace(one_row=True)
    num_padded, num_joined = (_batch_size(examples, collator)[0] for collator in (padded, joined))
    if (share == "off" and not flex) or (share == "auto" and num_joined > MAX_SHARE * num_padded):
        return padded
    reason = next(filter(None, (masks.unsupported_reason(model.config) for model in models)), "")
    for implementation in () if reason else _candidates(examples, padded, dense, share, flex):
        collator = dense if implementation == DENSE else joined
        reasons = [
            _mismatch(model, examples, accelerator, padded, collator, implementation, temperature) for model in models
        ]
        # all ranks take the same layout; otherwise they would wait for each other's micro-batches
        reason = next(filter(None, gather.all_gather_json(next(filter(None, reasons), ""), accelerator)), "")
        if not reason:
            layout = "each prompt is encoded once for all its completions" if share != "off" else "rows are packed"
            ratio = num_padded / num_joined
            console.log(f"{layout} ({implementation}): {ratio:.2f} times fewer tokens than padded")
            return collator
        for model, previous in zip(models, implementations, strict=True):
            attend(model, previous)
        console.log(f"  {implementation} attention is not available: {reason}")
    console.log(f"rows are padded, one per completion: {reason}")
    return padded


def _candidates(
    examples: Sequence[TokenizedExample], padded: Collator, dense: Collator, share: SharePrompt, flex: bool
) -> Iterator[str]:
    """Yield attention implementations, the best first."""
    if flex and share == "off" and importlib.util.find_spec("flash_attn"):
        yield flash.FLASH
    if flex:
        yield masks.FLEX
    yield masks.SEGMENTS
    # a dense mask costs all pairs of tokens in a row, and a row has several texts
    if share != "auto" or _batch_size(examples, dense)[1] <= _batch_size(examples, padded)[1]:
        yield DENSE


def _batch_size(examples: Sequence[TokenizedExample], collator: Collator) -> tuple[int, int]:
    """Return the number of input tokens, and of pairs of tokens in one row."""
    shapes = []
    for part in collator.micro_batches(examples[:NUM_ESTIMATED]):
        rows, width = collator.rows(part)
        shapes.append((len(rows) * width, len(rows) * width**2))
    tokens, pairs = zip(*shapes, strict=True)
    return sum(tokens), sum(pairs)


def _mismatch(
    model: Any,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    padded: Collator,
    collator: Collator,
    implementation: str,
    temperature: float,
) -> str:
    """Return why a layout does not work (an error, or log-probs other than of padded rows), or "".

    The attention implementation of the model stays set.
    """
    by_length = sorted(examples, key=lambda example: -example.longest)
    compared = [by_length[0], *by_length[len(by_length) // 2 :][: NUM_COMPARED - 1]]
    results = [model_logps.token_logps(model, compared, accelerator, padded, temperature)]
    try:
        if implementation != DENSE:
            attend(model, implementation)
        results.append(model_logps.token_logps(model, compared, accelerator, collator, temperature))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models fail in many ways on an unknown mask
        message = str(error).splitlines()[0] if str(error) else ""
        return f"{type(model).__name__} does not support several texts in a row ({type(error).__name__}: {message})"
    pairs = zip(*([row for example in logps for row in example] for logps in results), strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    limit = 6 * model_logps.TOKEN_NOISE[accelerator.mixed_precision] / temperature
    if difference <= limit:
        return ""
    return (
        f"with several texts in a row, the log-probs of {type(model).__name__} differ by {difference:.2g} nats; "
        f"rounding explains {limit:.1g}"
    )
