"""Peak memory of the chunked implementation: the returned gradient and a few tiles, never a second (n, V) buffer.

Bytes are counted for every tensor that torch creates during a pass, until it is freed. test_gpu.py measures the memory
of a GPU, and benchmarks/ that of a process.
"""

import weakref

import pytest
import torch
from cases import IGNORED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import exo_kernels
from exo_kernels.chunked import tiles

V, ROWS = 32000, 96  # 12 MB of fp32 logits


class Peak(TorchDispatchMode):
    """Count the bytes of the live storages created inside the context, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in inputs | self.storages:
                size = x.untyped_storage().nbytes()
                self.storages.add(key)
                self.bytes += size
                weakref.finalize(x.untyped_storage(), self.freed, key, size)
        self.peak = max(self.peak, self.bytes)
        return results

    def freed(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.bytes -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["neighbours", "scattered"])
def test_peak_is_a_few_tiles_beyond_the_gradient(dtype, kind):
    chunked = exo_kernels.dispatch.implementation("chunked")
    logits = torch.randn(2, ROWS // 2, V).to(dtype)
    targets = torch.randint(V, (2, ROWS // 2))
    if kind == "scattered":
        targets[:, ::2] = IGNORED
    results = {}
    with Peak() as peak:
        results["forward"] = chunked.token_logps(logits, targets, 1.0, IGNORED, False)
    assert peak.peak <= 3 * tiles.TILE_BYTES + 2**16
    entropies, saved = results["forward"][1:]
    for grad in (torch.zeros_like(logits), logits):  # a fresh one; in place
        with Peak() as peak:
            chunked.token_logps_backward(
                grad, torch.ones(targets.shape), None, logits, targets, entropies, saved, 1.0, IGNORED
            )
        assert 0 < peak.peak <= 3 * tiles.TILE_BYTES + 2**16


def test_peak_counts_bytes():
    with Peak() as peak:
        x = torch.zeros(1000)
        (x + 1).mul(2)
    assert peak.peak == 12000 and peak.bytes == 4000
