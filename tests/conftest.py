"""Lanes and markers. `pytest tests` is the normal lane; `TRITON_INTERPRET=1 pytest tests -m kernel` the interpreter's.

In the normal lane the `impl` fixture is "chunked", and "triton" too where there is a GPU. With TRITON_INTERPRET=1 it is
"triton" on CPU tensors: the real kernels, run by triton's interpreter at about a millisecond a program. A test that
takes `impl` and `device` carries the marker `kernel`, so both lanes run the same tests.
Every such test runs with uninitialised memory full of NaN: an output that no kernel wrote does not go unseen.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic torch refuses to multiply


def pytest_configure(config: pytest.Config) -> None:
    """Nothing of a test stays in the user's cache, and nothing of it comes into a test."""
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="exo-tests-")


def implementations() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    return ["chunked", "triton"] if CUDA else ["chunked"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
    """For small tensors waking a second thread costs more than it does: twenty times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(impl: str, one_thread: None) -> Iterator[str]:
    """Where this implementation's tensors live; fresh memory there is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, and refuses what is not deterministic
    yield "cuda" if impl == "triton" and not INTERPRETED else "cpu"
    torch.use_deterministic_algorithms(before)
