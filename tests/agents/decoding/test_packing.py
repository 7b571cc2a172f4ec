from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from transformers import BloomConfig

from agents.decoding.packing import Group, Packing
from agents.models.causal import CausalBackbone
from agents.models.layout import SequenceBatch
from tests.agents.helpers import VOCAB, gpt2, llama
from tests.agents.models.test_causal import opt

CONFIGS = {"gpt2": gpt2, "llama": llama, "opt": opt}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12], [5, 6, 7], [13, 5, 14, 15, 16]]


def batch_of(tokens: th.Tensor, wanted: th.Tensor) -> SequenceBatch:
    return SequenceBatch(tokens, wanted, wanted)


def batch() -> tuple[th.Tensor, th.Tensor]:
    """Right-padded tokens, and wanted positions: the last of each row and some before."""
    width = max(map(len, ROWS))
    tokens = th.tensor([row + [7] * (width - len(row)) for row in ROWS])
    wanted = th.zeros_like(tokens, dtype=th.bool)
    for i, row in enumerate(ROWS):
        wanted[i, len(row) - 1] = wanted[i, len(row) // 2] = True
    return tokens, wanted


def backbone(config: Any, **kwargs: Any) -> CausalBackbone:
    with th.random.fork_rng():
        th.manual_seed(0)
        return CausalBackbone(config, VOCAB, 64, **kwargs)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", list(CONFIGS))
def test_packed_is_padded(config: str, checkpointed: bool) -> None:
    """The same hidden states and gradients as sequence by sequence, and no token more is read."""
    packed = backbone(CONFIGS[config](), gradient_checkpointing=checkpointed)
    alone = backbone(CONFIGS[config]())
    assert packed.capabilities.packs is None
    read: list[int] = []
    packed.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].numel())
    )
    tokens, wanted = batch()
    hidden = packed.hidden_states(batch_of(tokens, wanted))
    assert read == [sum(map(len, ROWS))]
    expected = th.cat(
        [
            alone.trunk(input_ids=th.tensor([row]), use_cache=False)[0][keep[: len(row)]]
            for row, keep in zip(ROWS, wanted, strict=True)
        ]
    )
    th.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    weight = th.randn(hidden.shape, generator=th.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
        else:
            assert ours.grad is not None
            th.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert packed.config._attn_implementation == "sdpa"


def test_sequences_do_not_see_each_other() -> None:
    model = backbone(llama())
    tokens, wanted = batch()
    with th.no_grad():
        before = model.hidden_states(batch_of(tokens, wanted))
        tokens[0] = 20  # another first sequence
        after = model.hidden_states(batch_of(tokens, wanted))
    first = int(wanted[0].sum())
    assert not th.equal(before[:first], after[:first])
    th.testing.assert_close(before[first:], after[first:])


def test_without_padding_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(gpt2())
    shapes = []
    model.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape))
    )
    with th.no_grad():
        model.hidden_states(
            batch_of(th.tensor([[1, 2], [3, 4]]), th.tensor([[False, True], [True, True]]))
        )
    assert shapes == [(2, 2)]


@pytest.mark.parametrize("why", ["another kind of attention", "eager"])
def test_models_that_cannot_are_padded(why: str) -> None:
    """Bloom has its own attention, which knows no other; so has whoever asks for eager."""
    config: Any = gpt2()
    if why == "eager":
        config._attn_implementation = "eager"
    else:
        config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2)
    model = backbone(config)
    assert model.capabilities.packs
    tokens, wanted = batch()
    with th.no_grad():
        hidden = model.hidden_states(batch_of(tokens, wanted))
        expected = model.trunk(input_ids=tokens, use_cache=False)[wanted]
    assert th.equal(hidden, expected)


def test_pad_and_pack() -> None:
    wanted = batch()[1]
    real = th.arange(wanted.shape[1]) < th.tensor(list(map(len, ROWS)))[:, None]
    group = Group.of(list(map(len, ROWS)), th.device("cpu"))
    assert th.equal(group.real, real)
    row = th.randn(1, 3, int(real.sum()), 4, dtype=th.float64, requires_grad=True)
    padded = group.pad(row)
    assert padded.shape == (len(ROWS), 3, wanted.shape[1], 4)
    assert (padded.transpose(1, 2)[~real] == 0).all()
    assert th.equal(group.pack(padded.transpose(1, 2)), row.transpose(1, 2))
    assert th.autograd.gradcheck(group.pad, (row,))
    batch_like = padded.transpose(1, 2).detach().requires_grad_()
    assert th.autograd.gradcheck(group.pack, (batch_like,))


