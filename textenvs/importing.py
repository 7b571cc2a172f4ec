"""Objects by their dotted names."""

from __future__ import annotations

import importlib
from typing import Any


def load_object(path: str) -> Any:
    """Import what "package.module:name" points to.

    Raises:
        ValueError: If there is no such module or name.
    """
    module_name, _, name = path.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Could not import {path!r}: {error}.") from error
    return value
