"""The command line of a stage: options, ranks, one line for an error, an exit code."""

import contextlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from exo.cli import signals, streams
from exo.cli.errors import RunError, describe
from exo.cli.parse import command_line, parse

C = TypeVar("C")

NEEDED = ("accelerate", "jinja2", "matplotlib", "rich", "safetensors", "tokenizers", "torch", "transformers", "yaml")
LOST_RANK = ("gloo", "NCCL", "Connection reset", "Connection closed")  # in errors of a rank that waits for another
SAVE_SECONDS = "3600"  # from SIGTERM to SIGKILL: torchrun's 30 seconds are too few to save a large model


def command(config: type[C], run: Callable[[C], object]) -> Callable[..., int]:
    """Return the `main(argv=None)` of the stage whose module defines `config`; the module's docstring is the help."""
    module = sys.modules[config.__module__]
    prepare_process(config.__module__)
    name = module.__spec__.name if module.__spec__ else module.__name__  # __main__ has the name of its file there

    def main(argv: Sequence[str] | None = None, prog: str = f"python -m {name}") -> int:
        options = parse(config, argv, prog=prog, description=module.__doc__)
        if needs_ranks(options):
            return run_ranks(name, command_line(options), options.nproc)  # type: ignore[attr-defined]
        return run_command(run, options)

    return main


def prepare_process(module: str) -> None:
    """Set up the streams and threads of `python -m exo.<stage>`, before torch is loaded.

    Raises:
        ModuleNotFoundError: if a package is missing; a command exits with one line instead.
    """
    is_program = module == "__main__"
    if is_program:
        streams.prepare()
        # OpenMP threads that wait by spinning take the core that others need: with another process on two cores, a
        # training step became eight times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        if ranks := os.environ.get("LOCAL_WORLD_SIZE"):  # as many threads together as one process has
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(ranks))))
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        message = f"exo needs {', '.join(missing)}: pip install 'exo-kernels[train]'"
        if is_program:
            raise SystemExit(message)
        raise ModuleNotFoundError(message, name=missing[0])


def needs_ranks(options: Any) -> bool:
    """Return whether this process must launch ranks, and is not one itself."""
    return getattr(options, "nproc", 1) > 1 and "RANK" not in os.environ


def run_ranks(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Run a stage on several ranks of this machine with torchrun's agent; return the exit code of the first to fail.

    A signal goes to every rank, which may save a checkpoint. torchrun's own report of a failure is left out: it would
    hide the one line that the rank has printed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVE_SECONDS)
    handlers = {number: signal.getsignal(number) for number in signals.handled()}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"exo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=",".join(signal.Signals(number).name for number in handlers),
    )
    logging.disable()
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print_error(f"error: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}")
        return 128 - failure.exitcode
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def run_command(run: Callable[[C], object], options: C) -> int:
    """Run a stage in this process; print one line for an error and return the exit code."""
    try:
        signals.exit_on_signals()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank stops if its launcher is killed
            signals.exit_with_parent(os.getppid())
        run(options)
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except signals.Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print_error(f"stopped: {stopped}")
        return 128 + stopped.signum
    except (ValueError, RunError) as error:
        print_error(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        print_error(f"error: {describe(error)}")
        return 1
    except RuntimeError as error:
        if not (advice := _advice(error)):
            raise
        print_error(f"error: {advice}")
        return 1
    return 0


def _advice(error: RuntimeError) -> str:
    """Return one line for an error of torch that a user can do something about, or ""."""
    torch = sys.modules.get("torch")
    line = (str(error).splitlines() or [""])[0]
    if torch and isinstance(error, torch.OutOfMemoryError):
        return (
            f"{line} Activations: lower --max_tokens_per_batch (sample: --batch_size) or pass "
            "--gradient_checkpointing. Gradients and Adam, 12 bytes a parameter: pass --lora_r. A second model: do "
            "without --reference live."
        )
    if torch and torch.distributed.is_initialized() and any(word in str(error) for word in LOST_RANK):
        return f"another process of this run has ended, or is not reached: {line}"
    return ""


def print_error(text: str) -> None:
    with contextlib.suppress(OSError):
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)
