"""Bad input raises a ValueError with one line: the argument, what was expected, what was given.

Every public function is called with every kind of wrong argument. The other device is "meta", which has no values, so
these tests also check that the device is validated before the values.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from refusals import ALL_LOSSES, IMPLS, INF, LOSSES, NAN, ON_LOGITS, N, T, V, assert_refused, good, named

import exo_kernels
from exo_kernels import fused_exo_loss, preference_loss, sequence_logps, token_logps


@pytest.mark.parametrize("function", [*ON_LOGITS, preference_loss], **named)
def test_valid_arguments_are_accepted(function):
    assert function(**good(function)).isfinite().all()
    if function is not preference_loss:
        assert function(**good(function, packed=True)).isfinite().all()


# Tensors: each replaced by every kind of wrong value.

LOGITS = {
    "a-list": [[0.0]],
    "an-array": torch.zeros(N, T, V).numpy(),
    "none": None,
    "integers": torch.zeros(N, T, V, dtype=torch.long),
    "booleans": torch.zeros(N, T, V, dtype=torch.bool),
    "complex": torch.zeros(N, T, V, dtype=torch.complex64),
    "float8": torch.zeros(N, T, V).to(torch.float8_e4m3fn),
    "one-dimension": torch.zeros(V),
    "four-dimensions": torch.zeros(1, N, T, V),
    "no-vocabulary": torch.zeros(N, T, 0),
}


@pytest.mark.parametrize("bad", LOGITS)
@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_logits(function, bad):
    assert_refused("logits", function, logits=LOGITS[bad])


LABELS = {
    "a-list": [[0] * T] * N,
    "none": None,
    "floats": torch.ones(N, T),
    "uint8": torch.ones(N, T, dtype=torch.uint8),
    "int16": torch.ones(N, T, dtype=torch.int16),
    "booleans": torch.ones(N, T, dtype=torch.bool),
    "a-number": torch.tensor(1),
    "other-length": torch.ones(N, T + 1, dtype=torch.long),
    "other-batch": torch.ones(N - 1, T, dtype=torch.long),
    "flat": torch.ones(N * T, dtype=torch.long),
    "broadcast": torch.ones(1, T, dtype=torch.long),
    "other-device": torch.ones(N, T, dtype=torch.long, device="meta"),
}


@pytest.mark.parametrize("bad", LABELS)
@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_labels(function, bad):
    assert_refused("labels", function, labels=LABELS[bad])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("label", [V, V + 1, -1, -99, -101, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_labels_out_of_range(function, label, dtype, impl):
    labels = torch.ones(N, T, dtype=dtype)
    labels[2, 1] = label
    message = assert_refused("labels", function, labels=labels, impl=impl)
    assert f"[0, {V})" in message and str(label) in message and "(2, 0)" in message  # the row that scores it
    assert_refused("labels", function, True, labels=labels.flatten(), impl=impl)


def test_a_label_beyond_int32():
    labels = torch.ones(N, T, dtype=torch.long)
    labels[0, 1] = 2**32 + 1  # would be 1 in 32 bits
    assert str(2**32 + 1) in assert_refused("labels", fused_exo_loss, labels=labels)


def test_unscored_label_is_not_checked():
    """Check that the first label of a shifted sequence, which no row predicts, may be out of range."""
    arguments = good(token_logps)
    arguments["labels"][:, 0] = 10**6
    assert token_logps(**arguments).isfinite().all()


REFERENCES = {
    "a-list": [0.0] * N,
    "none": None,
    "integers": torch.zeros(N, dtype=torch.long),
    "half": torch.zeros(N, dtype=torch.float16),
    "bfloat16": torch.zeros(N, dtype=torch.bfloat16),
    "other-length": torch.zeros(N + 1),
    "column": torch.zeros(N, 1),
    "a-number": torch.tensor(0.0),
    "per-token-but-short": torch.zeros(N, T - 1),
    "other-device": torch.zeros(N, device="meta"),
}


@pytest.mark.parametrize("bad", REFERENCES)
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_ref_logps(function, bad):
    assert_refused("ref_logps", function, ref_logps=REFERENCES[bad])


@pytest.mark.parametrize("bad", [name for name in REFERENCES if name not in ("other-length", "other-device")])
def test_policy_logps(bad):
    assert_refused("policy_logps", preference_loss, policy_logps=REFERENCES[bad])


def test_policy_and_reference_on_two_devices():
    assert_refused("ref_logps", preference_loss, policy_logps=torch.zeros(N, device="meta"))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_references_that_are_not_finite(function, bad):
    """Check that every sum must be finite, but per-token values of ignored tokens need not be."""
    sums = torch.zeros(N)
    sums[2] = bad
    for impl in IMPLS if function is not preference_loss else ["auto"]:
        options = {} if function is preference_loss else {"impl": impl}
        assert "sequence 2" in assert_refused("ref_logps", function, ref_logps=sums, **options)
        if function is not preference_loss:
            per_token = torch.zeros(N, T)
            per_token[2, 1] = bad
            assert_refused("ref_logps", function, ref_logps=per_token, **options)
            per_token = torch.zeros(N, T)
            per_token[:, -1] = bad  # the last row of a shifted sequence scores nothing
            assert function(**good(function) | {"ref_logps": per_token}, **options).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("function", LOSSES, **named)
def test_sequence_without_labels_warns(function, impl):
    labels = good(function)["labels"]
    labels[3] = -100
    with pytest.warns(UserWarning, match="^labels: sequence 3 has none"):
        function(**good(function) | {"labels": labels}, impl=impl)
    reference = torch.tensor([0.0, 0.0, 0.0, -5.0])  # of tokens that the policy does not score
    assert "sequence 3" in assert_refused("ref_logps", function, labels=labels, ref_logps=reference, impl=impl)
    labels[2] = -100  # now the complete group has no labels: its gradient is 0, and there is no warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(**good(function) | {"labels": labels}, impl=impl)


def odd_tensors(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the same tensor in layouts that kernels cannot index."""
    odd = {"sparse": x.to_sparse(), "nested": torch.nested.nested_tensor(list(x)) if x.dim() > 1 else x.to_sparse()}
    if x.dtype == torch.float32 and x.numel():
        odd["mkldnn"] = x.to_mkldnn()
    return odd


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", [*ON_LOGITS, preference_loss], **named)
def test_sparse_mkldnn_and_nested_tensors(function):
    arguments = good(function)
    if function in ALL_LOSSES:
        arguments |= {"rewards": torch.zeros(N), "group_size": torch.tensor([2, 2])}
    for name, value in arguments.items():
        for kind, odd in odd_tensors(value).items():
            message = assert_refused(name, function, **arguments | {name: odd})
            assert kind in message or "sparse" in message


