"""Sentences that are drawn from the English-German grammar, and the rules of what goes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from textenvs.tasks.translation.grammar import (
    POSSESSIVES,
    Clause,
    Nominal,
    Noun,
    NounPhrase,
    Pronoun,
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

# Not in one clause: "I see us" is no English, and "sie sehen sie" is hard to follow.
_CLASHING_PRONOUNS = ({PRONOUNS["I"], PRONOUNS["we"]}, {PRONOUNS["she"], PRONOUNS["they"]})
_Option = TypeVar("_Option")


def sample_clause(rng: np.random.Generator) -> Clause:
    """Draw one main clause, perhaps with a fronted time adverb or a subordinate clause."""
    if rng.random() < 0.2:
        return _sample_clause(rng, detail=0.1, reason=_sample_clause(rng, detail=0.1))
    time = _pick(rng, tuple(TIMES.items())) if rng.random() < 0.35 else None
    return _sample_clause(rng, detail=0.45, time=time)


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
    """Draw a noun phrase of one of the kinds, or a pronoun for a person, that is not yet taken."""
    if "person" in kinds and rng.random() < 0.3:
        return _pick(rng, _free_pronouns(taken))
    noun = _pick(rng, _free_nouns(kinds, taken))
    determiners = ["the", "the"]
    if _takes_a(noun, indefinite):
        determiners += ["a", "a"]
    if _takes_possessive(noun):
        determiners += [_pick(rng, tuple(POSSESSIVES))]
    determiner = _pick(rng, determiners)
    adjective = None
    if rng.random() < detail:
        english = _pick(rng, ADJECTIVES_BY_KIND[noun.kind])
        adjective = (english, ADJECTIVES[english])
    plural = bool(rng.random() < 0.3) and _takes_plural(noun)
    return NounPhrase(determiner, noun, adjective, plural)


def can_be_drawn(clause: Clause) -> bool:
    """Return whether `sample_clause` may draw a clause whose parts fit together grammatically."""
    if clause.reason is not None and (clause.time or not can_be_drawn(clause.reason)):
        return False
    verb, definite = clause.verb, not clause.negated
    slots: list[tuple[Nominal, str, tuple[Nominal | None, ...], bool]] = [
        (clause.subject, verb.subjects, (), definite)
    ]
    if (clause.dative is None) == bool(verb.dative):
        return False
    if (clause.accusative is None) == bool(verb.accusative):
        return False
    if clause.dative:
        slots.append((clause.dative, verb.dative, (clause.subject,), definite))
    if clause.accusative:
        before = (clause.subject, clause.dative)
        slots.append((clause.accusative, verb.accusative, before, True))
    if clause.phrase:
        preposition, governed = clause.phrase
        if preposition not in verb.prepositions:
            return False
        before = (clause.subject, clause.accusative)
        slots.append((governed, preposition.kinds, before, definite))
    elif INTO in verb.prepositions:
        return False
    return all(_may_stand(*slot) for slot in slots)


def _may_stand(
    nominal: Nominal, kinds: str, taken: Sequence[Nominal | None], indefinite: bool
) -> bool:
    """Return whether `_sample_nominal` may draw a nominal with these arguments."""
    if isinstance(nominal, Pronoun):
        return "person" in kinds and nominal in _free_pronouns(taken)
    noun = nominal.noun
    if noun not in _free_nouns(kinds, taken):
        return False
    if nominal.determiner == "a" and not _takes_a(noun, indefinite):
        return False
    if nominal.determiner in POSSESSIVES and not _takes_possessive(noun):
        return False
    if nominal.adjective and nominal.adjective[0] not in ADJECTIVES_BY_KIND[noun.kind]:
        return False
    return _takes_plural(noun) or not nominal.plural


def _free_pronouns(taken: Sequence[Nominal | None]) -> list[Pronoun]:
    excluded = set(taken).union(*(group for group in _CLASHING_PRONOUNS if group & set(taken)))
    return [pronoun for pronoun in PRONOUNS.values() if pronoun not in excluded]


def _free_nouns(kinds: str, taken: Sequence[Nominal | None]) -> list[Noun]:
    nouns_taken = [nominal.noun for nominal in taken if isinstance(nominal, NounPhrase)]
    nouns = [noun for noun in NOUNS.values() if noun.kind in kinds.split()]
    return [noun for noun in nouns if noun not in nouns_taken]


def _takes_a(noun: Noun, indefinite: bool) -> bool:
    """Without `indefinite` it is definite, as German would otherwise negate it with "kein"."""
    return indefinite and noun.kind != "relative"


def _takes_possessive(noun: Noun) -> bool:
    return noun.kind != "person"


def _takes_plural(noun: Noun) -> bool:
    return noun.kind != "place"


def _pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    return options[int(rng.integers(len(options)))]
