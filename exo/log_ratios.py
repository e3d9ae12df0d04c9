"""Log-probs of completions under a policy and its reference, for the KL and the density ratio.

Left out: what is made of them (estimates, density).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from exo import encoding, policy
from exo.data import Group
from exo.limits import Limits
from exo.packing import Packing

Tokens = list[list[Tensor]]  # a row a prompt, a tensor (tokens,) in float64 a completion


class Models(NamedTuple):
    """Policy and reference, and how both read completions: after as much of a prompt as was sampled after."""

    policy: Any
    reference: Any
    tokenizer: Any
    accelerator: Accelerator
    max_tokens: int  # per batch
    limits: Limits
    temperature: float

    def logps(self, groups: Sequence[Group], path: str = "samples") -> tuple[Tokens, Tokens]:
        """Log-probs of each token under the policy and under the reference. `path` is named in errors."""
        encoded, _ = encoding.encode(groups, self.tokenizer, self.limits, path)
        packing = Packing(self.tokenizer.pad_token_id, self.max_tokens)
        ours, theirs = (
            policy.shared_token_logps(model, encoded, self.accelerator, packing, self.temperature)
            for model in (self.policy, self.reference)
        )
        return ours, theirs

    def log_ratios(self, groups: Sequence[Group]) -> Tokens:
        """log pi - log ref of each token."""
        return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*self.logps(groups), strict=True)]

    def density(self, groups: Sequence[Group], path: str) -> list[dict[str, Any]]:
        """A row for each prompt of the reference's samples: log-probs of its completions under both, and rewards."""
        ours, theirs = ([[float(row.sum()) for row in rows] for rows in of] for of in self.logps(groups, path))
        return [
            {"prompt": group.prompt, "logps": logps, "ref_logps": ref_logps, "rewards": group.rewards}
            for group, logps, ref_logps in zip(groups, ours, theirs, strict=True)
        ]
