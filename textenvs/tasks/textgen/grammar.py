"""A small grammar of short reviews: an opening and what a good, bad or so-so review says next."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np

Mood = Literal["good", "bad", "mixed", "plain"]


@dataclass(frozen=True)
class Domain:
    """What reviews are about, as patterns: "{a|b} c" stands for "a c" and "b c".

    Args:
        opening: The subject of the review, which is the prompt.
        good, bad, plain: What can be said of the subject.
        good_end, bad_end, plain_end: Sentences that can be added to it.
    """

    opening: str
    good: tuple[str, ...]
    bad: tuple[str, ...]
    plain: tuple[str, ...]
    good_end: tuple[str, ...]
    bad_end: tuple[str, ...]
    plain_end: tuple[str, ...]


GOOD_END = (
    "I would {gladly|happily} recommend it to {anyone|my friends}",
    "it was worth {the money|every penny}",
)
BAD_END = (
    "it was a {complete|terrible|sad} waste of {time|money}",
    "I {cannot|would never} recommend it to anyone",
)
DOMAINS = (
    Domain(
        opening="{The|My} {soup|curry|pasta|pizza|stew|pie|fish|chicken|burger|steak} at the "
        "{corner|old|new|little} {cafe|diner|bistro|restaurant} {last night|on Sunday}",
        good=(
            "was {fresh|warm|rich} and full of {flavour|good things}",
            "was {delicious|perfect|excellent} from the first bite",
            "tasted {wonderful|great|amazing} and looked {lovely|beautiful}",
        ),
        bad=(
            "{arrived|came} cold and tasted {awful|terrible|horrible}",
            "was {salty|oily|greasy} and {really|simply} disgusting",
            "made {me|both of us} {sick|ill} for {a day|two days}",
        ),
        plain=(
            "came with {bread|rice} and a {glass|jug} of water",
            "took {ten|twenty} minutes to arrive",
        ),
        good_end=(
            "the {waiter|cook} was {friendly|kind|lovely}",
            "we {enjoyed|loved} every bite",
            "I would {gladly|happily} order it again",
        ),
        bad_end=(
            "the {waiter|cook} was {rude|careless|unfriendly}",
            "we left hungry and {angry|upset|disappointed}",
            "the kitchen looked {dirty|horrible}",
        ),
        plain_end=("we ate it {outside|by the window}", "we paid {in cash|at the counter}"),
    ),
    Domain(
        opening="{My|Our} {room|suite|double room|corner room} at the {old|small|new|white} "
        "{hotel|inn|hostel|lodge} {by the sea|near the station|in the old town|on the hill}",
        good=(
            "was {clean|bright|fresh} and {very|really} comfortable",
            "had a {beautiful|lovely|wonderful} view and a {comfortable|perfect} bed",
            "felt {safe|peaceful} and {looked|smelled} {great|lovely}",
        ),
        bad=(
            "was {dirty|noisy|damp} and smelled {awful|horrible|terrible}",
            "had a broken {lamp|window|shower} and {dirty|ugly} curtains",
            "was {cold|dark|tiny} and {very|really} depressing",
        ),
        plain=(
            "had a {desk|table}, a {lamp|mirror} and two chairs",
            "was on the {second|third} floor next to the {stairs|lift}",
        ),
        good_end=(
            "the staff were {friendly|helpful|wonderful}",
            "breakfast was {great|excellent|delicious}",
            "we slept well and felt {welcome|relaxed}",
        ),
        bad_end=(
            "the staff were {rude|lazy|unfriendly}",
            "breakfast was {awful|terrible|disgusting}",
            "the noise {ruined our sleep|made us angry}",
        ),
        plain_end=(
            "breakfast started at {seven|eight}",
            "we checked out {at noon|on Monday}",
        ),
    ),
    Domain(
        opening="The {first|second|third|last} {season|episode} of {this|that} "
        "{hospital|school|space|family|history|travel} {show|series|drama} from {Spain|Norway}",
        good=(
            "was {funny|clever|brilliant} and {really|very} {exciting|entertaining}",
            "had a {brilliant|clever|wonderful} story and {great|superb} actors",
            "made {me|us} {laugh|smile} from start to finish",
        ),
        bad=(
            "was {boring|dull|stupid} and {far|much} too long",
            "had a {weak|stupid|ridiculous} story and {awful|terrible} actors",
            "made {me|us} {angry|sad} from start to finish",
        ),
        plain=(
            "was filmed in a small {town|village} by {a lake|the sea}",
            "followed a {teacher|doctor|pilot} and her two {sons|brothers}",
        ),
        good_end=(
            "I {loved|enjoyed} every minute of it",
            "the music was {beautiful|lovely|amazing}",
            "the ending was {perfect|a lovely surprise}",
        ),
        bad_end=(
            "I {hated|regretted} every minute of it",
            "the music was {horrible|annoying|awful}",
            "the ending was {a disaster|a bad joke}",
        ),
        plain_end=("we watched it {on Friday|at home}", "there is more to come in {spring|May}"),
    ),
    Domain(
        opening="The {new|small} {phone|camera|speaker|laptop|tablet|printer|radio|kettle|lamp} "
        "{I|we|my sister|my father} {bought|ordered} {online|in town|in March|last week}",
        good=(
            "works {perfectly|well} and looks {great|beautiful|elegant}",
            "is {easy|fun} to {use|set up} and {really|very} {good|useful}",
            "has {excellent|superb|fantastic} quality for {the|its} price",
        ),
        bad=(
            "broke after {two|three} days and is {useless|worthless} now",
            "is {heavy|ugly} and {really|very} {bad|annoying}",
            "came with a {broken|damaged} switch and a {horrible|terrible} smell",
        ),
        plain=(
            "came in a {brown|white} box with a {short|long} guide",
            "has {one button|two buttons} on the {left|right|back}",
        ),
        good_end=(
            "I am {very|really} {happy|pleased} with it",
            "{my family|everyone here} loves it",
            "the people at the shop were {helpful|friendly|great}",
        ),
        bad_end=(
            "I am {very|really} {unhappy|disappointed} with it",
            "{my family|everyone here} hates it",
            "the people at the shop were {rude|useless|terrible}",
        ),
        plain_end=("it is in the {kitchen|office} now", "we use it {once|twice} a week"),
    ),
    Domain(
        opening="{The|This} {book|story|paperback} about {a young|an old} {sailor|doctor|painter|"
        "farmer|teacher|pilot|baker} {and his brother|in a small town|on an island|from the north}",
        good=(
            "is {beautiful|clever|funny} and a {joy|delight|pleasure} to read",
            "has a {brilliant|clever|wonderful} plot and {charming|lovely} people",
            "was {charming|inspiring|exciting} from the {first|very first} page",
        ),
        bad=(
            "is {boring|confusing|dull} and {a pain|torture} to read",
            "has a {weak|stupid|ridiculous} plot and {horrible|boring} people",
            "was {annoying|terrible|depressing} from the {first|very first} page",
        ),
        plain=(
            "has {two|three} hundred pages and {ten|twelve} chapters",
            "begins in {winter|autumn} and ends in {spring|summer}",
        ),
        good_end=(
            "I {loved|enjoyed} every page of it",
            "the ending made me {smile|happy}",
            "it is a {perfect|wonderful|lovely} gift",
        ),
        bad_end=(
            "I {hated|regretted} every page of it",
            "the ending made me {cry|angry}",
            "it is an {awful|ugly|insulting} mess",
        ),
        plain_end=("I read it {on the train|in two weeks}", "it is part of a {long|short} series"),
    ),
    Domain(
        opening="{My|Our|The} {bus|train|day|weekend|group|family} trip to the {lake|coast|castle|"
        "mountains|old town|national park} {in May|in June|in October|last spring|last autumn}",
        good=(
            "was {great|wonderful|fun} and {very|really} well planned",
            "was a {joy|pleasure|delight} from start to finish",
            "gave us {beautiful|amazing|lovely} views and {great|perfect} weather",
        ),
        bad=(
            "was {boring|tiring|stressful} and {very|really} badly planned",
            "was a {disaster|failure|mess} from start to finish",
            "gave us {ugly|boring} views and {awful|terrible|horrible} weather",
        ),
        plain=(
            "started at {nine|ten} in the {morning|evening}",
            "took {three|four} hours {in all|each way}",
        ),
        good_end=(
            "the guide was {friendly|funny|helpful}",
            "the children {loved|enjoyed} it",
            "we came home {happy|relaxed|in good spirits}",
        ),
        bad_end=(
            "the guide was {rude|lazy|careless}",
            "the children {hated it|cried all day}",
            "we came home {angry|miserable|upset}",
        ),
        plain_end=("we were back {at six|by midnight}", "{most|some} of us took {photos|notes}"),
    ),
)


@cache
def expand(*patterns: str) -> tuple[str, ...]:
    """Return every text that the patterns stand for."""
    return tuple(
        "".join(choice)
        for pattern in patterns
        for choice in product(*(part.split("|") for part in re.split(r"[{}]", pattern)))
    )


def ends(domain: Domain) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the good and the bad sentences that can be added, as patterns."""
    return (*domain.good_end, *GOOD_END), (*domain.bad_end, *BAD_END)


