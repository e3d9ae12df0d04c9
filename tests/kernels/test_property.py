"""Property tests: random shapes with random options, which the hand-written grids do not cover. Deterministic."""

import pytest
import torch
from budget import check_loss, check_tokens
from cases import DTYPES, IGNORED, aligned, make_case, make_labels, make_logits

import exo_kernels

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# The interpreter takes a second for an example that otherwise takes 20 ms.
EXAMPLES = 12 if exo_kernels.dispatch.INTERPRETED else 150
common = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@st.composite
def cases(draw):
    """Draw a padded or packed case with any options; groups may be ragged, sequences may have no tokens or no loss."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    n = sum(sizes)
    even = len(set(sizes)) == 1
    options = {
        "group_size": sizes[0] if even and draw(st.booleans()) else torch.tensor(sizes),
        "temperature": draw(st.sampled_from([1.0, 0.7, 3.0])),
        "beta_pi": draw(st.sampled_from([0.1, 1.0, 5.0])),
        "beta_r": draw(st.sampled_from([1.0, 0.1])),
        "label_smoothing": draw(st.sampled_from([1e-3, 0.5, 0.999])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "shift": draw(st.sampled_from([None, False, True])),
    }
    options["weights"] = options["reduction"] == "none"
    if options["reduction"] == "mean":
        options["num_groups"] = draw(st.sampled_from([None, 9]))
    lengths = draw(st.none() | st.lists(st.integers(0, 4), min_size=n, max_size=n))
    if lengths is not None and options["shift"]:
        options["shift"] = False
    per_token = draw(st.booleans())
    if lengths is not None and sum(lengths) == n:
        per_token = False  # with as many rows as sequences, (n,) would be taken for sums
    return make_case(
        n,
        draw(st.integers(0, 4)),
        draw(st.sampled_from([1, 2, 9, 17, 64])),
        draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
        lengths=lengths,
        objective=draw(st.sampled_from(["exo", "dpo"])),
        rewards=draw(st.booleans()),
        per_token_ref=per_token,
        ref_dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        **options,
    )


@common
@given(case=cases())
def test_any_loss(impl, device, case):
    check_loss(case, impl, device)


@common
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    entropy=st.booleans(),
    shift=st.booleans(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    minus_inf=st.booleans(),
)
def test_any_rows(impl, device, shape, dtype, temperature, entropy, shift, ignored, minus_inf):
    """Check token_logps, with some logits at -inf but never that of the label."""
    n, t, vocab = shape
    labels = make_labels((n, t), vocab, seed=vocab, ignored=ignored)
    labels = labels if ignored < 1 else torch.full_like(labels, IGNORED)
    targets = aligned(labels, shift)
    logits = make_logits(targets, vocab, dtype, seed=t)
    if minus_inf:
        mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(n)) < 0.3
        mask.scatter_(-1, targets.clamp(min=0)[..., None], False)
        logits.masked_fill_(mask, -torch.inf)
    check_tokens(logits, labels, impl, device, entropy=entropy, temperature=temperature, shift=shift)
