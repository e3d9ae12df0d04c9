"""Checks of shapes, dtypes, devices and options, made once by the public functions (values: value_checks.py).

Every message names the argument, the expected value and the received one.
"""

import math
import os
import reprlib
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SUMS = (torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
# Kernels compute with options in fp32: outside these bounds they would become 0 or inf.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
INT64 = 2**63


def fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}; got {got}")


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        dtype, kind = str(value.dtype).removeprefix("torch."), _kind(value)
        shape = "" if kind == "nested" else f" of shape {tuple(value.shape)}"  # nested tensors have no shape
        return f"a {kind}{' ' if kind else ''}{dtype} tensor{shape} on {value.device}"
    try:
        text = " ".join(reprlib.repr(value).split())  # one line
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        text = "too many digits to print"
    return f"{text} ({type(value).__name__})"


def _kind(value: Tensor) -> str:
    """Return the kind of a tensor whose memory kernels cannot index; "" for an ordinary one."""
    if value.is_nested:
        return "nested"
    if value.layout == torch.strided:
        return ""
    return "mkldnn" if value.is_mkldnn else "sparse"


def tensor(
    name: str,
    value: Any,
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check for a tensor of one of the dtypes and, if given, of one of the shapes and on the device."""
    ok = isinstance(value, Tensor) and value.dtype in dtypes and not _kind(value)
    ok = ok and (shapes is None or tuple(value.shape) in shapes)
    if not ok or (device is not None and value.device != device):
        names = "/".join(str(d).removeprefix("torch.") for d in dtypes)
        where = f" on {device}" if device else ""
        shape = " of shape " + " or ".join(map(str, shapes)) if shapes is not None else ""
        dense = "dense " if isinstance(value, Tensor) and _kind(value) else ""
        fail(name, f"a {dense}{names} tensor{shape}{where}", describe(value))


def positive(name: str, value: Any) -> None:
    """Check for a number > 0 in the normal range of fp32."""
    if not _is_number(value) or not 0 < value < math.inf:
        fail(name, "a finite number > 0", describe(value))
    if not SMALLEST <= value <= LARGEST:
        fail(name, f"a number from {SMALLEST:.2g} to {LARGEST:.2g}, the range of fp32", describe(value))


def choice(name: str, value: Any, allowed: tuple[object, ...]) -> None:
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        fail(name, "one of " + ", ".join(map(repr, allowed)), describe(value))


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(name, "True or False", describe(value))


def integer(name: str, value: Any, minimum: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (minimum is not None and value < minimum):
        fail(name, "an integer" + (f" >= {minimum}" if minimum is not None else ""), describe(value))
    if not -INT64 <= value < INT64:
        fail(name, "an integer that int64 holds", describe(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows(
    name: str,
    scores: Any,  # (N, T, V) or (n, V): logits or hidden states
    labels: Any,
    cu_seqlens: Any,
    shift: Any,
    ignore_index: Any,
    *,
    sequences: bool,
    width: str = "V",
) -> bool:
    """Check the layout of rows and labels; return True if labels must be shifted. `sequences`: lengths are needed."""
    tensor(name, scores, FLOATS)
    if scores.dim() not in (2, 3) or scores.shape[-1] < 1:
        fail(name, f"shape (N, T, {width}), or (n, {width}) with cu_seqlens, {width} >= 1", describe(scores))
    tensor("labels", labels, INTS, (tuple(scores.shape[:-1]),), scores.device)
    integer("ignore_index", ignore_index)
    packed = scores.dim() == 2
    if cu_seqlens is None:
        if packed and sequences:
            fail("cu_seqlens", f"sequence boundaries (N+1,) for packed {name} (n, {width})", "None")
    else:
        if not packed:
            fail("cu_seqlens", f"None for padded {name} (N, T, {width})", describe(cu_seqlens))
        tensor("cu_seqlens", cu_seqlens, INTS, device=scores.device)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            fail("cu_seqlens", "shape (N+1,)", describe(cu_seqlens))
    if shift is not None:
        flag("shift", shift)
    if shift and packed:
        fail("shift", "False or None for packed input, whose labels are aligned with their rows", shift)
    return not packed if shift is None else shift


def plain(name: str, value: Any) -> None:
    """Refuse a DTensor."""
    if hasattr(value, "full_tensor"):
        fail(name, "a plain tensor: take its local or its full one", f"a {type(value).__name__}")


def gathered(name: str, part: Any, process_group: Any = None) -> Any:
    """Return a head's weight or bias as one plain tensor; gather a DTensor, refuse an empty or flattened parameter.

    A DTensor over several ranks that requires a gradient is refused, because ranks with different hidden states (data
    parallel) must add up their gradients and ranks with equal ones (tensor parallel) must not.
    """
    if hasattr(part, "full_tensor"):
        got = f"a {type(part).__name__} over {part.device_mesh.size()} ranks"
        if process_group is not None:
            fail(name, "with process_group, a plain tensor of this rank's rows: take to_local()", got)
        if part.requires_grad and torch.is_grad_enabled() and part.device_mesh.size() > 1:
            way = "full_tensor(grad_placements=[Partial()]) where ranks have other rows, full_tensor() where the same"
            fail(name, f"the whole head; inside its module's forward FSDP hands it out, elsewhere take {way}", got)
        return part.full_tensor()
    if isinstance(part, Tensor) and (part.numel() == 0 or name.endswith("weight") and part.dim() == 1):
        cause = "rows on other ranks: ZeRO-3 and FSDP empty or flatten a parameter outside the forward of its module"
        todo = "call the loss inside that forward, or under deepspeed.zero.GatheredParameters or summon_full_params"
        fail(name, f"the whole head, V, D >= 1; {todo}", f"{describe(part)}: {cause}")
    return part


def head(name: str, weight: Any, bias_name: str, bias: Any, hidden: Tensor) -> None:
    """Check a weight (V, D) for hidden states (..., D), and a bias (V,) or None."""
    plain(name, weight)
    tensor(name, weight, FLOATS, device=hidden.device)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) < 1:
        fail(name, f"shape (V, D = {hidden.shape[-1]}), V >= 1", describe(weight))
    if bias is not None:
        plain(bias_name, bias)
        tensor(bias_name, bias, FLOATS, ((len(weight),),), hidden.device)


def absent(expected: str, **values: Any) -> None:
    """Check that arguments are None."""
    for name, value in values.items():
        if value is not None:
            fail(name, expected, describe(value))


def reference_model(ref_logps: Any, ref_hidden: Any, ref_weight: Any, ref_bias: Any, hidden: Any) -> None:
    """Check for either a reference's log-probs or its hidden states."""
    if (ref_logps is None) == (ref_hidden is None):
        got = "neither" if ref_logps is None else "both"
        fail("ref_logps", "either ref_logps or ref_hidden", got)
    if ref_hidden is None:
        absent("None without ref_hidden", ref_weight=ref_weight, ref_bias=ref_bias)
        return
    plain("ref_hidden", ref_hidden)
    tensor("ref_hidden", ref_hidden, FLOATS)
    if not isinstance(hidden, Tensor):  # refused later, under its own name
        return
    dims = slice(None) if ref_weight is None else slice(-1)  # another head may take another width
    if ref_hidden.shape[dims] != hidden.shape[dims]:
        fail("ref_hidden", f"shape {tuple(hidden.shape)}, like hidden", describe(ref_hidden))
    if ref_hidden.device != hidden.device:
        fail("ref_hidden", f"a tensor on {hidden.device}, like hidden", describe(ref_hidden))


def group_size(value: Any, n_sequences: int, device: torch.device) -> None:
    """Check an int K or ragged sizes (G,)."""
    if isinstance(value, Tensor):
        tensor("group_size", value, INTS, device=device)
        if value.dim() != 1 or value.numel() > n_sequences:
            fail("group_size", f"sizes (G,) >= 1 that sum to N = {n_sequences}", describe(value))
        return
    integer("group_size", value, 1)
    if n_sequences % value:
        fail("group_size", f"a divisor of the number of sequences N = {n_sequences}", describe(value))


def preferences(objective: str, group_size: Any, label_smoothing: Any, compat: Any, needs_smoothing: bool) -> None:
    """Check the options of a loss without rewards."""
    if compat == "official" and not (isinstance(group_size, int) and group_size == 2):
        fail("group_size", "2 with compat='official' on preferences", describe(group_size))
    if needs_smoothing and label_smoothing == 0 and compat is None:
        expected = f"> 0 for {objective.upper()} on preferences, whose target must not hold a zero"
        fail("label_smoothing", expected, label_smoothing)


def fraction(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        fail(name, "a number in [0, 1)", describe(value))


def reduction(value: Any, num_groups: Any, device: torch.device) -> None:
    choice("reduction", value, ("mean", "sum", "none"))
    if num_groups is None:
        return
    if value != "mean":
        fail("num_groups", f"None with reduction={value!r}: it is the denominator of 'mean'", describe(num_groups))
    if isinstance(num_groups, Tensor):
        if _kind(num_groups) or num_groups.dim() != 0 or num_groups.dtype not in FLOATS + INTS:
            fail("num_groups", "a number > 0 or a 0-dimensional tensor", describe(num_groups))
        if num_groups.device != device and num_groups.device.type != "cpu":
            fail("num_groups", f"a number or a tensor on {device}", describe(num_groups))
        if check_values(num_groups.device) and not torch.compiler.is_compiling():
            positive("num_groups", num_groups.item())
    else:
        positive("num_groups", num_groups)


def writable(name: str, value: Tensor, impl: str) -> None:
    """Check that the backward pass may write over logits."""
    if impl == "reference":
        fail("inplace_backward", "False with impl='reference', which leaves the gradients to autograd", "True")
    if not value.numel():
        return
    reach = 1  # elements spanned by the dimensions so far
    for stride, size in sorted((d, n) for d, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride < reach:
            fail("inplace_backward", f"False for {name} whose elements share memory (expanded, overlapping)", "True")
        reach += stride * (size - 1)


def check_values(device: torch.device) -> bool:
    """Return True if values may be read: free on a CPU, a synchronisation elsewhere."""
    return device.type == "cpu" or os.environ.get("EXO_KERNELS_CHECK") == "1"