def continuation(domain: Domain, mood: Mood, rng: np.random.Generator) -> str:
    """Return a sentence that continues any of the domain's openings in the given mood."""

    def pick(*patterns: str) -> str:
        texts = expand(*patterns)
        return texts[rng.integers(len(texts))]

    good_end, bad_end = ends(domain)
    if mood == "good":
        return f"{pick(*domain.good)}, and {pick(*good_end)}."
    if mood == "bad":
        return f"{pick(*domain.bad)}, and {pick(*bad_end)}."
    if mood == "plain":
        return f"{pick(*domain.plain)}, and {pick(*domain.plain_end)}."
    if rng.random() < 0.5:
        return f"{pick(*domain.good)}, but {pick(*bad_end)}."
    return f"{pick(*domain.bad)}, but {pick(*good_end)}."


def continues(domain: Domain, text: str) -> bool:
    """Return whether `continuation` may return a text, in any mood."""
    return _continuations(domain).fullmatch(text) is not None


@cache
def _continuations(domain: Domain) -> re.Pattern[str]:
    def one_of(patterns: tuple[str, ...]) -> str:
        return "(?:" + "|".join(patterns).replace("{", "(?:").replace("}", ")") + ")"

    good_end, bad_end = map(one_of, ends(domain))
    good, bad, plain = map(one_of, (domain.good, domain.bad, domain.plain))
    sentences = (
        f"{good}(?:, and {good_end}|, but {bad_end})",
        f"{bad}(?:, and {bad_end}|, but {good_end})",
        f"{plain}, and {one_of(domain.plain_end)}",
    )
    return re.compile(f"(?:{'|'.join(sentences)})\\.")