@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_reference_impl_refuses_meta_tensors(function):
    meta = {name: value.to("meta") for name, value in good(function).items()}
    assert_refused("impl", function, impl="reference", **meta)
    assert function(**meta).device.type == "meta"


@pytest.mark.parametrize("function", LOSSES, **named)
def test_no_sequences_with_references_per_token(function):
    """Check that the loss is 0 and the gradient has the right shape, also for the oracle."""
    for impl in IMPLS:
        x, labels = torch.zeros(0, T, V, requires_grad=True), torch.zeros(0, T, dtype=torch.long)
        loss = function(x, labels, torch.zeros(0, T), impl=impl)
        loss.backward()
        assert loss.item() == 0 and x.grad.shape == (0, T, V)


@pytest.mark.parametrize("function", LOSSES, **named)
def test_inplace_backward_on_no_elements(function):
    """Check that an empty tensor with expanded strides does not count as shared memory."""
    for logits in (torch.zeros(1, 1, V).expand(N, 0, V), torch.zeros(0, 1, V).expand(0, T, V)):
        labels, ref = torch.zeros(logits.shape[:2], dtype=torch.long), torch.zeros(len(logits))
        assert function(logits * 1, labels, ref, inplace_backward=True).isfinite()
        assert function(logits, labels, ref, inplace_backward=True).isfinite()


REWARDS = {
    "a-list": [0.0] * N,
    "integers": torch.zeros(N, dtype=torch.long),
    "other-length": torch.zeros(N - 1),
    "matrix": torch.zeros(2, 2),
    "other-device": torch.zeros(N, device="meta"),
    "nan": torch.tensor([0.0, NAN, 0.0, 0.0]),
    "inf": torch.tensor([0.0, INF, 0.0, 0.0]),
    "minus-inf": torch.tensor([0.0, -INF, 0.0, 0.0], dtype=torch.float16),
}


@pytest.mark.parametrize("bad", REWARDS)
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_rewards(function, bad):
    message = assert_refused("rewards", function, rewards=REWARDS[bad])
    if "inf" in bad or bad == "nan":
        assert "sequence 1" in message
        for impl in IMPLS if function is not preference_loss else []:
            assert_refused("rewards", function, rewards=REWARDS[bad], impl=impl)


# Layouts.


@pytest.mark.parametrize("function", [sequence_logps, *LOSSES], **named)
def test_packed_rows_need_boundaries(function):
    assert_refused("cu_seqlens", function, True, cu_seqlens=None)


@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_packed_rows_are_not_shifted(function):
    assert_refused("shift", function, True, shift=True)


@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_padded_rows_have_no_boundaries(function):
    assert_refused("cu_seqlens", function, cu_seqlens=torch.arange(0, N * T + 1, T))


