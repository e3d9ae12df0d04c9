"""Lanes and markers: `pytest tests` is the normal lane, `TRITON_INTERPRET=1 pytest tests -m kernel` the interpreter's.

In the normal lane the `impl` fixture is "chunked", and "triton" too on a GPU. With TRITON_INTERPRET=1 it is "triton" on
CPU tensors: triton's interpreter runs the real kernels, at about a millisecond a program. A test that takes `impl` and
`device` has the marker `kernel`, so both lanes run the same tests. Uninitialized memory is full of NaN in such a test,
so that it fails if no kernel writes an output.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
# Files of tests that take more than ten seconds of their own process, whatever the number of their tests.
LONGEST = {
    "test_recipe", "test_parallel", "test_crashes", "test_aot", "test_resume", "test_attention", "test_imports",
    "test_linear_autograd", "test_linear", "test_linear_laws", "test_logits", "test_generation", "test_stops",
}  # fmt: skip
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic torch refuses to multiply


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests an empty cache, and no network: a lookup on the hub would be retried for a minute."""
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="exo-tests-")
    os.environ["HF_HUB_OFFLINE"] = "1"


def implementations() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    return ["chunked", "triton"] if CUDA else ["chunked"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)  # so that no process ends long after the others
    for item in items:
        if {"impl", "device"} <= set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kernel)
        if item.get_closest_marker("gpu") and (not CUDA or INTERPRETED):
            reason = "needs a GPU that is not interpreted" if CUDA else "needs a CUDA device: none here"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=implementations())
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: for small tensors, waking a second one costs more than it saves."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture
def device(impl: str, one_thread: None) -> Iterator[str]:
    """Return the device of this implementation's tensors; uninitialized memory there is NaN."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(
        True
    )  # fills torch.empty with NaN, and refuses operations that are not deterministic
    yield "cuda" if impl == "triton" and not INTERPRETED else "cpu"
    torch.use_deterministic_algorithms(previous)
