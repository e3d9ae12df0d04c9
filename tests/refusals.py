"""Helpers for tests of bad input: valid arguments, and the error that an invalid one raises."""

import math
import re

import pytest
import torch

from exo_kernels import fused_dpo_loss, fused_exo_loss, preference_loss, sequence_logps, token_logps

N, T, V = 4, 3, 7
LOSSES = [fused_exo_loss, fused_dpo_loss]
ON_LOGITS = [token_logps, sequence_logps, *LOSSES]
ALL_LOSSES = [*LOSSES, preference_loss]
IMPLS = ["auto", "chunked", "reference"]
NAN, INF = math.nan, math.inf
named = {"ids": lambda f: getattr(f, "__name__", None)}


def good(function, packed: bool = False) -> dict:
    """Return valid arguments of the function, by name."""
    if function is preference_loss:
        return {"policy_logps": torch.zeros(N), "ref_logps": torch.zeros(N)}
    arguments = {"logits": torch.zeros(N, T, V), "labels": torch.ones(N, T, dtype=torch.long)}
    if packed:
        arguments = {"logits": torch.zeros(N * T, V), "labels": torch.ones(N * T, dtype=torch.long)}
        arguments["cu_seqlens"] = torch.arange(0, N * T + 1, T)
    if function in LOSSES:
        arguments["ref_logps"] = torch.zeros(N)
    return arguments


def refusal(function, packed: bool = False, **changes) -> str:
    """Return the message of the ValueError, which must be one line: "argument: expected ...; got ..."."""
    arguments = good(function, packed) | changes
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    message = str(caught.value)
    assert re.fullmatch(r"\w+: expected [^\n]+; got [^\n]+", message), message
    assert len(message) < 300
    return message


def assert_refused(argument: str, function, packed: bool = False, **changes) -> str:
    message = refusal(function, packed, **changes)
    assert message.startswith(f"{argument}: "), message
    return message
