"""Warnings about data that can be trained on, and may not mean what they are taken for.

Left out: what is refused (data), the temperature of samples (samples).
"""

import math
from collections.abc import Sequence

from exo import data
from exo.cli import console
from exo.data.text.tokenize import TokenizedExample
from exo.models import logps


def warn_of_other_sampler(rows: Sequence[data.Example], scored: Sequence[TokenizedExample]) -> None:
    """Warn if another policy than the reference drew the completions, by the log-probs that it drew them with.

    Only whole completions are compared: what all completions of a row begin with counts as their prompt.
    """
    drawn = {row.line: row.tokens for row in rows if row.tokens is not None and (row.tokens.top_p or 1) >= 1}
    squares = [
        (logprob - score) ** 2 / len(ids)
        for example in scored
        if example.line in drawn and example.completions == drawn[example.line].ids
        for ids, logprob, score in zip(
            example.completions, drawn[example.line].logprobs, example.ref_logps or (), strict=True
        )
    ]
    noise = logps.TOKEN_NOISE["bf16"]  # sampling may have been in bfloat16, whatever this run is in
    if squares and math.sqrt(sum(squares) / len(squares)) > 6 * noise:
        console.warn(
            "the completions were drawn by another policy than the reference: their log-probs differ by "
            f"{math.sqrt(sum(squares) / len(squares)):.2g} nats rms, over the root of their tokens. The loss takes "
            "them for samples of the reference and leaves out the importance offset; sample from the reference"
        )
