"""Which layout a run takes: what was asked for, what the data gain by it, and whether the model bears it.

A model that cannot have several texts in a row, or gives other log-probs there, is given padded rows instead, and the
user is told. Left out: what the layouts are (packing), and masks (attention).
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from accelerate import Accelerator

from exo import attention, console, models, policy
from exo.encoding import TokenGroup
from exo.packing import Packing

Share = Literal["auto", "on", "off"]
WORTH = 0.9  # of the padded tokens: with more than this the masks cost what the tokens save
SAMPLE = 256  # groups that the saving is estimated on
TRIED = 3  # groups that the model is tried on, the longest among them


def choose(
    model: Any,
    groups: Sequence[TokenGroup],
    accelerator: Accelerator,
    padded: Packing,
    share: Share,
    temperature: float,
    dropout: bool = False,
) -> Packing:
    """The layout for these groups, said aloud; the model attends accordingly."""
    own = model.config._attn_implementation
    flex = accelerator.device.type == "cuda" and not dropout
    other = padded._replace(layout="packed" if share == "off" else "shared")
    before, after = (_tokens(groups, packing) for packing in (padded, other._replace(one_row=True)))
    if (share == "off" and not flex) or (share == "auto" and after > WORTH * before):
        return padded
    reason = attention.refusal(model.config)
    # dense masks come last: they cost all pairs of tokens, and their rows are padded
    candidates = [attention.FLEX] * flex + [attention.SEGMENTS, own]
    if flex and share == "off" and importlib.util.find_spec("flash_attn"):
        candidates.insert(0, attention.FLASH)
    for implementation in () if reason else candidates:
        tried = other._replace(one_row=implementation != own)
        reason = _differs(model, groups, accelerator, (padded, own), (tried, implementation), temperature)
        if not reason:
            what = "a prompt stands once for all its completions" if share != "off" else "rows are packed"
            console.say(f"{what} ({implementation}): {before / after:.2f} times fewer tokens than padded")
            return tried
        console.say(f"  {implementation} cannot be had: {reason}")
    models.attend(model, own)
    console.say(f"rows are padded, one a completion: {reason}")
    return padded


def _tokens(groups: Sequence[TokenGroup], packing: Packing) -> int:
    return sum(map(packing.tokens, packing.micro_batches(groups[:SAMPLE])))


def _differs(
    model: Any,
    groups: Sequence[TokenGroup],
    accelerator: Accelerator,
    padded: tuple[Packing, str],
    other: tuple[Packing, str],
    temperature: float,
) -> str:
    """Why the layout is not to be had: log-probs other than the padded rows', or an error; "" where they agree."""
    tried = sorted(groups, key=lambda group: -group.longest)
    tried = [tried[0], *tried[len(tried) // 2 :][: TRIED - 1]]
    found = []
    try:
        for packing, implementation in (padded, other):
            models.attend(model, implementation)
            found.append(policy.token_logps(model, tried, accelerator, packing, temperature))
    except Exception as error:  # whatever a model makes of a mask that it does not know
        what = str(error).splitlines()[0] if str(error) else ""
        return f"{type(model).__name__} cannot have several texts in a row ({type(error).__name__}: {what})"
    pairs = zip(*([row for group in logps for row in group] for logps in found), strict=True)
    off = max(float((a - b).abs().max()) for a, b in pairs)
    most = 6 * policy.TOKEN_NOISE[accelerator.mixed_precision] / temperature
    if off <= most:
        return ""
    return (
        f"with several texts in a row {type(model).__name__} gives log-probs that differ by {off:.2g} nats, and "
        f"{most:.1g} is the most that rounding does"
    )
