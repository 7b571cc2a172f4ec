"""A small English-German grammar: one clause, rendered in both languages.

German nominals are inflected for case, gender and number. The finite verb stands second in a main
clause and last in a subordinate one, and an infinitive closes its clause. The subject precedes its
objects, but behind a fronted adverb a pronoun comes before a noun: "Heute hilft mir der Mann."
Source of the paradigms: Duden, Die Grammatik.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Case = Literal["nominative", "accusative", "dative"]
Paradigm = dict[Case, tuple[str, str, str, str]]  # for masculine, feminine, neuter and plural

POSSESSIVES = {
    "my": "mein",
    "your": "dein",
    "his": "sein",
    "her": "ihr",
    "our": "unser",
    "their": "ihr",
}

_THE: Paradigm = {
    "nominative": ("der", "die", "das", "die"),
    "accusative": ("den", "die", "das", "die"),
    "dative": ("dem", "der", "dem", "den"),
}
_A: Paradigm = {
    "nominative": ("", "e", "", "e"),
    "accusative": ("en", "e", "", "e"),
    "dative": ("em", "er", "em", "en"),
}
_ADJECTIVE_AFTER_THE: Paradigm = {
    "nominative": ("e", "e", "e", "en"),
    "accusative": ("en", "e", "e", "en"),
    "dative": ("en", "en", "en", "en"),
}
_ADJECTIVE_AFTER_A: Paradigm = {
    "nominative": ("er", "e", "es", "en"),
    "accusative": ("en", "e", "es", "en"),
    "dative": ("en", "en", "en", "en"),
}
_PLURAL_ADJECTIVE_ALONE: dict[Case, str] = {"nominative": "e", "accusative": "e", "dative": "en"}


@dataclass(frozen=True)
class Pronoun:
    """A personal pronoun.

    Args:
        english: Subject and object form.
        german: Nominative, accusative and dative.
        person: The verb form it asks for: 0 to 2 for first to third singular, 3 for any plural.
    """

    english: tuple[str, str]
    german: tuple[str, str, str]
    person: int

    def in_english(self, subject: bool = False) -> str:
        """Return the subject or object form."""
        return self.english[0 if subject else 1]

    def in_german(self, case: Case, negated: bool = False) -> str:
        """Return the form of a case. A pronoun is negated by "nicht", outside of it."""
        return self.german[("nominative", "accusative", "dative").index(case)]


@dataclass(frozen=True)
class Noun:
    """A noun with its singular and plural. `kind` says which verbs it goes with."""

    kind: str
    gender: Literal["m", "f", "n"]
    english: tuple[str, str]
    german: tuple[str, str]


@dataclass(frozen=True)
class NounPhrase:
    """A determiner, perhaps an adjective, and a noun.

    Args:
        determiner: "the", "a" (which is no word in the plural) or a key of `POSSESSIVES`.
        noun: The noun.
        adjective: English adjective and German stem, or None.
        plural: Whether the noun is in the plural.
    """

    determiner: str
    noun: Noun
    adjective: tuple[str, str] | None = None
    plural: bool = False

    @property
    def person(self) -> int:
        """The verb form that the phrase asks for, as in `Pronoun`."""
        return 3 if self.plural else 2

    def in_english(self, subject: bool = False) -> str:
        """Return the phrase, which is the same as subject and as object."""
        words = [self.adjective[0]] if self.adjective else []
        words.append(self.noun.english[self.plural])
        if self.determiner != "a":
            words.insert(0, self.determiner)
        elif not self.plural:
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        return " ".join(words)

    def in_german(self, case: Case, negated: bool = False) -> str:
        """Return the phrase in a case; `negated` turns "ein" into "kein"."""
        column = 3 if self.plural else "mfn".index(self.noun.gender)
        if self.determiner == "the":
            article, ending = _THE[case][column], _ADJECTIVE_AFTER_THE[case][column]
        elif self.determiner == "a" and self.plural and not negated:
            article, ending = "", _PLURAL_ADJECTIVE_ALONE[case]
        else:
            stem = POSSESSIVES.get(self.determiner, "kein" if negated else "ein")
            article, ending = stem + _A[case][column], _ADJECTIVE_AFTER_A[case][column]
        adjective = self.adjective[1] + ending if self.adjective else ""
        noun = self.noun.german[self.plural]
        if self.plural and case == "dative" and noun[-1] not in "ns":
            noun += "n"
        return " ".join(word for word in (article, adjective, noun) if word)


Nominal = NounPhrase | Pronoun


@dataclass(frozen=True)
class Preposition:
    """A preposition, the German case that it governs, and the kinds of nouns it goes with."""

    english: str
    german: str
    case: Case
    kinds: str


@dataclass(frozen=True)
class Verb:
    """A verb and what goes with it: kinds of nouns, separated by spaces, empty for none.

    Args:
        english: Base form and third person singular.
        german: Infinitive, second and third person singular.
        subjects: The kinds of nouns that do it.
        accusative: The kinds of nouns that it is done to.
        dative: The kinds of nouns that are its dative object, which comes first.
        prepositions: The prepositions that may follow.
    """

    english: tuple[str, str]
    german: tuple[str, str, str]
    subjects: str
    accusative: str = ""
    dative: str = ""
    prepositions: tuple[Preposition, ...] = ()


@dataclass(frozen=True)
class Modal:
    """A modal verb: English base form and third person, the same negated, German by person."""

    english: tuple[str, str]
    english_negated: tuple[str, str]
    german: tuple[str, str, str, str]


@dataclass(frozen=True)
class Clause:
    """A clause. `time` is the adverb that opens it in both languages; `reason` follows "because".

    A negated clause has "nicht" behind its objects and before a prepositional phrase, or "kein" in
    its indefinite accusative object.
    """

    subject: Nominal
    verb: Verb
    dative: Nominal | None = None
    accusative: Nominal | None = None
    phrase: tuple[Preposition, Nominal] | None = None
    time: tuple[str, str] | None = None
    modal: Modal | None = None
    negated: bool = False
    reason: Clause | None = None


def in_english(clause: Clause) -> str:
    """Return the English sentence."""
    words = [clause.time[0]] if clause.time else []
    words += _english_words(clause)
    if clause.reason:
        words += ["because", *_english_words(clause.reason)]
    return _sentence(words)


def in_german(clause: Clause) -> str:
    """Return the German sentence."""
    finite, subject, *rest = _german_words(clause)
    if clause.time:
        # "sie" stays behind the subject, where it cannot be mistaken for one.
        pronoun = isinstance(clause.dative or clause.accusative, Pronoun) and rest[0] != "sie"
        if pronoun and isinstance(clause.subject, NounPhrase):
            subject, rest[0] = rest[0], subject
        words = [clause.time[1], finite, subject, *rest]
    else:
        words = [subject, finite, *rest]
    if clause.reason:
        finite, *others = _german_words(clause.reason)
        words[-1] += ","
        words += ["weil", *others, finite]
    return _sentence(words)


def _english_words(clause: Clause) -> list[str]:
    third = clause.subject.person == 2
    words = [clause.subject.in_english(subject=True)]
    if clause.modal:
        forms = clause.modal.english_negated if clause.negated else clause.modal.english
        words += [forms[third], clause.verb.english[0]]
    elif clause.negated:
        words += ["does not" if third else "do not", clause.verb.english[0]]
    else:
        words.append(clause.verb.english[third])
    words += [nominal.in_english() for nominal in (clause.dative, clause.accusative) if nominal]
    if clause.phrase:
        words += [clause.phrase[0].english, clause.phrase[1].in_english()]
    return words


def _german_words(clause: Clause) -> list[str]:
    """Return the finite verb, the subject, and the rest in order."""
    infinitive, second, third = clause.verb.german
    forms = clause.modal.german if clause.modal else (infinitive[:-1], second, third, infinitive)
    words = [forms[clause.subject.person], clause.subject.in_german("nominative")]
    if clause.dative:
        words.append(clause.dative.in_german("dative"))
    if clause.accusative:
        words.append(clause.accusative.in_german("accusative", clause.negated))
    indefinite = isinstance(clause.accusative, NounPhrase) and clause.accusative.determiner == "a"
    if clause.negated and not indefinite:
        words.append("nicht")
    if clause.phrase:
        preposition, nominal = clause.phrase
        text = f"{preposition.german} {nominal.in_german(preposition.case)}"
        words.append(text.replace("in dem ", "im ").replace("in das ", "ins "))
    if clause.modal:
        words.append(infinitive)
    return words


def _sentence(words: list[str]) -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."
