"""Tokenizers: the embedded one, and those that transformers loads."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED_TOKENIZER = Path(__file__).parent / "tokenizer.json"
EOS_TOKEN = "<|eos|>"
PAD_TOKEN = "<|pad|>"


@lru_cache(maxsize=1)
def embedded_tokenizer() -> PreTrainedTokenizerBase:
    """Return the small byte-level BPE that comes with the package; it encodes any text."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(EMBEDDED_TOKENIZER), eos_token=EOS_TOKEN, pad_token=PAD_TOKEN
    )


def load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    """Return a tokenizer that has an EOS token.

    Args:
        tokenizer: None (the embedded one), what `AutoTokenizer.from_pretrained` takes, or a
            tokenizer, which is used as it is and never changed.

    Raises:
        ValueError: If it cannot be loaded or has no EOS token.
        TypeError: If it is something else.
    """
    if tokenizer is None:
        return embedded_tokenizer()
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _from_pretrained(str(tokenizer))
    if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "eos_token_id")):
        raise TypeError(
            "tokenizer must be None, a name, a path or a transformers tokenizer, "
            f"but it is a {type(tokenizer).__name__}."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, so no response could end: "
            "load it with AutoTokenizer.from_pretrained(..., eos_token=...) and pass the object."
        )
    return tokenizer


@lru_cache(maxsize=8)
def _from_pretrained(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}. Expected a folder written by "
            "save_pretrained, or a hub id (needs a connection or a cached copy)."
        ) from error
