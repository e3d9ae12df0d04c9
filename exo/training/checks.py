"""Checks of an alignment: who drew the completions, and whether the first loss is the one that theory predicts."""

import math
from collections.abc import Callable, Mapping, Sequence

from exo import data
from exo.cli import console
from exo.cli.errors import RunError
from exo.data.text.tokenize import TokenizedExample
from exo.models import logps
from exo.training.metrics import MEAN_SQUARE
from exo.training.preference import PreferenceLoss


def warn_of_other_sampler(rows: Sequence[data.Example], scored: Sequence[TokenizedExample]) -> None:
    """Warn if the log-probs of the sampler show that another policy than the reference drew the completions.

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


def first_loss_check(
    module: PreferenceLoss, batch: Sequence[TokenizedExample], mixed_precision: str, not_comparable: str
) -> Callable[[float, Mapping[str, float]], None]:
    """Return a function that compares the first loss with the loss of a policy that equals its reference.

    `batch` is the first global batch. `not_comparable` says why they differ by right, or is "". The function raises
    RunError if they differ by more than rounding.
    """
    expected, tolerance = module.expected_first_loss(batch, mixed_precision)
    most = module.max_rounding_error(batch, mixed_precision)

    def check(loss: float, values: Mapping[str, float]) -> None:
        reason = f" (not comparable: {not_comparable})" if not_comparable else ""
        console.log(f"first loss: expected {expected:.5f} +- {tolerance:.1g}, seen {loss:.5f}{reason}")
        square = values[MEAN_SQUARE]
        if not not_comparable and not (abs(loss - expected) <= tolerance and square <= most):
            raise RunError(
                f"the first loss is {loss:.5f}, but where policy equals reference it is {expected:.5f} "
                f"+- {tolerance:.1g}; their log-probs differ by {square**0.5:.2g} nats rms, and {most**0.5:.2g} is the "
                "most that rounding does: a wrong mask, reference, temperature, adapter base or dropout"
            )

    return check
