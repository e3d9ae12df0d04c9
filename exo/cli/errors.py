"""Errors that end a run with one line."""


class RunError(RuntimeError):
    """Raised when a run cannot start or continue; the message is one line."""


class ConfigError(ValueError):
    """Raised for an option that cannot be used; the message is one line."""
