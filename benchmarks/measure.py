"""How it is measured: seconds and bytes of one call. Left out: repetition (harness.py) and ratios (report.py).

Time on a GPU is the device's own, between two events. The device first gets copies to do, so that the host has queued
the whole call before it begins (in training the model's kernels do that), and those copies are the measured bandwidth.
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
COPIES = 8  # 16 GiB moved, 4 ms on an H200: longer than any contender needs to queue its kernels
RESIDENT_RUNS = 3  # what the C library keeps of freed blocks differs by a few MiB from run to run: the median counts

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Time(NamedTuple):
    seconds: float  # on the device
    wall_seconds: float  # from call to synchronised
    copy_bytes_per_second: float | None  # read + written, just before on the same device


class Clock:
    """Times one call on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
            self.target = torch.empty_like(self.source)

    def __call__(self, call: Callable[[], Any]) -> Time:
        begin = time.perf_counter()
        result = call()  # alive until the clock has stopped: giving the gradient back is not part of the call
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
    """Peak bytes of a call above what was there before and what it returned."""

    allocated: int  # as torch's allocator counts
    resident: int | None  # as the system counts the process's pages (the cross-check; None where that cannot be read)

    @property
    def extra(self) -> int:
        return max(x for x in self if x is not None)


def memory(call: Callable[[], Any], device: str, resident_runs: int = RESIDENT_RUNS) -> Memory:
    """Warm up before: what is compiled or cached on first use is not part of the call."""
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
    """Every tensor's storage, torch.compile's buffers too; pages that were never written count as well."""
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
    """Every page that was written, whoever asked for it. Linux keeps the peak and lets a process reset it."""
    _give_freed_pages_back()
    _reset_peak()
    result = call()
    peak = _status("VmHWM")
    _give_freed_pages_back()
    now = _status("VmRSS")
    del result
    return max(peak - now, 0)


def _reset_peak() -> bool:
    """Whether this system can: Linux, with a /proc that may be written."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return "VmHWM" in _STATUS.read_text()


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _give_freed_pages_back() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
