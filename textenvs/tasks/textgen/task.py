"""Continue the opening of a short review; the more positive the continuation, the better."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from textenvs.data.splits import split_examples
from textenvs.rewards.metrics import sentiment
from textenvs.task import Example, Task, Transcript
from textenvs.tasks.textgen.grammar import DOMAINS, Domain, Mood, continuation, continues, expand


class TextGen(Task):
    """Continue the opening of a short review so that it sounds as positive as possible.

    ## Description
    The prompt is a subject such as "The soup at the corner cafe last night" and the response goes
    on with, say, "was warm and full of flavour, and we loved every bite."

    ## Action Space, Observation Space
    Those of `textenvs.envs.env.TextEnv`. The prompt is the opening as it stands.

    ## Rewards
    The response's compound sentiment in [-1, 1] by VADER (Hutto & Gilbert, 2014;
    `textenvs.rewards.metrics.sentiment`). References are not needed.

    ## Episode End
    With EOS or after 32 tokens.

    ## Success
    A sentiment of at least `success_score`.

    ## Well-formed
    The grammar produces the response after this opening, in any mood. Of other openings than the
    built-in ones nothing is said.

    ## Data
    3,180 openings from a grammar of restaurants, hotels, series, gadgets, books and trips, each
    with four references: good, bad and middling, about a third each on the whole, so that an agent
    that imitates them earns about 0. `best_return` is what each example's best reference reaches on
    the test split; the bound is 1. A user's dataset has the columns `prompt` and, for a warm start
    or for other rewards, `references`.

    ## Version History
    * v0: Initial version.

    Attributes:
        success_score: The least sentiment that counts as clearly positive.
    """

    max_new_tokens = 32
    best_return = 0.87
    success_score: float = 0.5

    def examples(self, split: str) -> Sequence[Example]:
        """Return the built-in reviews of one split."""
        return _examples(split)

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return the sentiment of each response, in [-1, 1]."""
        return sentiment(transcripts)

    def is_well_formed(self, transcript: Transcript) -> bool | None:
        """Return whether the grammar produces the response after this opening; None: after none."""
        domain = _domains().get(transcript.example.prompt)
        return None if domain is None else continues(domain, transcript.response)


@lru_cache(maxsize=1)
def _domains() -> dict[str, Domain]:
    """Return what each opening is about."""
    return {opening: domain for domain in DOMAINS for opening in expand(domain.opening)}


@lru_cache
def _examples(split: str) -> tuple[Example, ...]:
    return split_examples(_all_examples(), split)


@lru_cache(maxsize=1)
def _all_examples() -> tuple[Example, ...]:
    """Return every opening, each with a good, a bad, a middling and one more continuation."""
    rng = np.random.default_rng(0)
    examples = []
    for domain in DOMAINS:
        for opening in expand(domain.opening):
            middling: Mood = "mixed" if rng.random() < 0.5 else "plain"
            moods: list[Mood] = ["good", "bad", middling]
            moods.append(moods[rng.integers(3)])
            references: dict[str, None] = {}
            while len(references) < len(moods):
                references[continuation(domain, moods[len(references)], rng)] = None
            examples.append(Example(opening, tuple(references)))
    return tuple(examples)
