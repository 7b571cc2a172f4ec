"""Prompts are read in few forwards, none of which needs much memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th

from agents.decoding import prefix_cache
from tests.agents.agents import LargestTensor
from tests.agents.decoding.caches import (
    check,
    made,
    tokens,
)
from tests.agents.helpers import ragged


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("prefill_tokens", [1, 16, 50])
def test_prompts_are_read_in_chunks(name: str, prefill_tokens: int) -> None:
    """The same numbers, a row at least to a forward, and rows of like length together."""
    rng = np.random.default_rng(10)
    backbone = made(name, prefill_tokens=prefill_tokens)
    rows = [tokens(rng, length) for length in (3, 30, 1, 9, 12, 2, 31)]
    shapes: list[tuple[int, ...]] = []
    embeddings = backbone.model.get_input_embeddings()
    with th.no_grad():
        check(backbone, rows)
        hook = embeddings.register_forward_pre_hook(
            lambda _, inputs: shapes.append(tuple(inputs[0].shape))
        )
        uncached = backbone.last_hidden(ragged(rows))
        reads, shapes = shapes, []
        hook.remove()
        for row, hidden in zip(rows, uncached, strict=True):
            expected = backbone.trunk(input_ids=th.tensor([row]), use_cache=False)[0, -1]
            assert (hidden - expected).abs().max() <= 1e-5
        # New prompts beside ones that have grown by much.
        rows = [tokens(rng, 20), [*rows[1], *tokens(rng, 9)], *rows[2:5], tokens(rng, 25), rows[6]]
        check(backbone, rows)
    assert sum(count for count, _ in reads) == len(rows) and len(reads) > 1
    assert all(count == 1 or count * width <= prefill_tokens for count, width in reads)
    assert [width for _, width in reads] == sorted((w for _, w in reads), reverse=True)


def test_chunks_have_gradients() -> None:
    gradients = []
    for prefill_tokens in (4, 1000):
        backbone = made("llama", prefill_tokens=prefill_tokens)
        hidden = backbone.last_hidden(ragged([[1, 2, 3], [4], [5, 6, 7, 8]]))
        (hidden * th.arange(hidden.numel()).view_as(hidden)).sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    """A forward's tokens times its widest layer, and keys and values; no mask of rows x q x k."""
    rng = np.random.default_rng(11)
    backbone = made("llama", prefill_tokens=256)
    rows = [tokens(rng, 120) for _ in range(16)]
    with LargestTensor() as tensors, th.no_grad():
        backbone.next_hidden(ragged(rows))
    (kept,) = {t.numel() for t in backbone.decoder.memories["rollout"].key_values.keys.values()}
    assert kept <= tensors.elements <= 2 * kept  # repeated where two queries share a key
    wide = backbone.model.config.intermediate_size
    with LargestTensor() as tensors, th.no_grad():
        backbone.last_hidden(ragged(rows))
    assert tensors.elements <= max(256 * wide, backbone.num_logits * backbone.hidden_size)


@pytest.mark.parametrize("prefill_tokens", [1000, 30])
def test_prompts_that_are_new_are_read_without_a_mask(prefill_tokens: int) -> None:
    rng = np.random.default_rng(12)
    backbone = made("llama", prefill_tokens=prefill_tokens)
    reads: list[tuple[int, bool]] = []
    backbone.model.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(
            (args[0].shape[0], kwargs["attention_mask"] is not None)
        ),
        with_kwargs=True,
    )
    first = [tokens(rng, length) for length in (7, 7, 6, 7)]
    # Two are replaced, and two have grown by a reply: together in one forward if they fit.
    second = [tokens(rng, 10), [*first[1], *tokens(rng, 11)], tokens(rng, 9)]
    second.append([*first[3], *tokens(rng, 11)])
    step = (4, True)
    apart = prefill_tokens == 30
    expected = [[(4, False), step], [(2, False), (2, True), step] if apart else [(4, True), step]]
    with th.no_grad():
        for rows, forwards in zip((first, second), expected, strict=True):
            reads.clear()
            answer = backbone.next_hidden(ragged(rows))
            assert reads == forwards
            for row, hidden in zip(rows, answer, strict=True):
                truth = backbone.trunk(input_ids=th.tensor([row]), use_cache=False)[0, -1]
                assert (hidden - truth).abs().max() <= 1e-5


def test_masks_of_long_prompts_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share no more than their beginning with what is known are read without one."""
    rng = np.random.default_rng(13)
    backbone = made("llama")
    monkeypatch.setattr(prefix_cache, "MASK_NUMBERS", 2000)
    masks: list[int] = []
    backbone.model.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(
            0 if kwargs["attention_mask"] is None else kwargs["attention_mask"].numel()
        ),
        with_kwargs=True,
    )
    first = [[1, *tokens(rng, 99)] for _ in range(4)]
    second = [[1, *tokens(rng, 99)] for _ in range(3)]
    with th.no_grad():
        check(backbone, first)
        masks.clear()
        check(backbone, [*second, [*first[3], *tokens(rng, 30)]])
    assert max(masks) <= 30 * 130
    assert sorted(masks)[-2:] != [0, 0]  # what has grown needs one


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_that_rows_share_are_read_once(name: str) -> None:
    rng = np.random.default_rng(13)
    backbone = made(name)
    first, second = tokens(rng, 12), tokens(rng, 20)
    rows = [first, second, list(first), [7], list(second), list(first), second[:19]]
    read: list[int] = []
    backbone.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].shape[0])
    )
    with th.no_grad():
        hidden = backbone.next_hidden(ragged(rows))
        assert read == [3, 7]  # the distinct ones but for their last tokens, then those
        for step in range(3):
            for row, found in zip(rows, hidden, strict=True):
                expected = backbone.trunk(input_ids=th.tensor([row]), use_cache=False)[0, -1]
                assert (found - expected).abs().max() <= 1e-5
            # They go on each by itself; one of them starts anew.
            rows = [[*row, *tokens(rng, 1)] for row in rows]
            rows[2] = [*first] if step == 0 else rows[2]
            hidden = backbone.next_hidden(ragged(rows))
