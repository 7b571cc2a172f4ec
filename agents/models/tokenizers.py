"""A model's own tokenizer: whether an environment's is the same, and how an agent keeps it."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from agents.models.lora import adapter_folder
from textenvs.text.loading import why_not_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of these is there if there is a tokenizer.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
EPOCH = (1980, 1, 1, 0, 0, 0)  # so that the same tokenizer is the same bytes


def own_tokenizer(model: str | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that is saved with a model, or None: there is none.

    Args:
        model: A name or path; that of an adapter stands for its model's if it has none itself.

    Raises:
        ValueError: If a folder has one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    if Path(model).is_dir() and not any((Path(model) / name).is_file() for name in FILES):
        saved = adapter_folder(model)
        return None if saved is None else own_tokenizer(saved[1])
    try:
        loaded = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        if not Path(model).is_dir() or "trust_remote_code" in str(error):
            return None  # It cannot be asked for, or is known to its user alone.
        raise ValueError(
            f"The tokenizer of the model {str(model)!r} cannot be compared with that of the "
            f"environment: {why_not_loaded(str(model), error)} Mend it, or take it away."
        ) from error
    return cast("PreTrainedTokenizerBase", loaded)


def difference(
    given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
) -> tuple[int, int, str] | None:
    """Return how many ids of how many mean something else, with an example; None: none does.

    Tokens that were added to either are left out: a model may have been made ready for more.

    Args:
        given: A tokenizer.
        own: The one that a model was trained with.
    """
    vocabularies = [{i: token for token, i in tok.get_vocab().items()} for tok in (given, own)]
    added = {i for tok in (given, own) for i in tok.added_tokens_decoder}
    ids = sorted((vocabularies[0].keys() | vocabularies[1].keys()) - added)
    other = [i for i in ids if vocabularies[0].get(i) != vocabularies[1].get(i)]
    if not other:
        return None
    shown = [repr(vocabulary.get(other[0])) for vocabulary in vocabularies]
    return len(other), len(ids), f"{other[0]} is {shown[0]} and not {shown[1]}"


def to_bytes(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return the files that a tokenizer saves, as a zip archive."""
    archive = io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file,
    ):
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            entry = zipfile.ZipInfo(path.name, EPOCH)
            file.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return archive.getvalue()


def from_bytes(archive: bytes) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `to_bytes` was given."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            file.extractall(folder)
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder))
