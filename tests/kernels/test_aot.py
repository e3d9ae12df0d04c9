"""Compile every Triton kernel for real chips, without a GPU: nothing spills, and memory accesses have full width.

The main loops over a row, of logits or of a chunk behind the head's matmul, must be bound by memory: accesses of 128
bits, one exponential per element (three would saturate their narrow unit for 16-bit logits), no fp64, and no
synchronisation between threads. Speed is not tested here because it needs a GPU.
The fast lane compiles each case for sm_90 and, in turn, one other chip; `make test-all` compiles all pairs.
`python -m tests.aot` prints a table of all cases.
"""

import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels made for the interpreter do not compile", allow_module_level=True)

import aot  # noqa: E402
from aot import ChunkCase, GroupCase, TokenCase  # noqa: E402

PRODUCT = [
    TokenCase(backward, dtype, entropy, layout=layout)
    for backward, dtype, entropy, layout in itertools.product(
        (False, True), [*aot.FP32_MATH, torch.float64], (False, True), ("plain", "skewed", "transposed")
    )
]
PRODUCT += [
    GroupCase(*case)
    for case in itertools.product(("exo", "dpo"), (False, True), (False, True), (torch.float32, torch.float64))
]
CHUNKS = [ChunkCase(False, *flags) for flags in itertools.product((False, True), repeat=3)]
CHUNKS += [
    ChunkCase(True, *flags, out=out)
    for *flags, out in itertools.product(*[(False, True)] * 3, (None, torch.bfloat16, torch.float16))
]
PRODUCT += CHUNKS
PRODUCT += [ChunkCase(*flags, dtype=torch.float64) for flags in itertools.product((False, True), repeat=4)]


def pairs(cases, fast=None):
    """Parametrize a test by case and target; a pair is slow if the case is not in `fast` or the target has no turn."""
    others = [target for target in aot.TARGETS if target != "sm_90"]
    params = []
    for i, case in enumerate(cases):
        turn = ("sm_90", others[i % len(others)]) if fast is None or case in fast else ()
        for target in aot.TARGETS:
            marks = () if target in turn else pytest.mark.slow
            params.append(pytest.param(case, target, marks=marks, id=f"{case}-{target}"))
    return pytest.mark.parametrize(("case", "target"), params)


FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|v_\w+_f64")
OTHER_SPECIALS = re.compile(r"MUFU\.(?!EX2)|v_(rcp|rsq|sqrt|log|div_\w+)_f32")
WAITING = re.compile(r"BAR|SHFL|LDS|STS|s_barrier|ds_|v_\w+_dpp")

targets = pytest.mark.parametrize(
    "target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.slow) for t in aot.TARGETS]
)


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    """Use an empty cache, so that every kernel is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pairs(dict.fromkeys(aot.CASES + PRODUCT), fast=aot.CASES)
def test_nothing_spills(case, target):
    assert aot.compiled(case, target).spilled == 0


@pairs(aot.WALKED)
def test_main_loop(case, target):
    code = aot.compiled(case, target)
    loop = code.loop
    assert loop, "no loop loads anything"
    assert set(loop.loads) == {16}, "a load is not 128 bits wide"
    assert sum(loop.loads) == code.elements * case.dtype.itemsize, "not one load of each element"
    assert loop.stores == (loop.loads if case.backward else [])
    assert 1 <= loop.exponentials / code.elements <= 1.1
    assert not [text for text in loop.instructions if FP64.match(text)]
    assert not [text for text in loop.instructions if WAITING.match(text)]


@pairs(CHUNKS, fast=aot.CHUNKS)
def test_chunk_loop(case, target):
    """Check the loops over fp32 chunks, where three operations of the narrow unit per element are still fast enough.

    A softcap needs three: two exponentials and a reciprocal square root. Measured instructions per element for
    log-probs and bf16 gradients on sm_90: 10 and 12, with bias 14 and 14, with softcap 27 and 31, with both 29 and 33.
    An H200 issues 28 in the time it takes to read an element, and 42 if it also writes two bytes.
    """
    code = aot.compiled(case, target)
    loop, n = code.loop, code.elements
    assert min(loop.loads) >= 16
    assert sum(loop.loads) == n * 4 * (2 if case.bias else 1), "not one load of each element, and of its bias"
    width = (case.out or case.dtype).itemsize
    assert loop.stores == ([16] * (n * width // 16) if case.gradient else [])
    assert 1 <= (loop.exponentials - n * case.capped) / n <= (1 if case.gradient else 1.07)
    assert len([text for text in loop.instructions if OTHER_SPECIALS.match(text)]) == n * case.capped
    assert len(loop.instructions) / n <= 25 + 16 * case.capped
    assert code.occupancy >= 0.5
    assert not [text for text in loop.instructions if FP64.match(text) or WAITING.match(text)]


@targets
@pytest.mark.parametrize("gradient", (False, True))
def test_fp64_chunks_use_full_width(gradient, target):
    loop = aot.compiled(ChunkCase(gradient, dtype=torch.float64), target).loop
    assert loop.loads == [16] * 4
    assert loop.stores == [16] * 4 * gradient


@targets
def test_skewed_rows_are_stored_at_full_width(target):
    """Check that the gradient is aligned if logits and gradient cannot both be, so that stores fill cache lines."""
    code = aot.compiled(TokenCase(True, torch.bfloat16, layout="skewed"), target)
    assert set(code.loop.stores) == {16}


@pytest.mark.slow
def test_table():
    print("\n" + aot.table())
