"""What the grammars produce is well formed, and a text that a word was changed in is not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from textenvs.task import SPLITS, Example, Transcript, Turn
from textenvs.tasks.classification.task import TextClassification
from textenvs.tasks.textgen.grammar import DOMAINS, Mood, continuation, expand
from textenvs.tasks.textgen.task import TextGen
from textenvs.tasks.translation.grammar import in_german
from textenvs.tasks.translation.recognition import is_german
from textenvs.tasks.translation.sampling import sample_clause
from textenvs.tasks.translation.task import Translation
from textenvs.tasks.translation.words import NOUNS, VERBS

TEXTGEN, TRANSLATION = TextGen(), Translation()


def said(example: Example, response: str) -> Transcript:
    return Transcript(example, (Turn("user", example.prompt), Turn("agent", response)))


def mutations(text: str) -> Iterator[tuple[str, str, str]]:
    """Sentences with a word doubled, dropped, or swapped with the next, and that word."""
    words = text[:-1].split(" ")
    for i, word in enumerate(words):
        before, after = words[:i], words[i + 1 :]
        for kind, changed in {
            "doubled": [*before, word, word, *after],
            "dropped": before + after,
            "swapped": [*before, *after[:1], word, *after[1:]],
        }.items():
            joined = " ".join(changed)
            if changed != words and joined:
                yield kind, f"{joined}.", word


def test_every_continuation_of_the_reviews_is_well_formed() -> None:
    for split in SPLITS:
        for example in TEXTGEN.examples(split):
            assert all(TEXTGEN.is_well_formed(said(example, text)) for text in example.references)


def test_the_continuations_are_all_and_only_those_of_the_grammar() -> None:
    """Of each domain and mood, as `continuation` draws them."""
    rng, moods = np.random.default_rng(0), ("good", "bad", "plain", "mixed")
    for number, domain in enumerate(DOMAINS):
        example = Example(expand(domain.opening)[0])
        other = Example(expand(DOMAINS[number - 1].opening)[0])
        for i in range(200):
            mood: Mood = moods[i % 4]  # type: ignore[assignment]
            text = continuation(domain, mood, rng)
            assert TEXTGEN.is_well_formed(said(example, text)), text
            assert not TEXTGEN.is_well_formed(said(other, text)), text


def test_a_changed_word_breaks_a_continuation() -> None:
    for example in TEXTGEN.examples("test")[:40]:
        for text in example.references:
            for kind, changed, word in mutations(text):
                # The one optional word of the grammar: "from the {first|very first} page".
                expected = kind == "dropped" and word == "very" and "the very first" in text
                assert TEXTGEN.is_well_formed(said(example, changed)) == expected, changed


@pytest.mark.parametrize(
    "response",
    [
        "",
        "was fresh and full of flavour.",
        "was fresh and full of flavour, and we enjoyed every bite",
        "was fresh and full of flavour, but we enjoyed every bite.",
        "was fresh and full of flavour, and we left hungry and angry.",
        "Was fresh and full of flavour, and we enjoyed every bite.",
        "was fresh and full of flavour, and we enjoyed every bite. ",
        "was {fresh|warm} and full of flavour, and we enjoyed every bite.",
        "was fresh and full of flavour, and I would happily recommend sea.",
    ],
)
def test_broken_continuations(response: str) -> None:
    soup = Example("The soup at the corner cafe last night")
    assert TEXTGEN.is_well_formed(said(soup, response)) is False
    whole = "was fresh and full of flavour, and we enjoyed every bite."
    assert TEXTGEN.is_well_formed(said(soup, whole)) is True


def test_of_other_examples_nothing_is_said() -> None:
    own = "was fresh and full of flavour, and we enjoyed every bite."
    assert TEXTGEN.is_well_formed(said(Example("name[The Mill], food[Thai]"), own)) is None
    english = Example("My neighbour plays the piano.", ("Mein Nachbar spielt Klavier.",))
    assert TRANSLATION.is_well_formed(said(english, "Der Hund schläft.")) is None
    known = TRANSLATION.examples("test")[0]
    assert TRANSLATION.is_well_formed(said(known, "Der Hund schläft.")) is True


def test_every_reference_of_the_translations_is_well_formed() -> None:
    for split in SPLITS:
        for example in TRANSLATION.examples(split):
            assert is_german(example.references[0]), example.references[0]


def test_fresh_sentences_are_well_formed() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        text = in_german(sample_clause(rng))
        assert is_german(text), text


def needed(word: str) -> bool:
    """Whether a sentence falls apart without a word: nouns, verbs, prepositions."""
    nouns = {form for noun in NOUNS.values() for form in noun.german}
    verbs = {form for verb in VERBS.values() for form in (*verb.german, verb.german[0][:-1])}
    return bool({word, word.lower()} & (nouns | verbs | {"in", "mit", "weil"}))


def test_a_changed_word_breaks_a_german_sentence() -> None:
    """A dropped word may be one that can be missing, and an adjective may stand elsewhere."""
    count = 0
    for example in TRANSLATION.examples("test")[:150]:
        text = example.references[0]
        for kind, changed, word in mutations(text):
            changed = changed[0].upper() + changed[1:]
            count += 1
            if is_german(changed):
                assert kind != "doubled", changed
                assert not needed(word.rstrip(",")), (text, changed)
    assert count > 2000


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "Der Hund schläft",
        "der Hund schläft.",
        "Der Hund schläft .",
        "Der  Hund schläft.",
        "Die Hund schläft.",
        "Der Hund schlafen.",
        "Der Hund schläft die Katze.",
        "Der Hund gibt der Frau einen Ball.",  # dogs do not give
        "Die Frau sieht die Frau.",
        "Ich sehe uns.",
        "Hund schläft.",
        "Der kleiner Hund schläft.",
        "Der kluge Ball schläft.",
        "Der Mann geht.",  # needs a place to go to
        "Der Mann geht in der Schule.",
        "Der Mann geht in das Haus.",
        "Heute der Hund schläft.",
        "Heute hilft der Mann mir.",
        "Der Hund schläft, weil die Katze schläft, weil der Vogel schläft.",
        "Heute schläft der Hund, weil die Katze schläft.",  # either a time or a reason
        "Der Hund schläft, weil die Katze nicht.",
        "Der Hund sieht nicht eine Katze.",
        "Die Katze sieht nicht den Vogel.",
        "Kein Hund schläft.",
        "Der Hund kann schläft.",
    ],
)
def test_what_is_not_german(text: str) -> None:
    assert not is_german(text)


@pytest.mark.parametrize(
    "text",
    [
        "Der Hund schläft.",
        "Heute hilft mir der Mann.",
        "Hunde schlafen.",
        "Der Mann geht ins Haus.",
        "Der Hund sieht keine Katze.",
        "Manchmal sieht die Frau sie.",
        "Oft laufe ich ins Haus.",
        "Das Kind schläft, weil wir ihn nicht sehen.",
        "Jeden Tag will die alte Frau meiner Schwester kein neues Buch zeigen.",
    ],
)
def test_what_is_german(text: str) -> None:
    assert is_german(text)


def test_a_label_is_well_formed() -> None:
    task, example = TextClassification(choices=("bad", "so so", "good")), Example("Fine.")
    texts = ("bad", "so so", "good", "", "so", "goodgood", "Good")
    assert [task.is_well_formed(said(example, t)) for t in texts] == [True] * 3 + [False] * 4
