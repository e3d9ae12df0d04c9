"""Every Triton kernel compiled for real chips, without one: nothing spills, and rows are walked at full width.

What is asked of the main loops of the token pass and its backward pass is what lets memory be the bound: accesses of
128 bits, one exponential an element (their unit is narrow: with three an element, it would be the bound), no fp64, and
no thread waiting for another. Not here: speed, which takes a GPU. `pytest tests/test_aot.py -s` prints the table.
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
from aot import GroupCase, TokenCase  # noqa: E402

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
SLOW = [case for case in PRODUCT if case not in aot.CASES]
FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|v_\w+_f64")
WAITING = re.compile(r"BAR|SHFL|LDS|STS|s_barrier|ds_|v_\w+_dpp")

targets = pytest.mark.parametrize("target", aot.TARGETS)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Compiled here and now, whatever triton has seen before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@targets
@pytest.mark.parametrize("case", [*aot.CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_nothing_spills(case, target):
    assert aot.compiled(case, target).spilled == 0


@targets
@pytest.mark.parametrize("case", aot.WALKED, ids=str)
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


@targets
def test_skewed_rows_are_stored_at_full_width(target):
    """Where logits and gradient cannot both be aligned, the gradient is: its lines would be written in pieces."""
    code = aot.compiled(TokenCase(True, torch.bfloat16, layout="skewed"), target)
    assert set(code.loop.stores) == {16}


def test_table():
    """Prints what the tests above looked at; `python -m tests.aot` does too."""
    print("\n" + aot.table())
