"""Errors that end a run with one line."""


class RunError(RuntimeError):
    """Why a run cannot begin or go on; one line."""


class ConfigError(ValueError):
    """An option that cannot be used; one line."""
