"""Between text and token ids: loading tokenizers, encoding prompts and responses, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = npt.NDArray[np.int64]

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


@lru_cache(maxsize=8)
def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many ids there are: `len(tokenizer)`, or more if its ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the pad id, or the EOS id for the many tokenizers that have no pad token."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


@lru_cache(maxsize=64)
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]
) -> tuple[TokenIds, ...]:
    """Encode prompts with the special tokens that the tokenizer puts around an input.

    An empty prompt becomes one token (BOS, else EOS), since a model needs something to read.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # verbose=False: a prompt longer than the model's positions is reported by our own check.
    encoded = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return tuple(np.asarray(ids or [start], dtype=np.int64) for ids in encoded)


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """Encode text that goes on from other text: no special tokens are added."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt: str, eos: bool = True
) -> TokenIds:
    """Encode a response as an agent would emit it after `prompt`: a space between, EOS behind."""
    separator = "" if not prompt or prompt[-1].isspace() else " "
    ids = encode_continuation(tokenizer, separator + text)
    return np.append(ids, tokenizer.eos_token_id).astype(np.int64) if eos else ids


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | TokenIds) -> str:
    """Return the text of emitted tokens, without special tokens and surrounding white space."""
    text = tokenizer.decode(
        np.asarray(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return cast("str", text).strip()
