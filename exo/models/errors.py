"""Turn errors of transformers into one-line ValueErrors, and silence its warnings and progress bars."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

LENGTH = 300  # characters of a message that are shown


@contextmanager
def one_line_errors(name: str, expected: str) -> Iterator[None]:
    """Convert any error inside the context to a one-line ValueError."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it logs every try to reach the hub
    try:
        yield
    except BaseException as error:
        # transformers raises many types; a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        if not Path(name).exists():
            expected = "a directory, and there is none; or a hub name"
        raise ValueError(f"model {name!r}: expected {expected}; got: {lines[0][:LENGTH]}") from error
    finally:
        hub_logging.set_verbosity(level)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence transformers' table of missing weights, because callers raise errors for them."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Disable progress bars if stderr is not a terminal."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    if was_enabled and not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
