from __future__ import annotations

from typing import Any

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
    group = Group.of(real)
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
