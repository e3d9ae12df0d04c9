"""Read the options of a stage from flags and from a YAML file that flags override."""

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from exo.cli import console, help
from exo.cli.errors import ConfigError
from exo.cli.fields import SHOWN, require, shortened
from exo.cli.spelling import suggestion

T = TypeVar("T")


def as_flags(config: Any) -> list[str]:
    """Return flags for the options that differ from their defaults, and for output_dir."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    given = {name: value for name, (value, default) in values.items() if value != default or name == "output_dir"}
    given.pop("overwrite_output_dir", None)  # only the user decides that, each time
    return [f"--{name.rstrip('_')}={'none' if value is None else value}" for name, value in given.items()]


def command_line(config: Any) -> list[str]:
    """Return the flags that give this config."""
    return [*as_flags(config), *["--overwrite_output_dir"] * getattr(config, "overwrite_output_dir", False)]


def parse(cls: type[T], argv: Sequence[str] | None, *, prog: str, description: str | None) -> T:
    """Build `cls` from flags; `--config FILE.yaml` supplies what the flags leave out. Exits with 2 on errors."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    every = {"--help-all", "--help_all"}
    show_all = bool(every & {*arguments}) or len(fields(typing.cast(Any, cls))) <= help.ALL
    arguments = ["--help" if argument in every else argument for argument in arguments]
    parser = _parser(
        cls,
        show_all=show_all,
        prog=prog,
        description=description,
        formatter_class=help.Formatter,
        usage="%(prog)s [--option VALUE ...]",
        epilog=None if show_all else "These are the options to know first; --help-all shows all of them, in groups.",
        add_help=False,
    )
    parser.add("--config", metavar="FILE.yaml", help="options by name; flags override them")
    parser.add("-h", "--help", action="help", help="show the options to know first")
    parser.add("--help-all", action="help", help="show all options, in groups")
    try:
        file, flags = _split_config(arguments)
        values = vars(parser.parse_args([*_checked(file, cls), *flags]))
        values.pop("config")
        config = cls(**values)
    except ConfigError as error:
        parser.error(str(error))
    if "save_steps" in values and "save_steps" in given(arguments) and "RANK" not in os.environ:
        console.log("note: --save_steps saves resumable checkpoints since 0.2; --export_steps writes loadable models")
    return config


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build `cls` from values of a YAML file, converted as flags are: to YAML, 1e-3 is a text."""
    config_type: Any = cls
    try:
        return cls(**vars(_recipe_parser(config_type).parse_args(_flags(values))))
    except argparse.ArgumentError as error:
        raise ConfigError(shortened(str(error).removeprefix("argument "), 4 * SHOWN)) from None


def given(arguments: Sequence[str]) -> set[str]:
    """Return the names of the options on a command line and in its --config file."""
    try:
        in_file = _read(_split_config(arguments)[0])
    except ConfigError:  # `parse` reports it
        in_file = {}
    flags = [argument.split("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    return {name.replace("-", "_") for name in [*flags, *in_file]}


def _split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    head = _Parser(add_help=False, allow_abbrev=False, exit_on_error=False)
    head.add_argument("--config", action="append")
    try:
        options, rest = head.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from None
    files = options.config or [None]
    require(len(files) == 1, "config", "one file", ", ".join(map(str, files)))
    return files[0], rest


def _read(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    from exo.cli import yaml_files  # a third of the time that --help takes

    try:
        options = yaml_files.read(Path(file), typed=False)
    except ValueError as error:
        raise ConfigError(f"--config {file}: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"--config {file}: expected a mapping of option names to values")
    return options


def _checked(file: str | None, cls: type) -> list[str]:
    """Return the options of the file as flags, so that both go through the same parser."""
    options = _read(file)
    known = {field.name.rstrip("_") for field in dataclasses.fields(cls)}
    names = [key.replace("-", "_") for key in options]
    for key, value in options.items():
        name = key.replace("-", "_")
        if names.count(name) > 1:
            raise ConfigError(f"--config {file}: {key}: given twice, with dashes and with underscores")
        if name not in known:
            raise ConfigError(f"--config {file}: unknown option {key!r}{suggestion(name, known)}")
        if isinstance(value, dict | list):
            raise ConfigError(f"--config {file}: {key}: expected one value, got a {type(value).__name__}")
    return _flags(options)


def _flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={'none' if value is None else value}" for name, value in values.items()]


def _parser(cls: type, *, show_all: bool = False, **settings: Any) -> "_Parser":
    parser = _Parser(allow_abbrev=False, **settings)
    parser.show_all = show_all
    hints = typing.get_type_hints(cls)
    order = [*help.GROUP_OF] if show_all else help.FIRST
    names = {name: place for place, name in enumerate(order)}
    for field in sorted(dataclasses.fields(cls), key=lambda field: names.get(field.name, -1)):
        _add(parser, field, hints[field.name])
    return parser


@cache  # a plan has hundreds of steps of a dozen kinds
def _recipe_parser(cls: type) -> "_Parser":
    return _parser(cls, prog="recipe", add_help=False, exit_on_error=False)


class _Parser(argparse.ArgumentParser):
    """argparse that takes dashes for underscores, suggests the nearest flag and shows options in groups."""

    show_all = True

    def add(self, *flags: str, **settings: Any) -> None:
        """Add an option to its group of `--help-all`, or to the one list of `--help`."""
        name = flags[-1].lstrip("-")
        if not self.show_all and name not in help.FIRST and name in help.GROUP_OF:
            settings["help"] = argparse.SUPPRESS
        title = help.GROUP_OF.get(name, help.OTHER) if self.show_all else "Options"
        groups = {group.title: group for group in self._action_groups}
        (groups.get(title) or self.add_argument_group(title)).add_argument(*flags, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = [_underscored(a) for a in args]
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = {name.removeprefix("--") for name in self._option_string_actions}
            name = unknown[0].removeprefix("--").split("=")[0]
            self.error(f"unknown option {unknown[0].split('=')[0]}{suggestion(name, known)}")
        return values

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {shortened(message, 4 * SHOWN)}\n")


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _add(parser: "_Parser", field: Any, hint: Any) -> None:
    required = field.default is dataclasses.MISSING
    text = field.metadata.get("help", "")
    if not required and field.default not in (None, ""):
        text += f" (default: {field.default})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "required": required}
    if not required:
        settings["default"] = field.default
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    base = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
    if typing.get_origin(base) is Literal:
        settings["choices"] = typing.get_args(base)
    elif base is bool:
        settings |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        settings |= {"type": _or_none(base) if optional else base, "metavar": base.__name__.upper()}
    # a field cannot be called `from`: it is written from_
    parser.add(f"--{field.name.rstrip('_')}", dest=field.name, **settings)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _or_none(base: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else base(text)

    convert.__name__ = base.__name__  # argparse names the type in its message
    return convert
