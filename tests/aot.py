"""Compile the Triton kernels ahead of time for several GPUs, without a GPU, and read the cost from the machine code.

A case calls the real launcher on CPU tensors and records the launch, so the warps, block sizes and argument hints are
those of a real launch. NVIDIA code is read as SASS, AMD code as assembler text. Correctness is tested elsewhere (by the
interpreter and the `gpu` tests), and speed needs a GPU.

`python -m tests.aot` prints a table of every case and target.
"""

import importlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from exo_kernels.numerics import LogitTransform
from exo_kernels.objectives import Betas
from exo_kernels.schedules import matmul

# import_module, because the package exports functions with the names of its modules
COMMON = importlib.import_module("exo_kernels._triton.common")
TOKEN_LOGPS = importlib.import_module("exo_kernels._triton.token_logps")
GROUP_LOSS = importlib.import_module("exo_kernels._triton.group_loss")
LINEAR = importlib.import_module("exo_kernels._triton.linear")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


class TokenCase(NamedTuple):
    """A launch of the token pass, or of its backward pass, on logits (2, 3, vocabulary)."""

    backward: bool
    dtype: torch.dtype
    entropy: bool = False
    vocabulary: int = 50257
    layout: str = "plain"  # or "skewed": logits and gradient aligned differently; or "transposed": large column stride

    def __str__(self) -> str:
        words = ["backward" if self.backward else "token-pass", str(self.dtype).removeprefix("torch.")]
        words += [f"V{self.vocabulary}", self.layout] + ["entropy"] * self.entropy
        return "-".join(words)

    def launch(self, warp_size: int) -> Launch:
        shape = (2, 3, self.vocabulary)
        logits = {
            "plain": lambda: torch.empty(shape, dtype=self.dtype),
            "skewed": lambda: torch.empty((2, 3, self.vocabulary + 1), dtype=self.dtype)[..., 1:],
            "transposed": lambda: torch.empty(shape[::-1], dtype=self.dtype).permute(2, 1, 0),
        }[self.layout]()
        targets = torch.zeros(shape[:2], dtype=torch.int64)
        kernel = "token_logps_backward_kernel" if self.backward else "token_logps_kernel"
        with patch.object(COMMON, "warp_size", lambda device: warp_size):
            if not self.backward:
                return _record_launch(
                    TOKEN_LOGPS, kernel, TOKEN_LOGPS.token_logps, logits, targets, 1.0, -100, self.entropy
                )
            accumulator = torch.float64 if self.dtype == torch.float64 else torch.float32
            rows = torch.empty(shape[:2], dtype=accumulator)
            saved = torch.empty((2, *shape[:2]), dtype=accumulator)
            grad = TOKEN_LOGPS.new_gradient(logits.contiguous())
            entropies = (rows, rows) if self.entropy else (None, rows.new_empty(0))
            arguments = (grad, rows, entropies[0], logits, targets, entropies[1], saved, 1.0, -100)
            return _record_launch(TOKEN_LOGPS, kernel, TOKEN_LOGPS.token_logps_backward, *arguments)


class GroupCase(NamedTuple):
    """A launch of the group pass on two groups of two sequences."""

    objective: str
    rewards: bool
    per_token_ref: bool
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        flags = ["rewards"] * self.rewards + ["token-ref"] * self.per_token_ref
        return "-".join(["group-pass", str(self.dtype).removeprefix("torch."), self.objective, *flags])

    def launch(self, warp_size: int) -> Launch:
        logps = torch.empty(32, dtype=self.dtype)
        ref = torch.empty(32 if self.per_token_ref else 4, dtype=torch.float64)
        offsets = torch.arange(0, 40, 8), torch.tensor([0, 2, 4])
        tensors = (logps, torch.zeros(32, dtype=torch.int64), ref, torch.empty(4) if self.rewards else None, *offsets)
        options = (self.per_token_ref, self.objective, Betas(0.1, 1.0, -0.001, -6.9), -100)
        return _record_launch(GROUP_LOSS, "group_loss_kernel", GROUP_LOSS.group_loss, *tensors, *options)