def test_neighbours_of_like_length_are_padded_together() -> None:
    lengths = [1, 4, 4, 5, 6, 7, 12, 12]
    wanted = th.zeros(len(lengths), 12, dtype=th.bool)
    wanted[range(len(lengths)), [length - 1 for length in lengths]] = True
    packing = Packing(wanted)
    shapes = [tuple(group.real.shape) for group in packing.groups]
    assert shapes == [(1, 1), (4, 6), (1, 7), (2, 12)]
    assert packing.sizes == [1, 19, 7, 24] and not packing.is_full
    positions = [i for length in lengths for i in range(length)]
    assert packing.positions.tolist() == [positions]
    batch = th.arange(wanted.numel()).reshape(wanted.shape)
    assert packing.row(batch).tolist() == [
        [row * 12 + i for row, length in enumerate(lengths) for i in range(length)]
    ]
    assert Packing(wanted[-2:]).is_full


# Two groups of sequences with a prefix in common, sequences that are alone, and of one a prefix
# that is as long as the sequence of another.
GROUPED = [
    ([5, 6, 7, 8], [9, 10, 11]),
    ([5, 6, 7, 8], [12]),
    ([5, 6, 7], [13, 14]),
    ([5, 6, 7, 8], []),
    ([5, 6, 7, 8], [9, 10]),
    ([15, 16, 17, 18, 19, 20], [21]),
    ([15, 16, 17, 18, 19, 20], [22, 23, 24, 25]),
    ([26], [27, 28]),
]


def grouped(rows: list[tuple[list[int], list[int]]]) -> SequenceBatch:
    """Prompts and responses; hidden states are wanted from a prompt's last token on."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = th.full((len(rows), width), 7)
    wanted = th.zeros_like(tokens, dtype=th.bool)
    for i, (prompt, response) in enumerate(rows):
        tokens[i, : len(prompt) + len(response)] = th.tensor([*prompt, *response])
        wanted[i, len(prompt) - 1 : len(prompt) + len(response)] = True
    return batch_of(tokens, wanted)


def random_groups(seed: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> list[int]:
        return [int(token) for token in rng.integers(1, 400, rng.integers(low, high))]

    rows = []
    for size in rng.integers(1, 6, 4):
        prompt = draw(4, 20)
        rows += [(prompt, draw(1, 12)) for _ in range(size)]
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("config", list(CONFIGS))
def test_prefixes_are_read_once(config: str, seed: int | None) -> None:
    """The same hidden states and gradients as sequence by sequence."""
    rows = GROUPED if seed is None else random_groups(seed)
    shared = backbone(CONFIGS[config](), gradient_checkpointing=config == "llama")
    alone = backbone(CONFIGS[config]())
    assert shared.capabilities.shares is None
    read: list[int] = []
    shared.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].numel())
    )
    hidden = shared.hidden_states(grouped(rows))
    distinct = {tuple(prompt) for prompt, response in rows if response}
    rest = sum(len(response) for _, response in rows)
    rest += sum(len(prompt) for prompt, response in rows if not response)
    assert read == [sum(map(len, distinct)) + rest] and read[0] < sum(
        len(prompt) + len(response) for prompt, response in rows
    )
    expected = th.cat(
        [
            alone.trunk(input_ids=th.tensor([[*prompt, *response]]), use_cache=False)[
                0, len(prompt) - 1 :
            ]
            for prompt, response in rows
        ]
    )
    th.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    weight = th.randn(hidden.shape, generator=th.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, ours), theirs in zip(shared.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
        else:
            assert ours.grad is not None
            scale = max(1.0, float(theirs.grad.abs().max()))
            assert (ours.grad - theirs.grad).abs().max() < 2e-5 * scale, name


def test_what_little_is_alike_is_read_twice() -> None:
    rows = [([5, 6], list(range(8, 38))), ([5, 6], list(range(40, 70)))]
    packing = Packing(grouped(rows).action_positions, grouped(rows).tokens)
    assert packing.is_full and not packing.branches


def test_branches_do_not_see_each_other() -> None:
    model = backbone(llama())
    rows = [([5, 6, 7, 8, 9], [10, 11]), ([5, 6, 7, 8, 9], [12, 13])]
    with th.no_grad():
        before = model.hidden_states(grouped(rows))
        after = model.hidden_states(grouped([rows[0], ([5, 6, 7, 8, 9], [14, 15])]))
    th.testing.assert_close(before[:3], after[:3], rtol=0, atol=0)
    assert not th.allclose(before[4:], after[4:])
