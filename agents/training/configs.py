"""Options of a run in a file: TOML or YAML, keys as the options are called."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from agents.files import write_text
from agents.training.options import RunOptions
from agents.training.parsing import check_keywords

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMATS = (".toml", ".yaml", ".yml")
# Of each option, as it is written where it is declared.
TYPES = {field.name: str(field.type) for field in fields(RunOptions)}


def read_options(path: str | Path) -> dict[str, Any]:
    """Return the options in a file, by the names of the fields of `RunSpec`.

        RunSpec(**read_options("ppo.yaml"))

    Args:
        path: A .toml, .yaml or .yml file. Keys may be written with dashes, as on the command line.

    Raises:
        ValueError: If there is no such file, or it holds something else, or values of other types.
        TypeError: For options that there are not.
    """
    path = Path(path)
    if path.suffix not in FORMATS or not path.is_file():
        raise ValueError(f"A config is a file of {', '.join(FORMATS)}, and {path} is none.")
    text = path.read_text(encoding="utf-8")
    try:
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, and not options by name.")
    return _options(found, str(path))


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return the options of texts such as "learning_rate=1e-4"; values are written as in YAML.

    Raises:
        ValueError: For a text without a name or a value, or with one of another type.
        TypeError: For options that there are not.
    """
    found = dict[str, Any]()
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise ValueError(f"An option is set as NAME=VALUE, not as {setting!r}.")
        kind = TYPES.get(name.replace("-", "_"), "")
        try:  # A text is what it is, whatever YAML would make of it.
            found[name] = value if kind.startswith("str") else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{setting!r} cannot be read: {error}") from error
    return _options(found, "A setting")


def write_options(path: Path, options: Mapping[str, Any], comment: Iterable[str]) -> None:
    """Write options as YAML, with lines of comment above them."""
    lines = "".join(f"# {line}\n" for line in comment)
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    write_text(path, lines + yaml.safe_dump(plain, sort_keys=False))


def _options(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return options by their names as fields, lists as tuples, and numbers where they belong."""
    options = {str(name).replace("-", "_"): value for name, value in found.items()}
    check_keywords(options, TYPES, source)
    return {name: _of_type(name, value, TYPES[name], source) for name, value in options.items()}


def _of_type(name: str, value: Any, kind: str, source: str) -> Any:
    """Return a value as a field holds it: YAML takes 1e-4, without a point, for a text.

    Raises:
        ValueError: If it is of another type.
    """
    if value is None and "None" in kind:
        return None
    if "tuple" in kind:
        values = value if isinstance(value, list) else [value]
        if all(isinstance(each, str) for each in values):
            return tuple(values)
        raise ValueError(f"{source}: {name} takes texts, not {value!r}.")
    if "float" in kind or "int" in kind:
        with suppress(TypeError, ValueError):
            number = float(value)
            whole = "float" not in kind
            if not isinstance(value, bool) and (not whole or number.is_integer()):
                return int(number) if whole else number
        raise ValueError(
            f"{source}: {name} takes a {'' if 'float' in kind else 'whole '}number, not {value!r}."
        )
    wanted: type = bool if "bool" in kind else str
    if not isinstance(value, wanted):
        raise ValueError(
            f"{source}: {name} takes {'true or false' if wanted is bool else 'a text'}, not "
            f"{value!r}."
        )
    return value