class ChunkCase(NamedTuple):
    """A launch on a chunk of three rows of accumulators.

    The gradient is written in place, or to a second tensor of dtype `out`.
    """

    gradient: bool
    bias: bool = False
    capped: bool = False
    entropy: bool = False
    out: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    vocabulary: int = 50257

    def __str__(self) -> str:
        words = ["chunk-gradient" if self.gradient else "chunk-logps", str(self.dtype).removeprefix("torch.")]
        words += ["bias"] * self.bias + ["capped"] * self.capped + ["entropy"] * self.entropy
        return "-".join(words + ["to-" + str(self.out).removeprefix("torch.")] * (self.out is not None))

    def launch(self, warp_size: int) -> Launch:
        def rows(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((3, matmul.padded(self.vocabulary)), dtype=dtype)[:, : self.vocabulary]

        a = rows(self.dtype)
        bias = rows(self.dtype)[0] if self.bias else None
        targets = torch.zeros(3, dtype=torch.int64)
        transform = LogitTransform(30.0, 0.05, 1.5) if self.capped else LogitTransform(1.5, 0.0, 1.5)
        with patch.object(COMMON, "warp_size", lambda device: warp_size):
            if not self.gradient:
                arguments = (a, bias, targets, transform, self.entropy)
                return _record_launch(LINEAR, "chunk_logps_kernel", LINEAR.chunk_logps, *arguments)
            out = a if self.out is None else rows(self.out)
            row = a.new_empty(3)
            arguments = (out, a, bias, targets, transform, a.new_empty(3, 3), *[row if self.entropy else None] * 3)
            return _record_launch(LINEAR, "chunk_gradient_kernel", LINEAR.chunk_gradient, *arguments)


Case = TokenCase | GroupCase | ChunkCase


FP32_MATH = [torch.bfloat16, torch.float16, torch.float32]

# 32000: every row starts on a 16-byte boundary. 50257 (GPT-2): most rows do not
WALKED = [
    TokenCase(backward, dtype, entropy, vocabulary)
    for backward, dtype, entropy, vocabulary in itertools.product(
        (False, True), FP32_MATH, (False, True), (50257, 32000)
    )
    if not entropy or (dtype == torch.bfloat16 and vocabulary == 50257)
]
# the other kinds of launches: logits and gradient aligned differently, large column stride, fp64
OTHERS = [
    TokenCase(True, torch.bfloat16, layout="skewed"),
    TokenCase(False, torch.bfloat16, layout="transposed"),
    TokenCase(True, torch.bfloat16, layout="transposed"),
    TokenCase(False, torch.float64, entropy=True),
    TokenCase(True, torch.float64, entropy=True),
]
GROUPS = [GroupCase("exo", False, False), GroupCase("exo", True, True), GroupCase("dpo", True, False)]
PLAIN, BIAS, CAPPED, BOTH, ENTROPY = (), (True,), (False, True), (True, True), (False, False, True)
CHUNKS = [ChunkCase(False, *flags) for flags in (PLAIN, BIAS, CAPPED, BOTH, ENTROPY)]
CHUNKS += [ChunkCase(True, *flags, out=torch.bfloat16) for flags in (PLAIN, BOTH, ENTROPY)]
CHUNKS += [ChunkCase(True, *flags) for flags in (PLAIN, CAPPED)]
CHUNKS += [ChunkCase(gradient, dtype=torch.float64) for gradient in (False, True)]
CASES = WALKED + OTHERS + GROUPS + CHUNKS


class Loop(NamedTuple):
    instructions: list[str]  # with operands
    loads: list[int]  # bytes per thread of every access to global memory
    stores: list[int]
    exponentials: int


class Code(NamedTuple):
    registers: int
    spilled: int  # bytes of stack and local memory, or spilled registers; 0 is good
    occupancy: float  # share of the chip's warps that can be resident, limited by registers
    elements: int | None  # per thread and iteration, if the kernel loops over rows
    loop: Loop | None  # the innermost loop with the most bytes loaded


def _record_launch(module: Any, kernel: str, launcher: Callable[..., Any], *args: Any) -> Launch:
    """Run the launcher with a kernel that only records its launch; return the launch."""
    real, launches = getattr(module, kernel), []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: launches.append(Launch(real, args, options))

    with patch.object(module, kernel, Recorder()):
        launcher(*args)
    return launches[0]


@cache
def compiled(case: Case, target_name: str) -> Code:
    target = TARGETS[target_name]
    kernel, args, options = case.launch(target.warp_size)
    # The steps of a launch. Triton has no public function that specialises a kernel for its arguments.
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **options)
    full, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=full.__dict__)
    threads = full.num_warps * target.warp_size
    elements = options["BLOCK"] // threads if "BLOCK" in options else None
    read = _read_amdgcn(binary.asm["amdgcn"]) if target.backend == "hip" else _read_cubin(binary.asm["cubin"], threads)
    return Code(*read[:3], elements, read[3])


