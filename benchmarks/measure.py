"""Measure seconds and bytes of one call.

On a GPU, time is measured between two events on the device. Copies are queued first, so that the host has queued the
complete call before it begins (in training, the kernels of the model have this effect); they also give the bandwidth.
"""

import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

COPY_BYTES = 2**30
COPIES = 8  # 16 GiB moved, 4 ms on an H200: longer than any contender takes to queue its kernels
RESIDENT_RUNS = 3  # the C library caches a few MiB of freed blocks, different in each run, so the median is used

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Time(NamedTuple):
    seconds: float  # on the device
    wall_seconds: float  # from the call to the end of synchronisation
    copy_bytes_per_second: float | None  # read + written, right before on the same device


class Clock:
    """Measure the time of calls on a device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
            self.target = torch.empty_like(self.source)

    def __call__(self, call: Callable[[], Any]) -> Time:
        begin = time.perf_counter()
        result = call()  # keep the result until the clock has stopped, because freeing it is not part of the call
        if self.cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - begin
        del result
        return self._device_time(call, wall) if self.cuda else Time(wall, wall, None)

    def _device_time(self, call: Callable[[], Any], wall: float) -> Time:
        copy, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        copy.record()
        for _ in range(COPIES):
            self.target.copy_(self.source)
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        copied = COPIES * 2 * COPY_BYTES
        return Time(start.elapsed_time(end) / 1e3, wall, copied / (copy.elapsed_time(start) / 1e3))


class Memory(NamedTuple):
    """Peak bytes of a call beyond the memory in use before it and its results."""

    allocated: int  # counted by torch's allocator
    resident: int | None  # counted by the system in pages of the process, as a cross-check; None if not available

    @property
    def extra(self) -> int:
        return max(x for x in self if x is not None)


def memory(call: Callable[[], Any], device: str, resident_runs: int = RESIDENT_RUNS) -> Memory:
    """Return the peak memory of a call. Warm up first: compilation and caches are not part of the call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del result
        return Memory(extra, None)
    if not _reset_peak():
        return Memory(_allocated(call), None)
    return Memory(_allocated(call), int(statistics.median(_resident(call) for _ in range(resident_runs))))


def _allocated(call: Callable[[], Any]) -> int:
    """Return the peak of all storages, with torch.compile's buffers and pages that were never written."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del result
    changes = [e for e in events if e.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda e: e["args"]["Ev Idx"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak - now


def _resident(call: Callable[[], Any]) -> int:
    """Return the peak of all pages written, by any allocator. Linux records the peak and lets a process reset it."""
    _trim_heap()
    _reset_peak()
    result = call()
    peak = _status("VmHWM")
    _trim_heap()
    now = _status("VmRSS")
    del result
    return max(peak - now, 0)


def _reset_peak() -> bool:
    """Reset the recorded peak; return False if the system does not support it (it needs Linux and a writable /proc)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return "VmHWM" in _STATUS.read_text()


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _trim_heap() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
