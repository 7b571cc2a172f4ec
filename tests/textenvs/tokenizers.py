"""Small tokenizers of the kinds that models come with, trained on the spot in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEXT

TEXTS = (*TEXT, "yes no Yes (yes) sci/tech 42\n\nQ: A:", "User: lower higher\nAgent: good bye (ok)")


def _around(backend: Any, template: str, names: list[str]) -> None:
    special = [(name, backend.token_to_id(name)) for name in names]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def byte_level(prefix: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind; with `prefix`, RoBERTa's, which begins every text with a space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    _around(backend, "<s> $A </s>", ["<s>", "</s>"])
    return _fast(backend)


def sentencepiece_bpe(normalized: bool) -> PreTrainedTokenizerFast:
    """Llama's kind, whose space in front is put there before or while words are split."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalized:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    special = ["<s>", "</s>", "<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    plain = Tokenizer(models.BPE(unk_token="<unk>"))  # which has no bytes for what it knows
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    state = plain.model.__getstate__()
    backend.model = _with_bytes(state)
    _around(backend, "<s> $A", ["<s>"])
    return _fast(backend)


def _with_bytes(state: bytes) -> Any:
    import json

    model = json.loads(state)
    merges = [tuple(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    return models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: NFKC, white space collapsed, EOS behind every input."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<pad>", "</s>", "<unk>", "<s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    _around(backend, "$A </s>", ["</s>"])
    return _fast(backend)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, no accents, [CLS] and [SEP] around every input."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    _around(backend, "[CLS] $A [SEP]", ["[CLS]", "[SEP]"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


def _fast(backend: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


_KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": lambda: byte_level(prefix=False),
    "byte level, prefix space": lambda: byte_level(prefix=True),
    "sentencepiece bpe": lambda: sentencepiece_bpe(normalized=False),
    "sentencepiece bpe, normalizer": lambda: sentencepiece_bpe(normalized=True),
    "unigram": unigram,
    "wordpiece": wordpiece,
}
KINDS = tuple(_KINDS)


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind, which nobody may change."""
    return _KINDS[kind]()
