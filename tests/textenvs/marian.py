"""Marian's tokenizers, trained on a task's sentences: pieces of their own for each language."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import MarianTokenizer

from textenvs.registration import load_task

PIECES = {"source": 150, "target": 180}


def marian_tokenizer(folder: Path, joint: bool = True, target: int = PIECES["target"]) -> Any:
    """Train one into an empty folder.

    Args:
        folder: Where its files go.
        joint: Whether an id is the same piece in both languages, or each has ids of its own.
        target: How many pieces the language of responses has.
    """
    import sentencepiece

    examples = load_task("Translation-v0").examples("train")[:500]
    texts = {
        "source": [example.prompt for example in examples],
        "target": [example.references[0] for example in examples],
    }
    pieces = {}
    for side, size in {**PIECES, "target": target}.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[side]),
            model_prefix=str(folder / side),
            vocab_size=size,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        pieces[side] = [model.id_to_piece(i) for i in range(size)]
    both = [*pieces["source"], *pieces["target"]]
    _vocabulary(folder / "vocab.json", both if joint else pieces["source"])
    _vocabulary(folder / "target_vocab.json", pieces["target"])
    return MarianTokenizer(
        str(folder / "source.spm"),
        str(folder / "target.spm"),
        str(folder / "vocab.json"),
        None if joint else str(folder / "target_vocab.json"),
        source_lang="en",
        target_lang="de",
        separate_vocabs=not joint,
        model_max_length=512,
    )


def _vocabulary(file: Path, pieces: Iterable[str]) -> None:
    """Write which piece has which id: those with a role first, then the others."""
    tokens = dict.fromkeys(["</s>", "<unk>", "<pad>", *pieces])
    file.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
