"""Input for the tests of the losses: rows that are peaked, masked and ragged, because random rows hide bugs.

Random logits have a nearly uniform softmax, which hides most bugs. Here a third of the rows is nearly uniform, a third
has one logit 10 to 40 above the rest at the label, and a third has it at another id. All values are finite and in
range; test_adversarial.py changes some of them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo_kernels import reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
IGNORED = -100


class Case(NamedTuple):
    """One call of a fused loss."""

    logits: Tensor  # (N, T, V), or packed (n, V)
    labels: Tensor  # (N, T), or packed (n,)
    ref_logps: Tensor
    objective: str = "exo"
    options: dict[str, Any] = {}  # keyword arguments of the loss
    weights: Tensor | None = None  # (G,): with reduction="none", gradient of the losses

    def with_options(self, **options: Any) -> "Case":
        return self._replace(options=self.options | options)

    def layout(self) -> dict[str, Any]:
        """Return the options that token_logps and sequence_logps also take."""
        names = ("temperature", "cu_seqlens", "shift", "ignore_index")
        return {name: self.options[name] for name in names if name in self.options}

    def on(self, device: str) -> "Case":
        """Move the case to a device. On the same device nothing is copied, so strides stay."""
        if device == "cpu":
            return self
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        moved = (x.to(device) for x in (self.logits, self.labels, self.ref_logps))
        weights = None if self.weights is None else self.weights.to(device)
        return Case(*moved, self.objective, options, weights)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_labels(shape: tuple[int, ...], vocab: int, seed: int = 0, ignored: float = 0.3) -> Tensor:
    """Return random labels that include the first and the last id; a share of them is ignored."""
    rng = seeded(seed)
    labels = torch.randint(vocab, shape, generator=rng)
    labels[torch.rand(shape, generator=rng) < ignored] = IGNORED
    if labels.numel() > 2:
        labels.view(-1)[1], labels.view(-1)[2] = vocab - 1, 0
    return labels


def make_logits(targets: Tensor, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return one row per target: in turn nearly uniform, confident and right, or confident and wrong."""
    rng = seeded(seed + 1)
    logits = torch.randn((*targets.shape, vocab), generator=rng, dtype=torch.float64)
    gaps = 10 + 30 * torch.rand(targets.shape, generator=rng, dtype=torch.float64)
    kinds = torch.arange(targets.numel()).view(targets.shape) % 3
    right = targets.clamp(0, vocab - 1)
    peak = torch.where(kinds == 1, right, (right + 1) % vocab)
    logits.scatter_add_(-1, peak[..., None], (gaps * (kinds > 0))[..., None])
    return logits.to(dtype)


def aligned(labels: Tensor, shift: bool | None = None) -> Tensor:
    """Return the target of every row, without groups.align_targets because that is under test."""
    if labels.dim() == 1 or shift is False:
        return labels.long()
    targets = torch.full_like(labels, IGNORED, dtype=torch.long)
    targets[:, : max(labels.shape[1] - 1, 0)] = labels[:, 1:]
    return targets


def make_ref(logits: Tensor, labels: Tensor, layout: dict[str, Any], seed: int = 0) -> Tensor:
    """Return per-token float64 log-probs of a reference model close to the policy."""
    noise = torch.randn(logits.shape, generator=seeded(seed + 2), dtype=torch.float64)
    return reference.token_logps(logits.double() + 0.3 * noise, labels, **layout)


def sums_of(per_token: Tensor, cu_seqlens: Tensor | None) -> Tensor:  # (N,)
    if cu_seqlens is None:
        return per_token.sum(-1)
    return torch.stack([part.sum() for part in per_token.split(cu_seqlens.diff().tolist())])


def make_case(
    n: int = 4,
    t: int = 5,
    vocab: int = 129,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    lengths: list[int] | None = None,  # if given, the case is packed, and n and t are not used
    per_token_ref: bool = False,
    ref_dtype: torch.dtype = torch.float64,
    objective: str = "exo",
    weights: bool = False,
    rewards: bool = False,
    **options: Any,
) -> Case:
    if lengths is not None:
        n = len(lengths)
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    labels = make_labels((n, t) if lengths is None else (sum(lengths),), vocab, seed)
    logits = make_logits(aligned(labels, options.get("shift")), vocab, dtype, seed)
    if rewards:
        options["rewards"] = torch.randn(n, generator=seeded(seed + 3))
    case = Case(logits, labels, torch.empty(0), objective, options)
    ref = make_ref(logits, labels, case.layout(), seed)
    ref = ref if per_token_ref else sums_of(ref, options.get("cu_seqlens"))
    case = case._replace(ref_logps=ref.to(ref_dtype))
    if weights:
        sizes = options.get("group_size", 2)
        n_groups = n // sizes if isinstance(sizes, int) else sizes.numel()
        case = case._replace(weights=torch.randn(n_groups, generator=seeded(seed + 4), dtype=torch.float64))
    return case


def layouts(logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the same (N, T, V) values with strides that users create: views of larger tensors full of NaN."""
    n, t, v = logits.shape

    def inside(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=logits.dtype, device=logits.device)

    yield "transposed-time", inside(t, n, v).transpose(0, 1).copy_(logits)
    yield "vocab-outermost", inside(v, n, t).permute(1, 2, 0).copy_(logits)
    yield "padded-vocab", inside(n, t, v + 7)[..., :v].copy_(logits)  # sentinel columns that must not be read
    yield "offset-vocab", inside(n, t, v + 3)[..., 3:].copy_(logits)
    yield "every-second-column", inside(n, t, 2 * v)[..., ::2].copy_(logits)
    yield "without-last-row", inside(n, t + 1, v)[:, :-1].copy_(logits)
    yield "without-first-row", inside(n, t + 1, v)[:, 1:].copy_(logits)
    yield "every-second-sequence", inside(2 * n, t, v)[::2].copy_(logits)
    yield "odd-storage-offset", inside(n * t * v + 1)[1:].view(n, t, v).copy_(logits)
