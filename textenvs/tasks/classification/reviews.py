"""A grammar of short reviews whose verdict does not show in the words it is made of.

An evaluation is a word of praise or blame, affirmed or negated, so either word can say either
thing. A review's label is its verdict; evaluations of single aspects are independent of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Option = TypeVar("_Option")


@dataclass(frozen=True)
class Aspect:
    """Something that a review mentions, its verb, and the adjectives that blame or praise it."""

    subject: str
    verb: str
    negative: tuple[str, ...]
    positive: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """What a review is about: opening sentences and aspects."""

    openings: tuple[str, ...]
    aspects: tuple[Aspect, ...]


TOPICS = (
    Topic(
        ("We stayed at the hotel for two nights.", "I booked the hotel in May."),
        (
            Aspect("the room", "was", ("dirty", "ugly"), ("clean", "beautiful")),
            Aspect("the staff", "were", ("rude", "slow"), ("friendly", "helpful")),
            Aspect("the breakfast", "was", ("stale", "bland"), ("fresh", "tasty")),
            Aspect("the beds", "were", ("hard", "narrow"), ("comfortable", "soft")),
        ),
    ),
    Topic(
        ("We watched the film on Sunday.", "I saw the film last week."),
        (
            Aspect("the plot", "was", ("silly", "dull"), ("clever", "exciting")),
            Aspect("the actors", "were", ("weak", "wooden"), ("brilliant", "convincing")),
            Aspect("the music", "was", ("loud", "ugly"), ("lovely", "fitting")),
            Aspect("the ending", "was", ("flat", "predictable"), ("moving", "surprising")),
        ),
    ),
    Topic(
        ("I read the book on the train.", "I finished the book in a week."),
        (
            Aspect("the story", "was", ("confusing", "slow"), ("gripping", "touching")),
            Aspect("the characters", "were", ("shallow", "dull"), ("believable", "funny")),
            Aspect("the style", "was", ("clumsy", "dry"), ("elegant", "clear")),
            Aspect("the jokes", "were", ("stale", "silly"), ("witty", "clever")),
        ),
    ),
    Topic(
        ("We had dinner at the restaurant.", "I went to the restaurant with friends."),
        (
            Aspect("the food", "was", ("cold", "bland"), ("tasty", "fresh")),
            Aspect("the waiters", "were", ("rude", "slow"), ("polite", "quick")),
            Aspect("the drinks", "were", ("watery", "overpriced"), ("cheap", "refreshing")),
            Aspect("the place", "was", ("noisy", "dirty"), ("cosy", "clean")),
        ),
    ),
    Topic(
        ("I bought the phone in March.", "I used the phone for a month."),
        (
            Aspect("the screen", "was", ("dim", "tiny"), ("bright", "sharp")),
            Aspect("the battery", "was", ("weak", "useless"), ("strong", "reliable")),
            Aspect("the camera", "was", ("blurry", "slow"), ("excellent", "quick")),
            Aspect("the buttons", "were", ("flimsy", "stiff"), ("handy", "sturdy")),
        ),
    ),
)
VERDICTS = (
    ("bad", "boring", "disappointing", "unpleasant", "annoying", "frustrating"),
    ("good", "great", "impressive", "pleasant", "enjoyable", "satisfying"),
)
LEADS = ("overall", "all in all", "in the end")
AFFIRMED = ("it was {}", "it was really {}", "I found it {}", "I would call it {}")
NEGATED = (
    "it was not {}",
    "it was far from {}",
    "it was anything but {}",
    "I never found it {}",
    "I would not call it {}",
    "nobody could call it {}",
)
CONFIRMED = (
    "I expected it to be {}, and it was",
    "a friend had called it {}, and I agree",
    "the critics called it {}, and they were right",
)
CONTRADICTED = (
    "I expected it to be {}, but it was not",
    "a friend had called it {}, but I disagree",
    "the critics called it {}, but they were wrong",
)
NEGATIONS = (" not", " never", " hardly", " far from")


def sample_review(positive: bool, rng: np.random.Generator) -> str:
    """Draw a review of two or three sentences with a positive or a negative verdict."""
    topic = _pick(rng, TOPICS)
    first, second = (topic.aspects[i] for i in rng.permutation(len(topic.aspects))[:2])
    praised = _coin(rng)
    opening = _pick(rng, topic.openings)
    opinion = bool(rng.random() < 0.3)
    verdict = verdict_clause(positive, _coin(rng), opinion, rng)
    if rng.random() < 0.3:
        link = "because" if praised == positive else "although"
        reason = aspect_clause(first, praised, _coin(rng), rng)
        return f"{opening} {_sentence(f'{verdict}, {link} {reason}')}"
    second_praised = _coin(rng)
    link = "and" if praised == second_praised else "but"
    clauses = [
        aspect_clause(first, praised, _coin(rng), rng),
        aspect_clause(second, second_praised, _coin(rng), rng),
    ]
    sentences = [_sentence(f", {link} ".join(clauses)), _sentence(verdict)]
    return " ".join([opening, *sentences] if opinion or _coin(rng) else sentences)


def aspect_clause(aspect: Aspect, positive: bool, negated: bool, rng: np.random.Generator) -> str:
    """Draw a clause that praises or blames an aspect, with or without a negation."""
    adjective = _pick(rng, aspect.positive if positive != negated else aspect.negative)
    negation = _pick(rng, NEGATIONS) if negated else ""
    return f"{aspect.subject} {aspect.verb}{negation} {adjective}"


def verdict_clause(positive: bool, negated: bool, opinion: bool, rng: np.random.Generator) -> str:
    """Draw a clause with the overall verdict.

    Args:
        positive: Whether the verdict is positive.
        negated: Whether it is a negated word of the opposite kind.
        opinion: Whether it confirms or contradicts an opinion, rather than being stated plainly.
        rng: The source of all randomness.
    """
    word = _pick(rng, VERDICTS[positive != negated])
    if opinion:
        return _pick(rng, CONTRADICTED if negated else CONFIRMED).format(word)
    plain = _pick(rng, NEGATED if negated else AFFIRMED).format(word)
    return f"{_pick(rng, LEADS)}, {plain}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    return options[int(rng.integers(len(options)))]
