import re

import numpy as np
import pytest
import sacrebleu

from textenvs.task import SPLITS, Example, Transcript, Turn
from textenvs.tasks.translation.grammar import in_german
from textenvs.tasks.translation.sampling import sample_clause
from textenvs.tasks.translation.task import NUM_SENTENCES, Translation
from textenvs.tasks.translation.words import ADJECTIVES, MODALS, NOUNS, TIMES, VERBS


def all_examples() -> list[Example]:
    return [example for split in SPLITS for example in Translation().examples(split)]


def test_the_splits_hold_5000_different_sentences() -> None:
    assert [len(Translation().examples(split)) for split in SPLITS] == [4000, 500, 500]
    examples = all_examples()
    assert len({example.prompt for example in examples}) == NUM_SENTENCES == 5000
    assert all(len(example.references) == 1 for example in examples)


def test_the_examples_cover_the_whole_grammar() -> None:
    german = "\n".join(example.references[0] for example in all_examples())
    words = set(re.findall(r"\w+", german))
    entries: list[tuple[str, ...]] = [noun.german for noun in NOUNS.values()]
    entries += [(verb.german[0][:-1], *verb.german) for verb in VERBS.values()]
    entries += [modal.german for modal in MODALS.values()]
    missing = [forms for forms in entries if not words & set(forms)]
    assert not missing
    for pattern in (
        r"^Heute \w+ der ",
        r", weil .* will\.$",
        r" nicht ",
        r" keinen ",
        r" im ",
        r" ins ",
    ):
        assert re.search(pattern, german, re.MULTILINE), pattern


def test_finite_verbs_stand_second_and_in_subordinate_clauses_last() -> None:
    infinitives = {verb.german[0] for verb in VERBS.values()}
    modals = {form for modal in MODALS.values() for form in modal.german}
    finite = {form for verb in VERBS.values() for form in (*verb.german, verb.german[0][:-1])}
    fronted = subordinate = 0
    for example in all_examples():
        (german,) = example.references
        if match := re.match(rf"({'|'.join(TIMES.values())}) (\w+)", german, re.IGNORECASE):
            fronted += 1
            assert match[2] in finite | modals, german
        if match := re.search(r", weil .*?(\w+) (\w+)\.$", german):
            subordinate += 1
            assert match[2] in finite | modals, german
            assert (match[2] in modals) == (match[1] in infinitives), german
    assert fronted > 500 and subordinate > 500


def test_the_sentences_avoid_listed_mistakes() -> None:
    for example in all_examples():
        (german,) = example.references
        words = set(re.findall(r"\w+", german))
        assert not words & set(ADJECTIVES.values()), german  # an adjective without its ending
        assert not re.search(r"\bin (dem|das)\b", german), german  # im, ins
        for part in german.lower().split(","):
            assert not re.search(r"\bein(e|en|em|er)?\b.*\bnicht\b", part), german  # kein
            assert not re.search(r"\b(ich|wir)\b.*\b(mich|mir|uns)\b", part), german
            assert not re.search(r"\bdu\b.*\b(dich|dir)\b", part), german
        assert re.fullmatch(r"[A-ZÄÖÜ][^.]*\.", german) and "  " not in german


def test_sentences_depend_on_the_generator_alone() -> None:
    first = [in_german(sample_clause(np.random.default_rng(i))) for i in range(20)]
    assert first == [in_german(sample_clause(np.random.default_rng(i))) for i in range(20)]
    assert len(set(first)) == 20


def make_transcript(response: str, *references: str) -> Transcript:
    example = Example("Today the dog sees a cat.", references)
    return Transcript(example, (Turn("user", example.prompt), Turn("agent", response)))


def test_the_reward_is_sacrebleus_sentence_chrf() -> None:
    references = ("Heute sieht der Hund eine Katze.", "Der Hund sieht heute eine Katze.")
    responses = (references[1], "Heute sieht die Hund ein Katze.", "Katze", "")
    scores = Translation().score([make_transcript(text, *references) for text in responses])
    expected = [sacrebleu.sentence_chrf(text, references).score / 100 for text in responses]
    assert scores == pytest.approx(expected)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 1.0 and scores[3] == 0.0


def test_success_is_an_exact_match_of_any_reference() -> None:
    task = Translation()
    assert task.is_success(make_transcript("Nein.", "Ja.", "Nein."))
    assert not task.is_success(make_transcript("nein.", "Ja.", "Nein."))
    assert not task.is_success(make_transcript("", "Ja."))


def test_the_prompt_asks_for_german_and_the_reference_is_best() -> None:
    task = Translation()
    example = task.examples("test")[0]
    assert task.prompt(example) == f"English: {example.prompt}\nGerman:"
    turns = (Turn("user", example.prompt),)
    assert task.best_response(example, turns) == example.references[0]
    assert task.demonstrate(example, turns, np.random.default_rng(0)) == example.references[0]
    best = Transcript(example, (*turns, Turn("agent", example.references[0])))
    assert task.score([best]) == [task.best_return]


def test_errors_name_what_is_missing() -> None:
    with pytest.raises(ValueError, match="'dev'"):
        Translation().examples("dev")
    with pytest.raises(ValueError, match=r"'Today the dog sees a cat\.' has none"):
        Translation().score([make_transcript("Heute")])