def _read_cubin(cubin: bytes, threads: int) -> tuple[int, int, float, Loop | None]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("--dump-resource-usage", file.name)
        usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", _cuobjdump("-sass", file.name))
    code = [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text)) for address, text in lines]
    bodies = []  # first and last address of each loop
    for address, text in code:
        jump = re.match(r"BRA\b.*?(0x[0-9a-f]+)$", text)
        if jump and (start := int(jump[1], 16)) < address:
            bodies.append((start, address))
    inner = [a for a in bodies if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in bodies)]
    loops = [[text for address, text in code if a <= address <= b] for a, b in inner]
    # registers are allocated to a warp in units of 256; a multiprocessor of sm_80, sm_90 and sm_100 has 65536 registers
    # and room for 64 warps
    warps = threads // 32
    blocks = 65536 // (-(-usage["REG"] * 32 // 256) * 256) // warps
    return usage["REG"], usage["STACK"] + usage["LOCAL"], min(blocks, 64 // warps) * warps / 64, _main_loop(loops)


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", *arguments], check=True, capture_output=True, text=True).stdout


def _read_amdgcn(text: str) -> tuple[int, int, float, Loop | None]:
    numbers = {key: int(value) for key, value in re.findall(r"[.;\s](\w+):\s+(\d+)$", text, re.MULTILINE)}
    spilled = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"] + numbers["private_segment_fixed_size"]
    loops: dict[str, list[str]] = {}
    # comments of the compiler name the loops of each basic block, innermost loop first
    for block in re.split(r"^(?=\.LBB\d+_\d+:|; %bb\.\d+:)", text, flags=re.MULTILINE):
        if "Inner Loop Header" in block:
            header = block.split(":")[0].removeprefix(".L")
        elif inside := re.search(r"in Loop: Header=(\w+)", block):
            header = inside[1]
        else:
            continue
        loops.setdefault(header, []).extend(re.findall(r"^\t([a-z]\w+\b.*)", block, re.MULTILINE))
    return numbers["vgpr_count"], spilled, numbers["Occupancy"] / 8, _main_loop(list(loops.values()))


ACCESS = re.compile(r"(?:(LDG)|(STG))\.(\S+)|(?:global|buffer|flat)_(?:(load)|(store))_(\w+)")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
WIDTHS |= {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "ushort": 2, "short": 2, "sbyte": 1, "ubyte": 1, "byte": 1}


def _main_loop(bodies: list[list[str]]) -> Loop | None:
    loops = [_parse_loop(instructions) for instructions in bodies]
    return max((loop for loop in loops if loop.loads), key=lambda loop: sum(loop.loads), default=None)


def _parse_loop(instructions: list[str]) -> Loop:
    loads, stores, exponentials = [], [], 0
    for instruction in instructions:
        exponentials += instruction.startswith(("MUFU.EX2", "v_exp_f32"))
        if access := ACCESS.match(instruction):
            words = re.split(r"[._]", access[3] or access[6])
            width = next((WIDTHS[word] for word in words if word in WIDTHS), 4)
            (loads if access[1] or access[4] else stores).append(width)
    return Loop(instructions, loads, stores, exponentials)


def table() -> str:
    """Return the cost of every kernel as text.

    The last four columns describe the main loop of kernels that loop over rows in fp32 arithmetic.
    """
    rows = [("kernel", "target", "regs", "spill", "warps", "load", "store", "exp", "instr")]
    for case, target in itertools.product(CASES, TARGETS):
        code = compiled(case, target)
        cells = [str(case), target, code.registers, code.spilled, f"{code.occupancy:.0%}"]
        if code.loop and code.elements and case.dtype != torch.float64:
            loop, n = code.loop, code.elements
            widths = [f"{8 * min(sizes)} bit" if sizes else "-" for sizes in (loop.loads, loop.stores)]
            cells += [*widths, f"{loop.exponentials / n:.2f}", f"{len(loop.instructions) / n:.1f}"]
        rows.append(tuple(cells))
    lines = [f"{row[0]!s:<46} {row[1]!s:<7}" + "".join(f"{cell!s:>9}" for cell in row[2:]) for row in rows]
    return "\n".join([f"triton {triton.__version__}; warps: occupancy; exp, instr: per element", *lines])


if __name__ == "__main__":
    print(table())
