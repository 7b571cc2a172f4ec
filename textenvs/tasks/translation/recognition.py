"""Whether a text is a sentence that the German side of the grammar produces.

A text is parsed into every clause that it could stand for. A clause counts if it may be drawn and
is rendered as just this text, so that recognition and generation cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from textenvs.tasks.translation.grammar import (
    POSSESSIVES,
    Case,
    Clause,
    Modal,
    Nominal,
    NounPhrase,
    Preposition,
    Verb,
    in_german,
)
from textenvs.tasks.translation.sampling import can_be_drawn
from textenvs.tasks.translation.words import (
    ADJECTIVES,
    ADJECTIVES_BY_KIND,
    FOR,
    IN,
    INTO,
    MODALS,
    NOUNS,
    PRONOUNS,
    TIMES,
    VERBS,
    WITH,
)

Words = tuple[str, ...]
_LONGEST_NOMINAL = 3  # determiner, adjective, noun
_CONTRACTED = {"im": "in dem", "ins": "in das"}


@lru_cache(maxsize=4096)
def is_german(text: str) -> bool:
    """Return whether the grammar produces a text as a German sentence."""
    if not text.endswith("."):
        return False
    main, *reasons = text[:-1].split(", weil ")
    if len(reasons) > 1:
        return False
    # The first word may have its capital because it is a noun, or because it is the first one.
    for start in {main, main[:1].lower() + main[1:]}:
        for clause in _main_clauses(tuple(start.split(" "))):
            for reason in _subordinate_clauses(tuple(reasons[0].split(" "))) if reasons else [None]:
                whole = _with_reason(clause, reason)
                if in_german(whole) == text and can_be_drawn(whole):
                    return True
    return False


def _with_reason(clause: Clause, reason: Clause | None) -> Clause:
    return Clause(**{**vars(clause), "reason": reason})


def _main_clauses(words: Words) -> Iterator[Clause]:
    """Yield what a main clause may stand for: the finite verb is second."""
    for english, german in TIMES.items():
        time = tuple(german.split(" "))
        if words[: len(time)] == time and len(words) > len(time):
            finite, *rest = words[len(time) :]
            yield from _clauses(finite, tuple(rest), (english, german))
            # Behind a fronted adverb a pronoun may come before the subject.
            for size in range(1, min(_LONGEST_NOMINAL, len(rest) - 1) + 1):
                subject_first = (*rest[1 : 1 + size], rest[0], *rest[1 + size :])
                yield from _clauses(finite, subject_first, (english, german))
    for size in range(1, min(_LONGEST_NOMINAL, len(words) - 1) + 1):
        yield from _clauses(words[size], (*words[:size], *words[size + 1 :]))


def _subordinate_clauses(words: Words) -> Iterator[Clause]:
    """Yield what a subordinate clause may stand for: the finite verb is last."""
    yield from _clauses(words[-1], words[:-1])


def _clauses(finite: str, words: Words, time: tuple[str, str] | None = None) -> Iterator[Clause]:
    """Yield the clauses of a finite verb and the other words, in the order subject, objects, ..."""
    for verb, modal, person in _verbs().get(finite, ()):
        if modal is not None:
            yield from (
                clause
                for infinitive in _infinitives().get(words[-1] if words else "", ())
                for clause in _filled(infinitive, modal, person, words[:-1], time)
            )
        elif verb is not None:
            yield from _filled(verb, None, person, words, time)


def _filled(
    verb: Verb, modal: Modal | None, person: int, words: Words, time: tuple[str, str] | None
) -> Iterator[Clause]:
    """Yield the clauses of a verb whose subject, objects, negation and phrase are these words."""
    for subject, after_subject in _nominals(words, "nominative"):
        if subject.person != person:
            continue
        for dative, after_dative in _objects(after_subject, "dative", bool(verb.dative)):
            for accusative, rest in _objects(after_dative, "accusative", bool(verb.accusative)):
                negations = [False, True] if rest[:1] != ("nicht",) else [True]
                rest = rest[1:] if rest[:1] == ("nicht",) else rest
                for phrase, negated in product(_phrases(rest), negations):
                    yield Clause(subject, verb, dative, accusative, phrase, time, modal, negated)


def _objects(words: Words, case: Case, wanted: bool) -> Iterator[tuple[Nominal | None, Words]]:
    if wanted:
        yield from _nominals(words, case)
    else:
        yield None, words


def _phrases(words: Words) -> Iterator[tuple[Preposition, Nominal] | None]:
    """Yield the prepositional phrases that all of the words may be; None for no words."""
    if not words:
        yield None
        return
    first, *rest = " ".join((_CONTRACTED.get(words[0], words[0]), *words[1:])).split(" ")
    for preposition in (IN, INTO, WITH, FOR):
        if preposition.german == first:
            for nominal, left in _nominals(tuple(rest), preposition.case):
                if not left:
                    yield preposition, nominal


def _nominals(words: Words, case: Case) -> Iterator[tuple[Nominal, Words]]:
    """Yield the nominals that the first words may be, each with the words behind it."""
    for size in range(1, min(_LONGEST_NOMINAL, len(words)) + 1):
        for nominal in _by_form(case).get(" ".join(words[:size]), ()):
            yield nominal, words[size:]


@lru_cache(maxsize=3)
def _by_form(case: Case) -> dict[str, list[Nominal]]:
    """Return the nominals of each form in a case, negated ("kein") or not."""
    forms: dict[str, list[Nominal]] = {}
    for pronoun in PRONOUNS.values():
        forms.setdefault(pronoun.in_german(case), []).append(pronoun)
    for noun in NOUNS.values():
        adjectives = [(word, ADJECTIVES[word]) for word in ADJECTIVES_BY_KIND[noun.kind]]
        for determiner, adjective, plural in product(
            ("the", "a", *POSSESSIVES), (None, *adjectives), (False, True)
        ):
            phrase = NounPhrase(determiner, noun, adjective, plural)
            for form in {phrase.in_german(case), phrase.in_german(case, negated=True)}:
                forms.setdefault(form, []).append(phrase)
    return forms


@lru_cache(maxsize=1)
def _verbs() -> dict[str, list[tuple[Verb | None, Modal | None, int]]]:
    """Return the verbs and modals of each finite form, with the person that it is of."""
    forms: dict[str, list[tuple[Verb | None, Modal | None, int]]] = {}
    for verb in VERBS.values():
        infinitive, second, third = verb.german
        for person, form in enumerate((infinitive[:-1], second, third, infinitive)):
            forms.setdefault(form, []).append((verb, None, person))
    for modal in MODALS.values():
        for person, form in enumerate(modal.german):
            forms.setdefault(form, []).append((None, modal, person))
    return forms


@lru_cache(maxsize=1)
def _infinitives() -> dict[str, list[Verb]]:
    forms: dict[str, list[Verb]] = {}
    for verb in VERBS.values():
        forms.setdefault(verb.german[0], []).append(verb)
    return forms
