"""Tokenizers: the embedded one, and those that transformers loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED_TOKENIZER = Path(__file__).parent / "tokenizer.json"
EOS_TOKEN = "<|eos|>"
PAD_TOKEN = "<|pad|>"

# By name: the files that a tokenizer was read from, what it was like then, and itself.
_LOADED: dict[str, tuple[object, str, PreTrainedTokenizerBase]] = {}


def embedded_tokenizer() -> PreTrainedTokenizerBase:
    """Return the small byte-level BPE that comes with the package; it encodes any text."""
    return _remembered(str(EMBEDDED_TOKENIZER))


def load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    """Return a tokenizer that has an EOS token.

    What is loaded by name is remembered until its files change, or somebody changes the object.

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
        tokenizer = _remembered(str(tokenizer))
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


def model_stop_ids(tokenizer: str | Path | PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids with which the model beside a tokenizer ends a turn.

    Args:
        tokenizer: What `load_tokenizer` takes. A name may be asked for at the hub; of an object
            only what is here already is read.

    Returns:
        `eos_token_id` of its generation_config.json, or else of its config.json; none if it has
        neither.
    """
    name, by_name = _model_beside(tokenizer)
    if not name:
        return []
    from transformers import AutoConfig, GenerationConfig

    options: dict[str, Any] = {"local_files_only": not by_name}
    try:
        config: Any = GenerationConfig.from_pretrained(name, **options)
    except (OSError, ValueError):
        try:
            whole = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        except Exception:  # Whoever loads the model says what is wrong with it.
            return []
        config = whole.get_text_config()
    ids = config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else [int(token) for token in ids]


def model_is_seq2seq(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, options: Mapping[str, Any] | None = None
) -> bool:
    """Return whether the model beside a tokenizer is an encoder-decoder; see `model_stop_ids`.

    Args:
        tokenizer: Likewise.
        options: Further arguments of `AutoConfig.from_pretrained`.
    """
    name, by_name = _model_beside(tokenizer)
    if not name:
        return False
    from transformers import AutoConfig

    try:
        given = {"local_files_only": not by_name, "trust_remote_code": False, **(options or {})}
        config = AutoConfig.from_pretrained(name, **given)
    except Exception:  # Whoever loads the model says what is wrong with it.
        return False
    return bool(config.is_encoder_decoder)


def _model_beside(tokenizer: str | Path | PreTrainedTokenizerBase | None) -> tuple[str, bool]:
    """Return where a tokenizer's model may be, or "", and whether the tokenizer is that name."""
    by_name = isinstance(tokenizer, (str, Path))
    name = str(tokenizer if by_name else getattr(tokenizer, "name_or_path", ""))
    return "" if name == str(EMBEDDED_TOKENIZER) else name, by_name


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what may change in a tokenizer after its first use.

    It is part of the keys of caches, which would otherwise miss such a change.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    parts: list[object] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts.append(repr(getattr(tokenizer, "chat_template", None)))
    parts += [(token, repr(text)) for token, text in added.items()]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part: Any = getattr(backend, name, None)
        try:
            parts.append(None if part is None else part.__getstate__())
        except Exception:  # it is written in Python, and the library raises this very class
            parts.append(id(part))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _remembered(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a name, loaded anew if it is not what it was when it was loaded."""
    files = sorted(Path(name).glob("*")) if Path(name).is_dir() else []
    seen = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    before, key, tokenizer = _LOADED.get(name, (None, "", None))
    if tokenizer is None or before != seen or fingerprint(tokenizer) != key:
        tokenizer = _load(name)
        _LOADED[name] = seen, fingerprint(tokenizer), tokenizer
    return tokenizer


def _load(name: str) -> PreTrainedTokenizerBase:
    if name == str(EMBEDDED_TOKENIZER):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_file=name, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN
        )
    from transformers import AutoTokenizer  # which imports torch

    try:
        # Where nothing is said of code that comes with it, a question waits at the terminal.
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return cast("PreTrainedTokenizerBase", loaded)
    except ImportError:  # which says what to install
        raise
    except Exception as error:  # of files there are as many as there are ways to damage them
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}: {why_not_loaded(name, error)} Expected a "
            "folder written by save_pretrained, or a hub id; what needs code of its own is loaded "
            "by AutoTokenizer.from_pretrained(..., trust_remote_code=True) and passed as an object."
        ) from error


def why_not_loaded(name: str, error: BaseException) -> str:
    """Return why a folder or a hub id could not be loaded, as sentences."""
    if Path(name).is_dir():
        return _damaged(name) + _cause_of(error)
    return (
        f"{_cause_of(error)} There is no such folder; a hub id needs a connection or a cached copy."
    )


def _damaged(name: str) -> str:
    """Return which file of a folder cannot be read, as the beginning of a sentence."""
    from safetensors import safe_open

    for file in sorted(Path(name).iterdir()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except Exception:  # whatever is wrong with it, the cause of the failure says it
            return f"the file {file.name} is damaged. "
    return ""


def _cause_of(error: BaseException) -> str:
    """Return an error's first line, and its type."""
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(line.strip() for line in lines[:2])[:300].rstrip(". ")
    return f"{type(error).__name__}: {text}."
