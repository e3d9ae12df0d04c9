"""Suggest the nearest name for an unknown one."""

import difflib
from collections.abc import Iterable

RENAMED = {"checkpoint_steps": "save_steps"}  # options of 0.1
# Names of other trainers for our options.
ELSEWHERE = {
    "lr": "learning_rate", "beta": "beta_pi", "per_device_train_batch_size": "batch_size", "epochs": "num_train_epochs",
    "max_seq_length": "max_length", "gradient_accumulation_steps": "max_tokens_per_batch", "lora_rank": "lora_r",
    "loss_type": "loss", "bf16": "dtype", "fp16": "dtype",
}  # fmt: skip


def suggestion(name: str, known: Iterable[str], otherwise: str = "--help-all lists them") -> str:
    """Return the end of an error message: the nearest known name, or where to find them."""
    if renamed := RENAMED.get(name.replace("-", "_")):
        return f"; it is called {renamed} since 0.2"
    if (ours := ELSEWHERE.get(name.replace("-", "_"), "")) in known:
        return f"; here it is called {ours}"
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else f"; {otherwise}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is spelled most like this one, or "" if none is close."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=1)), "")
