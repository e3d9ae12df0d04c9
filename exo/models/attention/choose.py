"""Which layout a run takes: what was asked for, what the data gain by it, and whether the model bears it.

A model that cannot have several texts in a row, or gives other log-probs there, is given padded rows instead, and the
user is told. Left out: what the layouts are (packing), and masks (attention).
"""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from exo import models
from exo.cli import console
from exo.cli.options import SharePrompt
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import gather
from exo.models import logps as model_logps
from exo.models.attention import masks

WORTH = 0.9  # of the padded tokens; with 0.90 to 0.94 of them a dense mask took 1.05 to 1.27 times as long
DENSE = "a dense mask"  # under the attention that the model came with
SAMPLE = 256  # groups that the saving is estimated on
TRIED = 3  # groups that the model is tried on, the longest among them


def choose_layout(
    seeing: Sequence[Any],
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    padded: Collator,
    share: SharePrompt,
    temperature: float,
    dropout: bool = False,
) -> Collator:
    """The layout for these groups, said aloud; the models that are to see them attend accordingly."""
    own = [model.config._attn_implementation for model in seeing]
    flex = accelerator.device.type == "cuda" and not dropout
    other = padded._replace(layout="packed" if share == "off" else "shared")
    before, after = (_batch_size(examples, collator)[0] for collator in (padded, other._replace(one_row=True)))
    if (share == "off" and not flex) or (share == "auto" and after > WORTH * before):
        return padded
    reason = next(filter(None, (masks.unsupported_reason(model.config) for model in seeing)), "")
    for implementation in () if reason else _candidates(examples, padded, other, share, flex):
        tried = other._replace(one_row=implementation != DENSE)
        reasons = [
            _mismatch(model, examples, accelerator, padded, tried, implementation, temperature) for model in seeing
        ]
        # what one process cannot have none takes, or they would wait for each other's micro-batches
        reason = next(filter(None, gather.all_gather_json(next(filter(None, reasons), ""), accelerator)), "")
        if not reason:
            what = "a prompt stands once for all its completions" if share != "off" else "rows are packed"
            console.log(f"{what} ({implementation}): {before / after:.2f} times fewer tokens than padded")
            return tried
        for model, before_it in zip(seeing, own, strict=True):
            models.attend(model, before_it)
        console.log(f"  {implementation} cannot be had: {reason}")
    console.log(f"rows are padded, one a completion: {reason}")
    return padded


def _candidates(
    examples: Sequence[TokenizedExample], padded: Collator, other: Collator, share: SharePrompt, flex: bool
) -> Iterator[str]:
    """Implementations of attention, the best first."""
    if flex and share == "off" and importlib.util.find_spec("flash_attn"):
        yield masks.FLASH
    if flex:
        yield masks.FLEX
    yield masks.SEGMENTS
    # a dense mask costs all pairs of tokens of a row, and a row holds several texts
    if share != "auto" or _batch_size(examples, other)[1] <= _batch_size(examples, padded)[1]:
        yield DENSE


def _batch_size(examples: Sequence[TokenizedExample], collator: Collator) -> tuple[int, int]:
    """(tokens, pairs of them that share a row) of the input."""
    shapes = []
    for part in collator.micro_batches(examples[:SAMPLE]):
        rows, width = collator.rows(part)
        shapes.append((len(rows) * width, len(rows) * width**2))
    tokens, pairs = zip(*shapes, strict=True)
    return sum(tokens), sum(pairs)


def _mismatch(
    model: Any,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    padded: Collator,
    other: Collator,
    implementation: str,
    temperature: float,
) -> str:
    """Why the layout is not to be had: log-probs other than the padded rows', or an error; "" where they agree.

    The model attends by the implementation from then on.
    """
    tried = sorted(examples, key=lambda example: -example.longest)
    tried = [tried[0], *tried[len(tried) // 2 :][: TRIED - 1]]
    found = [model_logps.token_logps(model, tried, accelerator, padded, temperature)]
    try:
        if implementation != DENSE:
            models.attend(model, implementation)
        found.append(model_logps.token_logps(model, tried, accelerator, other, temperature))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model makes of a mask that it does not know
        what = str(error).splitlines()[0] if str(error) else ""
        return f"{type(model).__name__} cannot have several texts in a row ({type(error).__name__}: {what})"
    pairs = zip(*([row for example in logps for row in example] for logps in found), strict=True)
    off = max(float((a - b).abs().max()) for a, b in pairs)
    most = 6 * model_logps.TOKEN_NOISE[accelerator.mixed_precision] / temperature
    if off <= most:
        return ""
    return (
        f"with several texts in a row {type(model).__name__} gives log-probs that differ by {off:.2g} nats, and "
        f"{most:.1g} is the most that rounding does"
    )
