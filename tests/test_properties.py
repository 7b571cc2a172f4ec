"""What must hold of any text, data and options; hypothesis looks for a case in which it does not.

Each property is tried on 1,000 cases, always the same ones; PROPERTY_CASES=10000 tries more.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch as th
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from agents import RunSpec
from agents.policies.sampling import Sampling, TokenDistribution
from tests.textenvs.toys import Chat, finished
from textenvs import Example, RepetitionPenalty, Task, split_examples
from textenvs.data.sources import load_examples
from textenvs.envs.env import TextEnv
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.rewards import metrics
from textenvs.rewards.words import words
from textenvs.task import SPLITS
from textenvs.tasks.translation.recognition import is_german
from textenvs.text.codec import TextCodec

pytestmark = pytest.mark.filterwarnings("ignore:.*Only")
CASES = settings(
    max_examples=int(os.environ.get("PROPERTY_CASES", "1000")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)

# Letters, marks and digits of many scripts, white space and punctuation, and whatever else is text.
ALPHABET = "ab É\u0301ßö\u0416你好ก็กि한글א\u0661\u0662 \t\n.,'\"-<|>👍\u200d\u2028"
TEXTS = st.one_of(st.text(ALPHABET, max_size=20), st.text(max_size=12))
# Texts that a comparison is about: short, with much in common.
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "好", "汤", "mé", "!", "42"]), max_size=6)
PHRASES = st.one_of(WORDS.map(" ".join), TEXTS).map(str.strip)


@pytest.fixture(scope="module")
def codecs(hf_tokenizer: Any) -> list[TextCodec]:
    return [TextCodec(), TextCodec(hf_tokenizer), TextCodec(convention="encoder")]


# Codec -------------------------------------------------------------------------------------------


@CASES
@given(text=TEXTS, prompt=st.sampled_from(["", "Say:", "Say:\n", "好"]), number=st.integers(0, 2))
def test_a_byte_level_codec_gives_back_any_text(
    codecs: list[TextCodec], text: str, prompt: str, number: int
) -> None:
    codec = codecs[number]
    ids = codec.encode_response(text, prompt)
    assert ids.dtype == np.int64 and ids[-1] == codec.eos_token_id
    assert (ids >= 0).all() and (ids < codec.vocabulary_size).all()
    assert codec.decode_response(ids) == codec.decode_response(ids[:-1]) == text.strip()


@CASES
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), number=st.integers(0, 2))
def test_prompts_are_encoded_alike_alone_and_together(
    codecs: list[TextCodec], texts: list[str], number: int
) -> None:
    codec = codecs[number]
    together = codec.encode_prompts(texts)
    for text, ids in zip(texts, together, strict=True):
        assert len(ids) and (ids < codec.vocabulary_size).all()
        assert np.array_equal(ids, codec.encode_prompts([text])[0])


# Metrics -----------------------------------------------------------------------------------------

COMPARING = [metrics.bleu, metrics.chrf, metrics.rouge_l, metrics.exact_match]


@CASES
@given(response=PHRASES, reference=PHRASES, other=PHRASES, metric=st.sampled_from(COMPARING))
def test_metrics(response: str, reference: str, other: str, metric: Any) -> None:
    def score(text: str, *references: str) -> float:
        (value,) = metric([finished(text, references=references)])
        return float(value)

    assert score(response, response) == score(response, other, response) == 1.0
    one = score(response, reference)
    assert 0.0 <= one <= 1.0
    if metric in (metrics.rouge_l, metrics.exact_match):
        assert one == pytest.approx(score(reference, response))
    if metric is not metrics.bleu:  # whose brevity depends on all references
        assert score(response, reference, other) >= one - 1e-9
    assert (metrics.exact_match([finished(response, references=(reference,))]) == [1.0]) == (
        response == reference
    )


@CASES
@given(text=TEXTS)
def test_words(text: str) -> None:
    found = words(text)
    assert words(" ".join(found)) == found
    if text.isascii():
        from rouge_score.tokenize import tokenize

        assert found == tokenize(text, None)
    (penalty,) = RepetitionPenalty(n=2).score([finished(text.strip())])
    assert -1.0 < penalty <= 0.0


@CASES
@given(text=st.one_of(TEXTS, st.text("DieHundschläft, .", max_size=30)))
def test_any_text_is_german_or_not(text: str) -> None:
    assert is_german(text) in (True, False)


# Data --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


CELLS = st.text(max_size=6)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": CELLS,
            "references": st.lists(CELLS, max_size=3),
            "level": st.one_of(st.none(), st.integers(-5, 5)),
        }
    ),
    min_size=1,
    max_size=5,
)
Rows = list[dict[str, Any]]


def as_parquet(rows: Rows, folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, ROW_SCHEMA), folder / "d.parquet")
    return folder / "d.parquet"


def as_jsonl(rows: Rows, folder: Path, ascii_only: bool = True) -> Path:
    lines = (json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    (folder / "d.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    return folder / "d.jsonl"


def as_json(rows: Rows, folder: Path) -> Path:
    (folder / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "d.json"


ROW_SCHEMA = pyarrow.schema(
    [
        ("prompt", pyarrow.string()),
        ("references", pyarrow.list_(pyarrow.string())),
        ("level", pyarrow.int64()),
    ]
)
CONTAINERS: dict[str, Callable[[Rows, Path], Any]] = {
    "list": lambda rows, folder: rows,
    "jsonl": as_jsonl,
    "jsonl of unicode": lambda rows, folder: as_jsonl(rows, folder, ascii_only=False),
    "json": as_json,
    "json by split": lambda rows, folder: {"train": as_json(rows, folder)},
    "parquet": as_parquet,
    "folder": lambda rows, folder: as_parquet(rows, folder).parent,
    "arrow": lambda rows, folder: pyarrow.Table.from_pylist(rows, ROW_SCHEMA),
    "DataFrame": lambda rows, folder: pandas.DataFrame(rows),
    "Dataset": lambda rows, folder: datasets.Dataset(pyarrow.Table.from_pylist(rows, ROW_SCHEMA)),
}


class Levels(Task):
    fields = {"prompt": "prompt", "references": "references", "level": "level"}  # noqa: RUF012


@CASES
@given(rows=ROWS, container=st.sampled_from(sorted(CONTAINERS)))
def test_any_container_gives_the_same_examples(folder: Path, rows: Rows, container: str) -> None:
    expected = tuple(
        Example(
            row["prompt"],
            tuple(row["references"]),
            {} if row["level"] is None else {"level": row["level"]},
        )
        for row in rows
    )
    source = CONTAINERS[container](rows, folder)
    assert load_examples(Levels(), source) == expected
    shuffled = load_examples(Levels(), source, split="shuffled(train)")
    assert sorted(map(repr, shuffled)) == sorted(map(repr, expected))


@CASES
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), tabs=st.booleans())
def test_tables_of_text_give_what_is_in_them(
    folder: Path, rows: list[tuple[str, str]], tabs: bool
) -> None:
    path = folder / ("d.tsv" if tabs else "d.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if tabs else ",").writerows(
            [("prompt", "references"), *rows]
        )
    empty = [number for number, (prompt, _) in enumerate(rows, 2) if not prompt]
    if empty:
        with pytest.raises(ValueError, match=f"row {empty[0]}: the prompt"):
            load_examples(Task(), path)
    else:
        expected = tuple(Example(p, (r,) if r else ()) for p, r in rows)
        assert load_examples(Task(), path) == expected


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), CELLS, st.binary(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(CELLS, inner, max_size=2)),
    max_leaves=4,
)


@CASES
@given(
    row=st.one_of(VALUES, st.dictionaries(st.sampled_from(["prompt", "references", "x"]), VALUES))
)
def test_any_row_is_an_example_or_a_clear_error(row: Any) -> None:
    try:
        (example,) = load_examples(Task(), [row])
    except (TypeError, ValueError) as error:
        assert str(error).startswith("list, row 1: ")
    else:
        assert example.prompt == row["prompt"]
        assert all(isinstance(text, str) for text in example.references)


@CASES
@given(count=st.integers(2, 50), seed=st.integers(0, 2**32), percent=st.integers(0, 100))
def test_splits_are_disjoint_complete_and_seeded(count: int, seed: int, percent: int) -> None:
    examples = [Example(f"{n}") for n in range(count)]
    own = [split_examples(examples, split, seed) for split in SPLITS]
    halves = [f"[:{percent}%]", f"[{percent}%:]"]
    divided: list[list[tuple[Example, ...]]] = [own]
    for name in ("train", "shuffled(train)"):
        cut = round(count * percent / 100)
        assume(0 < cut < count)
        divided.append([load_examples(Task(), examples, split=name + half) for half in halves])
        assert [len(part) for part in divided[-1]] == [cut, count - cut]
    for parts in divided:
        prompts = [example.prompt for part in parts for example in part]
        assert len(prompts) == count and set(prompts) == {e.prompt for e in examples}
    assert own == [split_examples(tuple(examples), split, seed) for split in SPLITS]


# Environments and policies -----------------------------------------------------------------------

SLOTS = 2


@lru_cache(maxsize=1)
def environments() -> tuple[TextVectorEnv, list[TextEnv]]:
    kwargs: dict[str, Any] = {"max_new_tokens": 3, "observe": "length_penalty"}
    vector = TextVectorEnv(Chat, SLOTS, autoreset_mode="Disabled", **kwargs)
    return vector, [TextEnv(Chat, **kwargs) for _ in range(SLOTS)]


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.lists(st.tuples(*[st.sampled_from([0, 0, 5, 300, 301])] * SLOTS), max_size=5),
)
def test_single_environments_are_the_slots_of_a_vector(
    seed: int, tokens: list[tuple[int, ...]]
) -> None:
    vector, singles = environments()
    batch, _ = vector.reset(seed=seed)
    rows = [env.reset(seed=seed + slot)[0] for slot, env in enumerate(singles)]
    for actions in tokens:
        for slot, row in enumerate(rows):
            assert all(np.array_equal(batch[key][slot], row[key]) for key in row)
        batch, rewards, terminated, _, infos = vector.step(np.array(actions))
        for slot, env in enumerate(singles):
            rows[slot], reward, done, _, info = env.step(actions[slot])
            assert (reward, done) == (rewards[slot], terminated[slot])
            if info:
                assert infos["transcript"][slot] == info["transcript"]
                for name, value in info["observed"].items():
                    assert infos["observed"][name][slot] == value
            if done:
                rows[slot] = env.reset()[0]
        if terminated.any():
            batch, _ = vector.reset(options={"reset_mask": terminated})


@CASES
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9),
    allowed=st.integers(1, 2**9 - 1),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1),
    point=st.floats(0, 1, exclude_max=True),
)
def test_sampling(
    logits: list[float], allowed: int, temperature: float, top_k: int, top_p: float, point: float
) -> None:
    mask = th.tensor([bool(allowed >> i & 1) for i in range(len(logits))])
    assume(mask.any())
    row = th.tensor([logits])
    sampling = Sampling(temperature, top_k, top_p)
    log_probs = sampling.log_probs(row, mask)
    probs = log_probs.exp()[0]
    assert probs.sum() == pytest.approx(1, abs=1e-5)
    assert not probs[~mask].any()
    kept = th.isfinite(log_probs[0])
    plain = th.softmax(row[0].masked_fill(~mask, -th.inf) / temperature, dim=-1)
    if top_k:  # of tokens that are equally likely, all stay
        assert (plain > plain[kept].min()).sum() < top_k
    if top_k == 0:
        assert plain[kept].sum() >= top_p - 1e-4
    assert plain[kept].max() == plain.max()
    distribution = TokenDistribution(log_probs)
    token = int(distribution.at(th.tensor([[point]])))
    assert kept[token] and math.isfinite(float(distribution.log_prob(th.tensor([token]))))
    # What was sampled stays possible, whatever the logits have become.
    moved = sampling.log_probs(-row, mask, keep=th.tensor([token]))
    assert math.isfinite(float(moved[0, token]))


# Runs --------------------------------------------------------------------------------------------

OPTIONS = sorted(RunSpec("TextGen-v0").to_config().keys() - {"env"})
HINTS = get_type_hints(RunSpec)
OWN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.one_of(st.integers(-3, 3), st.integers(0, 2**20)),
    float: st.one_of(st.floats(), st.floats(0, 1)),
    str: CELLS,
    type(None): st.none(),
    tuple: st.lists(CELLS, max_size=2).map(tuple),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option's type; of one that is one of a few, also others."""
    if hint in OWN:
        return OWN[hint]
    if get_origin(hint) is Literal:
        return st.one_of(st.sampled_from(get_args(hint)), CELLS)
    if get_origin(hint) is tuple:
        return OWN[tuple]
    return st.one_of(*map(values_of, get_args(hint)))


@CASES
@given(data=st.data(), names=st.sets(st.sampled_from(OPTIONS), min_size=1, max_size=3))
def test_a_run_is_specified_or_refused(data: st.DataObject, names: set[str]) -> None:
    """Of an option's own type: a valid specification that goes through JSON, or a ValueError."""
    own = {name: data.draw(values_of(HINTS[name]), label=name) for name in sorted(names)}
    try:
        spec = RunSpec("TextGen-v0", **own)
    except ValueError as error:
        assert str(error)
        return
    saved = json.dumps(spec.to_config())
    assert json.dumps(RunSpec.from_config(json.loads(saved)).to_config()) == saved
