"""Translation: English sentences to be put into German."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np

from textenvs.data.splits import split_examples
from textenvs.rewards import metrics
from textenvs.task import Example, Task, Transcript
from textenvs.tasks.translation.grammar import in_english, in_german
from textenvs.tasks.translation.recognition import is_german
from textenvs.tasks.translation.sampling import sample_clause

NUM_SENTENCES = 5000


class Translation(Task):
    """Translate an English sentence into German.

    ## Description
    The agent reads an English sentence and writes the German one. The built-in sentences are drawn
    once, with a fixed seed, from a grammar whose German side has case, gender and number agreement,
    adjective endings, stem-changing verbs, dative objects, prepositions that govern cases, modal
    verbs, negation, fronted time adverbs and subordinate clauses: "Today the small dog sees a cat."
    is "Heute sieht der kleine Hund eine Katze."

    ## Action Space, Observation Space
    Those of `textenvs.envs.env.TextEnv`. The prompt is "English: ...", newline, "German:".

    ## Rewards
    The sentence chrF of the response against its best reference, in [0, 1], as computed by
    sacrebleu (Popović, 2015).

    ## Episode End
    With EOS or after 40 tokens.

    ## Success
    The response equals one of the references.

    ## Well-formed
    The grammar produces the response, whether or not it is the right translation. Of other
    sentences than the built-in ones nothing is said.

    ## Data
    5,000 sentence pairs, one reference each. A user's dataset has the columns `prompt` (English)
    and `references` (German).

    ## Version History
    * v0: Initial version.
    """

    fields: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "references": "references"}
    required_fields: ClassVar[tuple[str, ...]] = ("prompt", "references")
    max_new_tokens = 40
    best_return = 1.0
    template = "English: {prompt}\nGerman:"

    def examples(self, split: str) -> Sequence[Example]:
        """Return the sentence pairs of one split."""
        return _examples(split)

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return each translation's sentence chrF, in [0, 1]."""
        return metrics.chrf(transcripts)

    def is_success(self, transcript: Transcript) -> bool:
        """Return whether the translation equals one of the references."""
        return transcript.response in transcript.references

    def is_well_formed(self, transcript: Transcript) -> bool | None:
        """Return whether the response is a sentence of the German grammar; None: no own example."""
        known = transcript.example.prompt in _english()
        return is_german(transcript.response) if known else None


@lru_cache
def _examples(split: str) -> tuple[Example, ...]:
    return split_examples(_sentence_pairs(), split)


@lru_cache(maxsize=1)
def _sentence_pairs() -> tuple[Example, ...]:
    rng = np.random.default_rng(0)
    pairs: dict[str, str] = {}
    while len(pairs) < NUM_SENTENCES:
        clause = sample_clause(rng)
        pairs[in_english(clause)] = in_german(clause)
    return tuple(Example(english, (german,)) for english, german in pairs.items())


@lru_cache(maxsize=1)
def _english() -> frozenset[str]:
    return frozenset(example.prompt for example in _sentence_pairs())
