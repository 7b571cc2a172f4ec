"""Translation: English sentences to be put into German."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, TypeVar

import numpy as np

from textenvs.data.splits import split_examples
from textenvs.rewards import metrics
from textenvs.task import Example, Task, Transcript
from textenvs.tasks.translation.grammar import (
    POSSESSIVES,
    Clause,
    Nominal,
    NounPhrase,
    in_english,
    in_german,
)
from textenvs.tasks.translation.words import (
    ADJECTIVES,
    ADJECTIVES_BY_KIND,
    INTO,
    MODALS,
    NOUNS,
    PRONOUNS,
    TIMES,
    VERBS,
)

NUM_SENTENCES = 5000

# Not in one clause: "I see us" is no English, and "sie sehen sie" is hard to follow.
_CLASHING_PRONOUNS = ({PRONOUNS["I"], PRONOUNS["we"]}, {PRONOUNS["she"], PRONOUNS["they"]})
_Option = TypeVar("_Option")


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

    def examples(self, split: str) -> Sequence[Example]:
        """Return the sentence pairs of one split."""
        return split_examples(_sentence_pairs(), split)

    def prompt(self, example: Example) -> str:
        """Return the English sentence and the request for the German one."""
        return f"English: {example.prompt}\nGerman:"

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return each translation's sentence chrF, in [0, 1]."""
        return metrics.chrf(transcripts)

    def is_success(self, transcript: Transcript) -> bool:
        """Return whether the translation equals one of the references."""
        return transcript.response in transcript.references


def sample_clause(rng: np.random.Generator) -> Clause:
    """Draw one main clause, perhaps with a fronted time adverb or a subordinate clause."""
    if rng.random() < 0.2:
        return _sample_clause(rng, detail=0.1, reason=_sample_clause(rng, detail=0.1))
    time = _pick(rng, tuple(TIMES.items())) if rng.random() < 0.35 else None
    return _sample_clause(rng, detail=0.45, time=time)


@lru_cache(maxsize=1)
def _sentence_pairs() -> tuple[Example, ...]:
    rng = np.random.default_rng(0)
    pairs: dict[str, str] = {}
    while len(pairs) < NUM_SENTENCES:
        clause = sample_clause(rng)
        pairs[in_english(clause)] = in_german(clause)
    return tuple(Example(english, (german,)) for english, german in pairs.items())


def _sample_clause(
    rng: np.random.Generator,
    detail: float,
    time: tuple[str, str] | None = None,
    reason: Clause | None = None,
) -> Clause:
    """Draw a clause; `detail` is the probability of each adjective and prepositional phrase."""
    verb = _pick(rng, tuple(VERBS.values()))
    negated = bool(rng.random() < 0.25)
    subject = _sample_nominal(rng, verb.subjects, (), detail, not negated)
    dative = accusative = phrase = None
    if verb.dative:
        dative = _sample_nominal(rng, verb.dative, (subject,), detail, not negated)
    if verb.accusative:
        accusative = _sample_nominal(rng, verb.accusative, (subject, dative), detail, True)
    if verb.prepositions and (rng.random() < detail or INTO in verb.prepositions):
        preposition = _pick(rng, verb.prepositions)
        governed = _sample_nominal(
            rng, preposition.kinds, (subject, accusative), detail, not negated
        )
        phrase = (preposition, governed)
    modal = _pick(rng, tuple(MODALS.values())) if rng.random() < 0.25 else None
    return Clause(subject, verb, dative, accusative, phrase, time, modal, negated, reason)


def _sample_nominal(
    rng: np.random.Generator,
    kinds: str,
    taken: Sequence[Nominal | None],
    detail: float,
    indefinite: bool,
) -> Nominal:
    """Draw a noun phrase of one of the kinds, or a pronoun for a person, that is not yet taken.

    Without `indefinite` it is definite, as German would otherwise negate it with "kein".
    """
    if "person" in kinds and rng.random() < 0.3:
        excluded = set(taken).union(*(group for group in _CLASHING_PRONOUNS if group & set(taken)))
        return _pick(rng, [pronoun for pronoun in PRONOUNS.values() if pronoun not in excluded])
    nouns_taken = [nominal.noun for nominal in taken if isinstance(nominal, NounPhrase)]
    nouns = [noun for noun in NOUNS.values() if noun.kind in kinds.split()]
    noun = _pick(rng, [noun for noun in nouns if noun not in nouns_taken])
    determiners = ["the", "the"]
    if indefinite and noun.kind != "relative":
        determiners += ["a", "a"]
    if noun.kind != "person":
        determiners += [_pick(rng, tuple(POSSESSIVES))]
    determiner = _pick(rng, determiners)
    adjective = None
    if rng.random() < detail:
        english = _pick(rng, ADJECTIVES_BY_KIND[noun.kind])
        adjective = (english, ADJECTIVES[english])
    plural = bool(rng.random() < 0.3) and noun.kind != "place"
    return NounPhrase(determiner, noun, adjective, plural)


def _pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    return options[int(rng.integers(len(options)))]