BOUNDARIES = {
    "a-list": [0, 12],
    "floats": torch.arange(0.0, 13.0, 3.0),
    "matrix": torch.zeros(2, 2, dtype=torch.long),
    "empty": torch.zeros(0, dtype=torch.long),
    "other-device": torch.arange(0, 13, 3, device="meta"),
}
BOUNDARY_VALUES = {
    "decreasing": [0, 6, 3, 9, 12],
    "starts-late": [1, 3, 6, 9, 12],
    "starts-below": [-1, 3, 6, 9, 12],
    "ends-early": [0, 3, 6, 9, 11],
    "ends-late": [0, 3, 6, 9, 13],
    "beyond-int32": [0, 3, 6, 9, 2**32 + 12],
}


@pytest.mark.parametrize("bad", BOUNDARIES)
@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_cu_seqlens(function, bad):
    assert_refused("cu_seqlens", function, True, cu_seqlens=BOUNDARIES[bad])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", BOUNDARY_VALUES)
@pytest.mark.parametrize("function", LOSSES, **named)
def test_cu_seqlens_values(function, bad, impl):
    bounds = torch.tensor(BOUNDARY_VALUES[bad])
    assert "12" in assert_refused("cu_seqlens", function, True, cu_seqlens=bounds, impl=impl)


def test_cu_seqlens_values_of_sequence_logps():
    """Run in a child process, because sums over unchecked boundaries end in a segmentation fault."""
    program = (
        "import test_bad_input as t, torch\n"
        "for name, bounds in t.BOUNDARY_VALUES.items():\n"
        "    for impl in t.IMPLS:\n"
        "        print(name, impl, flush=True)\n"
        "        changes = {'cu_seqlens': torch.tensor(bounds), 'impl': impl}\n"
        "        t.assert_refused('cu_seqlens', t.sequence_logps, True, **changes)\n"
    )
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parents[1])))}
    child = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, f"exit status {child.returncode} after:\n{child.stdout}{child.stderr}"


SIZES = {
    "zero": 0,
    "negative": -2,
    "no-divisor": 3,
    "more-than-all": 8,
    "a-float": 2.0,
    "a-boolean": True,
    "a-list": [2, 2],
    "none": None,
    "floats": torch.tensor([2.0, 2.0]),
    "a-number": torch.tensor(2),
    "matrix": torch.tensor([[2, 2]]),
    "too-many": torch.ones(5, dtype=torch.long),
    "other-device": torch.tensor([2, 2], device="meta"),
}
SIZE_VALUES = {"too-few": [1, 2], "too-large": [2, 3], "a-zero": [4, 0], "negative": [6, -2], "none": []}


@pytest.mark.parametrize("bad", SIZES)
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_group_size(function, bad):
    assert_refused("group_size", function, group_size=SIZES[bad])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", SIZE_VALUES)
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_group_size_values(function, bad, impl):
    sizes = torch.tensor(SIZE_VALUES[bad], dtype=torch.int32)
    options = {} if function is preference_loss else {"impl": impl}
    assert "4" in assert_refused("group_size", function, group_size=sizes, **options)


# In-place backward.

SHARED_MEMORY = {
    "expanded": torch.zeros(1, 1, V).expand(N, T, V),
    "one-row": torch.zeros(N, 1, V).expand(N, T, V),
    "overlapping": torch.zeros(V + N * T - 1).unfold(0, V, 1).view(N, T, V),
}


@pytest.mark.parametrize("bad", ["expanded", "one-row", "overlapping"])
@pytest.mark.parametrize("function", LOSSES, **named)
def test_inplace_backward_on_shared_memory(function, bad):
    assert_refused("inplace_backward", function, logits=SHARED_MEMORY[bad], inplace_backward=True)
    assert function(**good(function) | {"logits": SHARED_MEMORY[bad]}).isfinite()


@pytest.mark.parametrize("function", LOSSES, **named)
def test_inplace_backward_with_the_oracle(function):
    assert_refused("inplace_backward", function, impl="reference", inplace_backward=True)


# Implementations that are not available, and wrong calls.


@pytest.mark.skipif(exo_kernels.dispatch.INTERPRETED, reason="the interpreter runs Triton kernels on CPU tensors")
@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_triton_on_a_cpu_is_refused(function):
    assert_refused("impl", function, impl="triton")


@pytest.mark.skipif(exo_kernels.dispatch.INTERPRETED, reason="the interpreter needs triton")
def test_triton_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(exo_kernels.dispatch, "TRITON_INSTALLED", False)
    assert "pip install" in assert_refused("impl", fused_exo_loss, impl="triton")


def test_positional_options_are_refused():
    arguments = good(fused_exo_loss)
    with pytest.raises(TypeError):
        fused_exo_loss(*arguments.values(), 2)
    with pytest.raises(TypeError, match="beta_p"):
        fused_exo_loss(**arguments, beta_p=0.1)
