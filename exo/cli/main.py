"""The command line of a stage: parse its options, run it, print one line for an error, return an exit code."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from exo.cli import launch, signals
from exo.cli.errors import RunError
from exo.cli.parse import command_line, parse

C = TypeVar("C")

LOST = ("gloo", "NCCL", "Connection reset", "Connection closed")  # in errors of one process that waits for another


def command(config: type[C], run: Callable[[C], object]) -> Callable[..., int]:
    """Return the `main(argv=None)` of the stage whose module defines `config`; the module's docstring is the help."""
    module = sys.modules[config.__module__]
    name = module.__spec__.name if module.__spec__ else module.__name__  # __main__ has the name of its file there

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(run, parse(config, argv, prog=f"python -m {name}", description=module.__doc__))

    return main


def print_error(text: str) -> None:
    with contextlib.suppress(OSError):
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)


def run_command(run: Callable[[Any], object], options: Any) -> int:
    """Run a stage for the command line: one line for what can go wrong, and an exit code."""
    if launch.is_launcher(getattr(options, "nproc", 1)):
        module = run.__module__ if run.__module__ != "__main__" else sys.modules["__main__"].__spec__.name  # type: ignore
        return launch.run(module, command_line(options), options.nproc)
    try:
        signals.exit_on_signals()
        launch.exit_with_launcher()
        run(options)
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except signals.Stopped as stopped:
        print_error(f"stopped: {stopped}")
        return 128 + stopped.signum
    except (ValueError, RunError) as error:
        print_error(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print_error(f"error: {error.strerror or error}{where}")
        return 1
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError):
            if torch.distributed.is_initialized() and any(word in str(error) for word in LOST):
                print_error(
                    f"error: another process of this run has ended, or is not reached: {str(error).splitlines()[0]}"
                )
                return 1
            raise
        advice = (
            "Activations: lower --max_tokens_per_batch (of sample --batch_size), or --gradient_checkpointing. "
            "Gradients and Adam, 12 bytes a parameter: --lora_r. A second model: no --reference live."
        )
        print_error(f"error: {str(error).splitlines()[0]} {advice}")
        return 1
    return 0
