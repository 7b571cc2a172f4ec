"""What a dataset's row becomes: an example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from textenvs.task import Example, Task
from textenvs.text.messages import are_messages


def check_fields(task: Task, fields: Mapping[str, str] | None) -> None:
    """Refuse a name that is nearly, but not quite, one that the task reads.

    Any other name is welcome: it goes to `Example.data`.

    Raises:
        TypeError: If `fields` is no mapping from names to columns.
        ValueError: If a name is a near miss.
    """
    if fields is None:
        return
    if not isinstance(fields, Mapping) or not all(
        isinstance(text, str) for pair in fields.items() for text in pair
    ):
        raise TypeError(
            f"fields must map names to columns, as {{'prompt': 'question'}}, but it is {fields!r}."
        )
    for name in set(fields) - set(task.fields):
        close = get_close_matches(name, task.fields, n=1, cutoff=0.8)
        if close:
            raise ValueError(
                f"fields has {name!r}, which {type(task).__name__} does not read: did you mean "
                f"{close[0]!r}? It reads {', '.join(map(repr, task.fields))}."
            )


def as_example(
    row: Any, columns: Mapping[str, str], required: Iterable[str], where: str
) -> Example:
    """Return the example that a row holds.

    Args:
        row: Values by column; a nested value has a dotted name, as "translation.en".
        columns: The column of each part of the example.
        required: The parts that must be there.
        where: What an error calls the row.

    Raises:
        ValueError: If a part is missing or of another type.
        TypeError: If the row is no mapping.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected an Example or a mapping, got a {type(row).__name__}.")
    found = {name: _cell(row, column) for name, column in columns.items()}
    values = {name: cell[0] for name, cell in found.items() if cell and not _missing(cell[0])}
    for name in required:
        if name not in values and found[name]:
            raise ValueError(f"{where}: the {name} ({columns[name]!r}) is missing.")
        if name not in values:
            close = get_close_matches(columns[name], map(str, row), n=1)
            raise ValueError(
                f"{where}: no field {columns[name]!r} to read the {name} from; the row has "
                f"{', '.join(map(repr, row))}. Name the right one with fields={{{name!r}: "
                f"{repr(close[0]) if close else '...'}}}."
            )
    prompt, references = values.pop("prompt", ""), values.pop("references", ())
    if not isinstance(prompt, str) and not are_messages(prompt):
        raise ValueError(
            f"{where}: the prompt must be text or a list of messages, but it is a "
            f"{type(prompt).__name__} ({prompt!r})."
        )
    if isinstance(references, (str, bytes, Mapping)) or not isinstance(references, Iterable):
        references = (references,)
    texts = tuple(map(_as_text, references))
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where}: the references must be a text or a list of texts (or whole numbers), but "
            f"they are {values_of(references)}."
        )
    try:
        return Example(prompt, texts, values)
    except ValueError as error:  # of messages
        raise ValueError(f"{where}: {error}") from error


def values_of(references: Iterable[Any]) -> str:
    """Return references as an error shows them."""
    own = list(references)
    return repr(own[0] if len(own) == 1 else own)


def _cell(row: Mapping[str, Any], column: str) -> tuple[Any, ...]:
    """Return (value,) of a column, whose name may lead into nested values; () without it."""
    if column in row:
        return (row[column],)
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ()
        value = value[part]
    return (value,)


def _missing(value: Any) -> bool:
    """Return whether there is no value; tables say so with "not a number"."""
    return value is None or (isinstance(value, float) and value != value)


def _as_text(reference: Any) -> Any:
    """Return a whole number as text, and anything else as it is."""
    whole = isinstance(reference, Integral) and not isinstance(reference, bool)
    return str(int(reference)) if whole else reference
