"""Errors that end a run with one line."""


def describe(error: OSError) -> str:
    """Return the cause and the file of an error of the operating system."""
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


class RunError(RuntimeError):
    """Raised when a run cannot start or continue; the message is one line."""


class ConfigError(ValueError):
    """Raised for an option that cannot be used; the message is one line."""
