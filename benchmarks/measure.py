"""Measure one call: seconds, peak bytes, operators.

On a GPU, time is measured between two events on the device. Copies are queued first, so that the host has queued the
complete call before it begins; in training, the kernels of the model have this effect.
"""

import ctypes
import json
import mmap
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

COPY_BYTES, COPIES = 2**30, 8  # 16 GiB moved, 4 ms on an H200: longer than any contender takes to queue its kernels
DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # of c10
ELEMENT_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1}
VIEWS = ("alias", "as_strided", "detach", "expand", "lift_fresh", "select", "slice", "split", "squeeze", "t",
         "transpose", "unbind", "unsqueeze", "view", "empty", "empty_like", "empty_strided", "resolve_conj",
         "resize_", "_local_scalar_dense", "set_")  # fmt: skip
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt in malloc.h
_STATUS, _CLEAR_REFS, _STAT = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/stat")


class Sample(NamedTuple):
    seconds: float  # wall clock; on a GPU between two events on the device
    cpu_seconds: float | None  # of all threads; None on a GPU


class Clock:
    """Measure the time of calls on a device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
            self.target = torch.empty_like(self.source)

    def __call__(self, call: Callable[[], Any]) -> Sample:
        """Return the time of a call. Freeing its result is not part of it."""
        if self.cuda:
            return self._device_time(call)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        result = call()
        sample = Sample(time.perf_counter() - begin, time.process_time() - cpu_begin)
        del result
        return sample

    def _device_time(self, call: Callable[[], Any]) -> Sample:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(COPIES):
            self.target.copy_(self.source)
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return Sample(start.elapsed_time(end) / 1e3, None)


def huge_empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Return a tensor to copy from or to. On a CPU it has huge pages, because small ones vary the rate of a copy."""
    if device != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def keep_memory() -> bool:
    """Let the C library keep freed memory for the next call; return False if it cannot.

    By default it gives blocks above 32 MiB back to the system at once. A new process then decides by chance how fast
    fresh memory is: the same call took 156 or 187 ms, eager PyTorch 70 or 100 ms. Kept memory varies by 2%.
    """
    libc = ctypes.CDLL(None)
    return hasattr(libc, "mallopt") and bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


class Busy:
    """Measure the share of the CPU that other processes use, between its creation and `share()`; 0 if unknown.

    Other processes are those beside this one and `pids`.
    """

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.begin = self._now()

    def share(self) -> float:
        elapsed, busy, own = (now - then for now, then in zip(self._now(), self.begin, strict=True))
        return max(busy - own, 0.0) / elapsed if elapsed else 0.0

    def _now(self) -> tuple[float, float, float]:
        if not _STAT.exists():
            return 0.0, 0.0, 0.0
        ticks = [int(x) for x in _STAT.read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        own = time.process_time()
        for pid in self.pids:
            own += sum(int(x) for x in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]) / 100
        return sum(ticks) / 100, (sum(ticks) - idle) / 100, own


class Counts(NamedTuple):
    """What one call does, the same in every run."""

    allocated: int  # peak bytes beyond what the call returns, by torch's allocator
    launches: int  # operators that compute something; on a GPU kernels
    moved_bytes: int | None  # bytes that those operators read and the call allocates; None on a GPU


def counts(call: Callable[[], Any], device: str) -> Counts:
    """Return the counts of a call, from a trace of torch's profiler. Warm up first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True) as profile:
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del result
    changes = [e["args"] for e in events if e.get("name") == "[memory]"]
    changes = [args for args in changes if args["Device Type"] == DEVICE_TYPES[device]]
    changes.sort(key=lambda args: args["Ev Idx"])
    now = peak = moved = 0
    for change in changes:
        now += change["Bytes"]
        moved += max(change["Bytes"], 0)
        peak = max(peak, now)
    if device == "cuda":
        return Counts(peak - now, sum(e.get("cat") == "kernel" for e in events), None)
    launches, read = _operators(events)
    return Counts(peak - now, launches, moved + read)


def _operators(events: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the number of operators that compute something, and the bytes they read.

    An operator may call others, such as linear a matmul, or mul_ a copy of its scalar: the larger of its own inputs and
    of what the others read counts.
    """
    operators = [e for e in events if e.get("cat") == "cpu_op" and e["name"].startswith("aten::")]
    operators.sort(key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    launches = total = 0
    open_calls: list[tuple[dict[str, Any], list[int]]] = []  # an operator, and the bytes read by those it called

    def close() -> None:
        nonlocal launches, total
        event, inside = open_calls.pop()
        name, own = event["name"].removeprefix("aten::"), _input_bytes(event["args"])
        computes = name not in VIEWS and (not inside or own > sum(inside))
        launches += computes
        read = max(own if computes else 0, sum(inside))
        if open_calls:
            open_calls[-1][1].append(read)
        else:
            total += read

    for event in operators:
        while open_calls and not _contains(open_calls[-1][0], event):
            close()
        open_calls.append((event, []))
    while open_calls:
        close()
    return launches, total


def _contains(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    return outer["tid"] == inner["tid"] and inner["ts"] < outer["ts"] + outer["dur"]


def _input_bytes(args: dict[str, Any]) -> int:
    total = 0
    for shape, dtype in zip(args.get("Input Dims", ()), args.get("Input type", ()), strict=False):
        if dtype in ELEMENT_BYTES and all(isinstance(n, int) for n in shape):
            total += ELEMENT_BYTES[dtype] * torch.Size(shape).numel()
    return total


def memory(call: Callable[[], Any], device: str, allocated: int) -> int:
    """Return the peak bytes of a call beyond the memory in use before it and its results.

    On a CPU it is the larger of the allocator's count and the system's: a page that is never written is memory to the
    first alone, a block that the C library keeps to the second alone.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del result
        return extra
    if not _reset_peak():  # not Linux, or /proc is not writable
        return allocated
    _trim_heap()
    _reset_peak()
    result = call()
    peak = _status("VmHWM")
    _trim_heap()
    after = _status("VmRSS")
    del result
    return max(peak - after, allocated)


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return "VmHWM" in _STATUS.read_text()


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _trim_heap() -> None:
    """Give freed blocks back to the system, because the C library caches a few MiB, different in each run."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
