"""Each kind of model computes by its fast ways what it computes by the plain one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th

from agents.models import probes
from agents.models.causal import CausalBackbone
from agents.models.layout import SequenceBatch, Turn, sequences_of
from agents.models.probes import realistic_weights
from tests.agents.architectures import ARCHITECTURES, HEADS, LENGTH, VOCAB, made
from tests.agents.capabilities import DOCS, TESTED, row_of, takes_an_adapter

ROWS, STEPS, RESPONSE = 4, 18, 10
# What may be drawn: config classes give some of the first ids a role.
LEAST = 3


class Episode(NamedTuple):
    """Prompts and responses of an episode's turns, and the actions' log-probabilities."""

    turns: list[tuple[Any, Any]]
    log_probs: list[float]


def build(name: str) -> CausalBackbone:
    with th.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        th.manual_seed(0)
        return CausalBackbone(ARCHITECTURES[name](), VOCAB, LENGTH)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_way_to_compute_a_model_gives_the_same(name: str) -> None:
    backbone = build(name)
    # That nothing is missed for being tiny; gradients are wanted inside.
    with realistic_weights(backbone.model), th.enable_grad():
        episodes, error = play(backbone)
        assert error < (1e-5 if name != "Zamba 2 (hybrid)" else 1e-4)
        sequences = [
            seq for episode in episodes for seq in sequences_of(backbone.layout, episode.turns)
        ]
        assert any(len(sequence) > 1 for sequence in sequences)  # of several turns
        old = th.tensor([value for episode in episodes for value in episode.log_probs])
        together, gradients = learn(backbone, [sequences])
        one_by_one, plain = learn(backbone, [[sequence] for sequence in sequences])
        assert ((together - old).exp() - 1).abs().max() < 1e-5
        assert ((together - one_by_one).exp() - 1).abs().max() < 1e-5
        scale = max(float(gradient.abs().max()) for gradient in plain)
        for actual, expected in zip(gradients, plain, strict=True):
            assert (actual - expected).abs().max() < 1e-5 * scale
        tokens = th.tensor(backbone.layout.row(sequences[0]).tokens)[None].long()
        with th.no_grad():
            hidden = backbone.trunk(input_ids=tokens, use_cache=False)[0]
            whole = backbone.model(input_ids=tokens, use_cache=False).logits[0]
        th.testing.assert_close(backbone.logits(hidden), whole)
    if TESTED:  # other versions can do less
        assert documented(name, backbone) in DOCS.read_text()


@pytest.mark.parametrize("name", ["Mamba", "Granite 4 (hybrid)", "Llama, SmolLM"])
def test_prompts_that_rows_share_are_read_in_parts(name: str) -> None:
    """States are those of rows without padding, also where copies are left out of a forward."""
    backbone = build(name)
    backbone.prefill_tokens = 16
    random = np.random.default_rng(0)
    some = [random.integers(LEAST, VOCAB, length) for length in (8, 7, 3, 2, 5)]
    observation = observe([*some, *some], [[] for _ in range(10)])
    with realistic_weights(backbone.model):
        hidden, plain = backbone.next_hidden(observation), backbone.last_hidden(observation)
    assert (hidden - plain).abs().max() < 1e-5 * plain.abs().max()


LENGTHS: dict[str, Any] = {
    "GPT-Neo (window)": {"window_size": 16},
    "Llama 4 (chunks)": {"attn_temperature_tuning": True, "floor_scale": 16},
}


@pytest.mark.parametrize("name", list(LENGTHS))
def test_what_cannot_be_tried_is_trusted_up_to_its_length(name: str) -> None:
    def make(length: int) -> CausalBackbone:
        config = ARCHITECTURES[name]()
        config.update(LENGTHS[name])
        return CausalBackbone(config, VOCAB, length)

    assert make(16).capabilities.caches is None and make(16).longest_prompt(10) == 6
    with pytest.warns(UserWarning, match="beyond 16 tokens it attends in another way"):
        longer = make(17)
    assert longer.capabilities.caches and longer.longest_prompt(10) > 100


def test_a_window_that_no_layer_has_is_none() -> None:
    local = made("olmo3", **HEADS, sliding_window=5, layer_types=["full_attention"] * 2)
    neo = ARCHITECTURES["GPT-Neo (window)"]()
    neo.attention_layers = ["global", "global"]
    for config in (local, neo):
        backbone = CausalBackbone(config, VOCAB, LENGTH)
        assert backbone.capabilities.caches is None and backbone.longest > LENGTH


def test_tokens_that_share_an_embedding_tell_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probes, "_TRIED", {})
    model = build("RoBERTa as a decoder").model
    with th.no_grad():
        embeddings: Any = model.get_input_embeddings()
        embeddings.weight[:9] = 0.1
    model.save_pretrained(tmp_path)
    assert probes.two_tokens(model).tolist() == [0, 9]
    assert probes.two_tokens(model, [0, 9]).tolist() == [1, 10]
    with pytest.warns(UserWarning, match="cannot go on from the keys"):
        CausalBackbone(str(tmp_path), VOCAB, LENGTH)


@pytest.mark.parametrize("name", ["Zamba 2 (hybrid)", "Llama, SmolLM", "Jamba"])
def test_checkpointed_layers_have_the_gradients_of_others(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        with th.random.fork_rng():
            th.manual_seed(0)
            config = ARCHITECTURES[name]()
            backbone = CausalBackbone(config, VOCAB, LENGTH, gradient_checkpointing=checkpointed)
        random = np.random.default_rng(0)
        drawn: Any = random.integers(LEAST, VOCAB, (2, 2, 6))
        turns = [[Turn(prompt, actions)] for prompt, actions in drawn]
        with realistic_weights(backbone.model), th.enable_grad():
            gradients.append(learn(backbone, [turns])[1])
    scale = max(float(gradient.abs().max()) for gradient in gradients[0])
    for plain, twice in zip(*gradients, strict=True):
        assert (plain - twice).abs().max() < 1e-6 * scale


# Other versions cache recurrent layers otherwise, or not at all.
@pytest.mark.parametrize("name", [*(["Mamba"] if TESTED else []), "BLOOM (ALiBi)"])
def test_what_cannot_be_compiled_runs_as_it_is(name: str) -> None:
    with pytest.warns(UserWarning, match="are not compiled: it"):
        backbone = CausalBackbone(ARCHITECTURES[name](), VOCAB, LENGTH, compiled=True)
    assert not backbone.compiled


def play(backbone: CausalBackbone) -> tuple[list[Episode], float]:
    """Play ragged rows: some begin another episode in the middle, some go on with another turn.

    Returns:
        The episodes that ended, and how far cached hidden states were from computed ones.
    """
    random = np.random.default_rng(0)
    prompts = [random.integers(LEAST, VOCAB, random.integers(1, 9)) for _ in range(ROWS)]
    said: list[list[int]] = [[] for _ in range(ROWS)]
    playing, ended = [Episode([], []) for _ in range(ROWS)], []
    worst = 0.0
    for _ in range(STEPS):
        observation = observe(prompts, said)
        with th.no_grad():
            hidden = backbone.next_hidden(observation)
            plain = backbone.last_hidden(observation)
            log_probs = backbone.next_logits(hidden).log_softmax(-1)
        worst = max(worst, float((hidden - plain).abs().max() / plain.abs().max()))
        for i, action in enumerate(random.integers(LEAST, VOCAB, ROWS).tolist()):
            playing[i].log_probs.append(float(log_probs[i, action]))
            said[i].append(action)
            if len(said[i]) < RESPONSE and random.random() > 0.25:
                continue
            playing[i].turns.append((prompts[i], np.array(said[i])))
            user = random.integers(LEAST, VOCAB, random.integers(1, 9))
            if random.random() < 0.5 and len(prompts[i]) + len(said[i]) + 9 <= LENGTH - RESPONSE:
                user = np.concatenate([*playing[i].turns[-1], user])
            else:
                ended.append(playing[i])
                playing[i] = Episode([], [])
            prompts[i], said[i] = user, []
    backbone.clear_cache()
    return ended, worst


def observe(prompts: list[Any], said: list[list[int]]) -> dict[str, Any]:
    """Return what the policy gives to a backbone."""
    observation = {}
    for key, rows, width in (
        ("prompt", prompts, LENGTH - RESPONSE),
        ("response", said, RESPONSE),
    ):
        observation[key] = np.zeros((len(rows), width), dtype=np.int64)
        observation[f"{key}_length"] = np.array([[len(row)] for row in rows])
        for i, row in enumerate(rows):
            observation[key][i, : len(row)] = row
    return observation


def learn(
    backbone: CausalBackbone, parts: list[list[list[Turn]]]
) -> tuple[th.Tensor, list[th.Tensor]]:
    """Return the log-probabilities of sequences' actions, and the gradients of some loss."""
    backbone.zero_grad()

    def log_probs() -> Iterator[th.Tensor]:
        for sequences in parts:
            batch: SequenceBatch = backbone.layout.collate(
                [backbone.layout.row(sequence) for sequence in sequences], 0, "cpu"
            )
            actions = [turn.actions for sequence in sequences for turn in sequence]
            scores = backbone.logits(backbone.hidden_states(batch)).log_softmax(-1)
            yield scores.gather(1, th.tensor(np.concatenate(actions))[:, None])[:, 0]

    values = th.cat(list(log_probs()))
    (values * th.linspace(-1, 1, len(values))).sum().backward()
    return values.detach(), [
        th.zeros_like(p) if p.grad is None else p.grad.clone() for p in backbone.parameters()
    ]


def documented(name: str, backbone: CausalBackbone) -> str:
    """Return a model's row in the table of the docs."""
    tokens = th.arange(LEAST, LEAST + 6)[None]

    def forward() -> th.Tensor:
        return backbone.trunk(input_ids=tokens, use_cache=False)[0]

    return row_of(name, backbone.capabilities, takes_an_adapter(backbone.model, forward))


def table() -> str:
    """Return the table of the docs: python -c 'from ... import table; print(table())'."""
    head = ["architecture", "cached", "packed", "prefixes shared", "compiled", "LoRA", "why not"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join([*lines, *(documented(name, build(name)) for name in ARCHITECTURES)])
