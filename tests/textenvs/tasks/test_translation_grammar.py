from dataclasses import replace

import pytest

from textenvs.tasks.translation.grammar import (
    POSSESSIVES,
    Case,
    Clause,
    Nominal,
    NounPhrase,
    in_english,
    in_german,
)
from textenvs.tasks.translation.words import (
    ADJECTIVES,
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


def nominal(text: str) -> Nominal:
    """Read an English nominal: "the small dogs", "an egg", "big cats", "he"."""
    if text in PRONOUNS:
        return PRONOUNS[text]
    *before, word = text.split()
    determiner = "a"
    if before and before[0] in {"a", "an", "the", *POSSESSIVES}:
        determiner = before.pop(0).replace("an", "a")
    noun, plural = next(
        (noun, word == noun.english[1]) for noun in NOUNS.values() if word in noun.english
    )
    adjective = (before[0], ADJECTIVES[before[0]]) if before else None
    return NounPhrase(determiner, noun, adjective, plural)


def clause(
    subject: str, verb: str, accusative: str = "", dative: str = "", time: str = "", modal: str = ""
) -> Clause:
    return Clause(
        nominal(subject),
        VERBS[verb],
        nominal(dative) if dative else None,
        nominal(accusative) if accusative else None,
        time=(time, TIMES[time]) if time else None,
        modal=MODALS[modal] if modal else None,
    )


def negated(affirmed: Clause) -> Clause:
    return replace(affirmed, negated=True)


PAIRS = [
    # Agreement and stem changes.
    (clause("I", "sleep"), "I sleep.", "Ich schlafe."),
    (clause("you", "see", "he"), "You see him.", "Du siehst ihn."),
    (clause("my brother", "eat", "an egg"), "My brother eats an egg.", "Mein Bruder isst ein Ei."),
    (clause("we", "work"), "We work.", "Wir arbeiten."),
    (clause("you", "answer", dative="I"), "You answer me.", "Du antwortest mir."),
    (clause("she", "look for", "they"), "She looks for them.", "Sie sucht sie."),
    (clause("the birds", "find", "apples"), "The birds find apples.", "Die Vögel finden Äpfel."),
    # Case, adjective endings.
    (
        clause("the small dog", "see", "a cat", time="today"),
        "Today the small dog sees a cat.",
        "Heute sieht der kleine Hund eine Katze.",
    ),
    (
        clause("a small dog", "see", "the old man"),
        "A small dog sees the old man.",
        "Ein kleiner Hund sieht den alten Mann.",
    ),
    (
        clause("a tired child", "read", "an old book"),
        "A tired child reads an old book.",
        "Ein müdes Kind liest ein altes Buch.",
    ),
    (
        clause("young women", "buy", "expensive flowers"),
        "Young women buy expensive flowers.",
        "Junge Frauen kaufen teure Blumen.",
    ),
    (
        clause("our clever friends", "visit", "their old teacher"),
        "Our clever friends visit their old teacher.",
        "Unsere klugen Freunde besuchen ihren alten Lehrer.",
    ),
    (
        clause("he", "help", dative="the small birds"),
        "He helps the small birds.",
        "Er hilft den kleinen Vögeln.",
    ),
    (
        clause("they", "thank", dative="her friendly sister"),
        "They thank her friendly sister.",
        "Sie danken ihrer freundlichen Schwester.",
    ),
    (
        clause("we", "help", dative="old women"),
        "We help old women.",
        "Wir helfen alten Frauen.",
    ),
    (
        clause("the man", "give", "a new car", "his brother"),
        "The man gives his brother a new car.",
        "Der Mann gibt seinem Bruder ein neues Auto.",
    ),
    (
        clause("I", "show", "my pictures", "she"),
        "I show her my pictures.",
        "Ich zeige ihr meine Bilder.",
    ),
    # Prepositions.
    (
        replace(clause("my cat", "sleep"), phrase=(IN, nominal("the garden"))),
        "My cat sleeps in the garden.",
        "Meine Katze schläft im Garten.",
    ),
    (
        replace(clause("the horses", "run"), phrase=(INTO, nominal("the old house"))),
        "The horses run into the old house.",
        "Die Pferde laufen ins alte Haus.",
    ),
    (
        replace(clause("the woman", "go"), phrase=(INTO, nominal("the school"))),
        "The woman goes into the school.",
        "Die Frau geht in die Schule.",
    ),
    (
        replace(clause("the woman", "work"), phrase=(IN, nominal("the school"))),
        "The woman works in the school.",
        "Die Frau arbeitet in der Schule.",
    ),
    (
        replace(clause("he", "buy", "a ball"), phrase=(FOR, nominal("our friend"))),
        "He buys a ball for our friend.",
        "Er kauft einen Ball für unseren Freund.",
    ),
    (
        replace(clause("the dog", "play"), phrase=(WITH, nominal("the children"))),
        "The dog plays with the children.",
        "Der Hund spielt mit den Kindern.",
    ),
    # The verb comes second, and a pronoun before a nominal subject.
    (
        clause("we", "eat", "pears", time="in the evening"),
        "In the evening we eat pears.",
        "Am Abend essen wir Birnen.",
    ),
    (
        clause("the man", "help", dative="I", time="every day"),
        "Every day the man helps me.",
        "Jeden Tag hilft mir der Mann.",
    ),
    (
        clause("the woman", "see", "they", time="sometimes"),
        "Sometimes the woman sees them.",
        "Manchmal sieht die Frau sie.",
    ),
    # Modal verbs.
    (
        clause("the child", "read", "a letter", modal="want to"),
        "The child wants to read a letter.",
        "Das Kind will einen Brief lesen.",
    ),
    (
        clause("you", "help", dative="the teacher", time="on Monday", modal="must"),
        "On Monday you must help the teacher.",
        "Am Montag musst du dem Lehrer helfen.",
    ),
    (
        negated(clause("she", "sleep", modal="must")),
        "She does not have to sleep.",
        "Sie muss nicht schlafen.",
    ),
    (
        negated(clause("my sisters", "buy", "a house", modal="can")),
        "My sisters cannot buy a house.",
        "Meine Schwestern können kein Haus kaufen.",
    ),
    # Negation.
    (
        negated(clause("the cat", "see", "the bird")),
        "The cat does not see the bird.",
        "Die Katze sieht den Vogel nicht.",
    ),
    (
        negated(clause("they", "buy", "small cars")),
        "They do not buy small cars.",
        "Sie kaufen keine kleinen Autos.",
    ),
    (
        negated(clause("I", "eat", "an apple", time="today")),
        "Today I do not eat an apple.",
        "Heute esse ich keinen Apfel.",
    ),
    (
        negated(replace(clause("he", "play"), phrase=(IN, nominal("his kitchen")))),
        "He does not play in his kitchen.",
        "Er spielt nicht in seiner Küche.",
    ),
    # Subordinate clauses.
    (
        replace(clause("the child", "sleep"), reason=negated(clause("we", "see", "he"))),
        "The child sleeps because we do not see him.",
        "Das Kind schläft, weil wir ihn nicht sehen.",
    ),
    (
        replace(
            clause("I", "run", time="often"),
            reason=clause("the man", "give", "a letter", "I", modal="want to"),
        ),
        "Often I run because the man wants to give me a letter.",
        "Oft laufe ich, weil der Mann mir einen Brief geben will.",
    ),
]


@pytest.mark.parametrize(("sentence", "english", "german"), PAIRS, ids=[pair[1] for pair in PAIRS])
def test_the_grammar_renders(sentence: Clause, english: str, german: str) -> None:
    assert in_english(sentence) == english
    assert in_german(sentence) == german


@pytest.mark.parametrize(
    ("text", "case", "german"),
    [
        ("the old dog", "dative", "dem alten Hund"),
        ("the old cat", "dative", "der alten Katze"),
        ("a new book", "nominative", "ein neues Buch"),
        ("a new book", "dative", "einem neuen Buch"),
        ("a new school", "dative", "einer neuen Schule"),
        ("big apples", "dative", "großen Äpfeln"),
        ("your cars", "dative", "deinen Autos"),
        ("the old teachers", "accusative", "die alten Lehrer"),
        ("their old gardens", "nominative", "ihre alten Gärten"),
    ],
)
def test_noun_phrases_are_inflected(text: str, case: Case, german: str) -> None:
    assert nominal(text).in_german(case) == german


def test_negation_turns_ein_into_kein_and_leaves_the_rest() -> None:
    dog, dogs, mine = nominal("a small dog"), nominal("small dogs"), nominal("my small dog")
    assert dog.in_german("nominative", negated=True) == "kein kleiner Hund"
    assert dogs.in_german("accusative", negated=True) == "keine kleinen Hunde"
    assert mine.in_german("accusative", negated=True) == "meinen kleinen Hund"
