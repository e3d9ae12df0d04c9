"""The options that several stages share. A stage's Config is a frozen dataclass that inherits from these.

The type and default of a field make its flag; `option` adds the help and the range. Names are Hugging Face's where it
has one.
"""

import dataclasses
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from exo.cli.fields import NOT_NEGATIVE, PART, POSITIVE, SHARE, Range, at_least, check_size, option, require

Norm = Literal["none", "prompt", "global"]  # of rewards
SharePrompt = Literal["auto", "on", "off"]
ReferenceMode = Literal["auto", "cache", "live", "none"]


@dataclass(frozen=True)
class Stage:
    """Options of every stage."""

    output_dir: str = option("runs/stage", "directory of the run")
    overwrite_output_dir: bool = option(False, "replace an earlier run in output_dir")
    seed: int = option(0, "seed of every random choice", Range(lambda value: 0 <= value < 2**32, "in [0, 2^32)"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, range = field.name, getattr(self, field.name), field.metadata["range"]
            require(value is None or range is None or range.holds(value), name, range and range.expected, value)
            check_size(name, value)
        require(bool(self.output_dir.strip()), "output_dir", "a directory", self.output_dir)

    def values(self, names: str) -> dict[str, Any]:
        """Return the options of these names, which are separated by spaces."""
        return {name: getattr(self, name) for name in names.split()}


@dataclass(frozen=True)
class Compute(Stage):
    """Options of the stages that run a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "compute dtype over fp32 weights; auto is bfloat16 on a GPU that has it, else float32"
    )
    device: Literal["auto", "cpu"] = option("auto", "cpu: ignore available GPUs")
    nproc: int = option(1, "ranks on this machine, one per GPU; torchrun and accelerate launch work too", at_least(1))

    def accelerator(self) -> dict[str, Any]:
        """Return the arguments of exo.distributed.accelerator.make_accelerator."""
        return {"dtype": self.dtype, "device": self.device, "output_dir": self.output_dir}


def _list(text: str | None) -> list[str]:
    """Return the items of an option with commas, without the blanks around them."""
    return [part.strip() for part in text.split(",")] if text else []


def _pairs(text: str | None) -> list[tuple[str, str]]:
    """Return the (name, column) pairs of --columns; one without "=" has an empty column."""
    parts = [part.partition("=") for part in _list(text)]
    return [(name.strip(), column.strip()) for name, _, column in parts]


def _are_columns(text: str) -> bool:
    pairs = _pairs(text)
    complete = all(name and column and "=" not in column for name, column in pairs)
    return bool(pairs) and complete and len(dict(pairs)) == len(pairs)


def _are_weights(text: str) -> bool:
    try:
        return all(0 < float(part) < math.inf for part in _list(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class SourceOptions(Stage):
    """Options of the stages that read rows."""

    columns: str | None = option(
        None, "columns by other names: prompt=question,chosen=better", Range(_are_columns, "name=column, with commas")
    )
    ignore_columns: str | None = option(None, "columns to leave out, with commas; all: every one that no format reads")
    system_column: str | None = option(None, "the column of the system prompt, if it is not called system")
    skip_invalid: bool = option(
        False, "count malformed rows, and rows that the tokenizer or its template refuses, instead of stopping"
    )

    def reading(self) -> dict[str, Any]:
        """Return the options of exo.data.read that hold for every file of the stage."""
        return {
            "columns": dict(_pairs(self.columns)) or None,
            "ignore_columns": _list(self.ignore_columns),
            "system_column": self.system_column,
            "skip_invalid": self.skip_invalid,
        }


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """Options of the stages with --data, which may name several files."""

    data_weights: str | None = option(
        None, "shares of the files of --data in an epoch: 2,1", Range(_are_weights, "numbers > 0, with commas")
    )

    def mixing(self) -> dict[str, Any]:
        """Return the options of exo.data.read that mix the files of --data."""
        return {"weights": [float(part) for part in _list(self.data_weights)] or None, "seed": self.seed}

    def reading_of(self, option: str) -> dict[str, Any]:
        """Return the options of exo.data.read for the file that an option names; those of --data are mixed.

        Another file may have its own column names, so --columns need not apply to it.
        """
        return self.reading() | (self.mixing() if option == "data" else {"columns_required": False})


@dataclass(frozen=True)
class ChatOptions(Stage):
    """Options of the stages that read prompts."""

    chat_template: str = option(
        "auto",
        "auto renders chat messages and data sets of chats with the tokenizer's template; always renders plain prompts "
        "too, as a user's turn; none renders messages alone; a file, a name of the tokenizer's, chatml or plain sets "
        "the template and is used like always",
    )
    template_kwargs: str | None = option(
        None, "arguments of the chat template as a JSON object, such as '{\"enable_thinking\": false}'"
    )


@dataclass(frozen=True)
class Scoring(Compute):
    """Options of the stages that run a model on complete texts."""

    max_tokens_per_batch: int = option(8192, "tokens of input per forward pass; bounds the memory", at_least(1))


@dataclass(frozen=True)
class ScorerOptions(Stage):
    """Options of the stages that score completions: which scorer. One of the two is set."""

    reward_model: str | None = option(
        None, "sequence classifier that scores: its one output, or the log-odds of class 1 of its two"
    )
    oracle: str | None = option(
        None, "Python function that scores, as module:function, from (prompt, completion) to a number"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("reward_model", "oracle") if getattr(self, name)]
        require(len(given) == 1, "reward_model", "this or --oracle, and not both", " and ".join(given) or "neither")


@dataclass(frozen=True)
class Training(Scoring):
    """Options of the stages that train."""

    batch_size: int = option(64, "prompts per optimizer step, over all processes", at_least(1))
    learning_rate: float = option(1e-6, "peak learning rate of AdamW", POSITIVE)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option("cosine", "decay after the warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up; overrides warmup_ratio when > 0", NOT_NEGATIVE)
    warmup_ratio: float = option(0.0, "share of the steps spent on warm-up", SHARE)
    weight_decay: float = option(0.0, "decoupled weight decay", NOT_NEGATIVE)
    adam_beta1: float = option(0.9, "AdamW's first moment", PART)
    adam_beta2: float = option(0.95, "AdamW's second moment", PART)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", POSITIVE)
    max_grad_norm: float = option(1.0, "clip the norm of the gradient; 0: never", NOT_NEGATIVE)
    dropout: bool = option(False, "train with the model's own dropout")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = option(False, "compile the model's body with torch.compile")
    fsdp: bool = option(False, "shard the model over the ranks (FSDP2) instead of copying it (DDP)")
    profile: int = option(0, "profile N steps: a trace in output_dir/profile and a table of times", NOT_NEGATIVE)
    max_length: int = option(1024, "most tokens of prompt and completion together", at_least(2))
    logging_steps: int = option(10, "steps between printed lines; metrics.jsonl has every step", at_least(1))
    save_steps: int = option(
        100,
        "save a resumable checkpoint every N steps, in output_dir/checkpoints/step-N (0: only on SIGTERM or Ctrl-C)",
        NOT_NEGATIVE,
    )
    save_total_limit: int = option(2, "keep the newest N resumable checkpoints", at_least(1))
    resume_from_checkpoint: str | None = option(
        None,
        "resume from this checkpoint directory; true: from the newest one, and fail if there is none; none: from the "
        "newest one if there is any",
    )
    allow_changes: bool = option(False, "resume even if options, inputs or the world size changed")
    on_nan: Literal["stop", "skip"] = option(
        "stop", "on a NaN or Inf loss or gradient: stop before the update, or skip it"
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of the saved models; auto is that of --model's weights. Resumable checkpoints stay in fp32"
    )
    report_to: Literal["none", "tensorboard"] = option("none", "also send metrics there, through accelerate")

    def __post_init__(self) -> None:
        super().__post_init__()
        checkpoint, output = self.resume_from_checkpoint, Path(self.output_dir)
        if checkpoint is None:
            return
        newest = checkpoint.lower() == "true"
        require(newest or Path(checkpoint).is_dir(), "resume_from_checkpoint", "true or a directory", checkpoint)
        removed = self.overwrite_output_dir and (newest or Path(checkpoint).resolve().is_relative_to(output.resolve()))
        require(not removed, "resume_from_checkpoint", "no --overwrite_output_dir, which removes it", checkpoint)

    def optimizer(self) -> dict[str, Any]:
        """Return the fields of exo.training.optimizer.OptimizerSettings."""
        return self.values(
            "learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon "
            "max_grad_norm"
        )

    def loop(self) -> dict[str, Any]:
        """Return the fields of exo.training.loop.Settings but the optimizer's."""
        return self.values(
            "output_dir seed dropout gradient_checkpointing compile profile logging_steps save_steps save_total_limit "
            "resume_from_checkpoint allow_changes on_nan"
        )

    def parallel(self) -> dict[str, Any]:
        """Return the fields of exo.distributed.accelerator.Training."""
        return self.values("fsdp compile max_grad_norm")


@dataclass(frozen=True)
class DataTraining(Training, ChatOptions):
    """Options of the stages that train on rows for several epochs."""

    num_train_epochs: float = option(1.0, "epochs, unless max_steps is set", POSITIVE)
    max_steps: int = option(
        -1, "optimizer steps; -1: num_train_epochs decides", Range(lambda n: n == -1 or n >= 1, ">= 1, or -1")
    )
    max_completion_length: int | None = option(
        None, "most tokens of a completion, with its end of sequence", at_least(1)
    )
    max_prompt_length: int | None = option(
        None,
        "most tokens of a prompt, which loses its beginning; use the value that sample had. none: cut the completion "
        "first, and leave at least half of max_length to the prompt",
        at_least(1),
    )
    truncate: Literal["prompt-left", "drop", "error"] = option(
        "prompt-left",
        "rows over the limits: cut (the completion's end first, then the prompt's beginning), skip, or stop",
    )

    def epochs(self) -> dict[str, Any]:
        """Return the arguments of exo.training.sampler.total_steps but the number of examples."""
        return self.values("batch_size max_steps") | {"epochs": self.num_train_epochs}

    def limits(self) -> dict[str, Any]:
        """Return the fields of exo.data.text.limits.Limits."""
        return self.values("max_length max_completion_length truncate max_prompt_length")


@dataclass(frozen=True)
class AdapterOptions(DataTraining):
    """Options of the stages that can train a LoRA adapter."""

    lora_r: int = option(0, "rank of the LoRA matrices; 0: train all weights", NOT_NEGATIVE)
    lora_alpha: int = option(16, "scale of the LoRA update: lora_alpha / lora_r", at_least(1))
    lora_dropout: float = option(0.0, "dropout on the input of the LoRA matrices; needs --dropout", PART)
    lora_targets: str = option("all-linear", "layers to adapt, with commas; all-linear: all of them but the head")
    lora_output: Literal["merged", "adapter"] = option(
        "merged", "save a complete model, or the adapter, which needs --model"
    )
    load_in_4bit: bool = option(False, "hold the frozen weights in 4 bits (QLoRA); needs --lora_r and bitsandbytes")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(AdapterOptions):
            named = field.name.startswith("lora_") or field.name == "load_in_4bit"
            if named and field.name != "lora_r" and not self.lora_r:
                value = getattr(self, field.name)
                require(value == field.default, field.name, "--lora_r too: without it there is no adapter", value)
        drops = self.dropout or not self.lora_dropout
        require(drops, "lora_dropout", "0, or --dropout too: without it there is no dropout", self.lora_dropout)

    def parallel(self) -> dict[str, Any]:
        return super().parallel() | {"load_in_4bit": self.load_in_4bit}

    def lora(self) -> dict[str, Any]:
        """Return the fields of exo.models.lora.LoraSettings."""
        names = ("r", "alpha", "dropout", "targets", "output")
        return {name: getattr(self, f"lora_{name}") for name in names} | {"load_in_4bit": self.load_in_4bit}
