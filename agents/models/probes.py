"""What a model can do, found by trying: each probe returns why not, or None."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, log2, sqrt
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch as th
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agents.compat import attention_of
from agents.decoding.decoder import Decoder
from agents.decoding.layer_masks import has_windows, keeps_states
from agents.decoding.tokens import Observation
from agents.models.backbone import Capabilities
from agents.models.layout import SequenceBatch

# Relative to the size of what is compared: rounding is far below, another position far above.
TOLERANCE = 1e-3
# How large logits are in a trained model: what is done to them shows in such ones only.
LOGITS = 20.0
# Initial weights are often so small that a model attends to all positions alike, and a wrong
# position would not show. A layer's output is made about so many times as large as its input.
GAIN = 1.5
# What configs call the number of tokens that some layers see back, and what it is while a model is
# tried: less than what it reads then.
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
SHORT = 2
# Why what is not cached is not compiled.
NO_STEPS = "only steps that go on from a cache are compiled"
# What has been found out, by kind of model.
_TRIED: dict[Hashable, Tried] = {}


class Tried(NamedTuple):
    """What has been found out.

    Args:
        linear_head: Whether logits are a linear layer of hidden states.
        own_masks: Whether the model makes its masks itself; see `Decoder`.
        capabilities: What it can do.
        limit: How long sequences may be for that. None: any.
    """

    linear_head: bool
    own_masks: bool
    capabilities: Capabilities
    limit: int | None


class Probed(Protocol):
    """What is tried, in float32: a causal language model and the ways to compute it."""

    model: PreTrainedModel
    linear_head: bool
    own_masks: bool
    longest: float

    @property
    def decoder(self) -> Decoder:
        """What goes on from keys and values."""
        ...

    def trunk(self, **inputs: Any) -> th.Tensor:
        """Return the last hidden states."""
        ...

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states."""
        ...

    def padded(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states of sequences' actions."""
        ...

    def packed(self, batch: SequenceBatch, share: bool = True) -> th.Tensor:
        """Return the same, computed in one row, shared prefixes once or not."""
        ...

    def last_hidden(self, observation: Observation) -> th.Tensor:
        """Return each row's last hidden state."""
        ...


def probe(backbone: Probed, max_tokens: int) -> Capabilities:
    """Return what a model can do, and warn if it cannot be cached.

    It finds out, too, whether the model's logits are a linear layer of its last hidden states, and
    sets `linear_head` to that; if they are not, the model's own forward makes them. Likewise
    `own_masks`. `longest` becomes less where it is sure of less. A process tries models of one kind
    once.

    Args:
        backbone: The model.
        max_tokens: The longest sequence that it will see.

    Raises:
        ValueError: If the model reads what comes after a token, or its logits are made of more
            than its last hidden states.
    """
    kind = kind_of(backbone.model)
    if kind not in _TRIED:
        _TRIED[kind] = _try(backbone)
    backbone.linear_head, backbone.own_masks, capabilities, limit = _TRIED[kind]
    if limit is not None and limit < max_tokens:
        reason = f"beyond {limit} tokens it attends in another way, which cannot be tried"
        found = vars(capabilities).items()
        capabilities = Capabilities(**{name: own or reason for name, own in found})
    elif limit is not None:
        backbone.longest = min(backbone.longest, limit)
    if capabilities.caches is not None:
        warnings.warn(
            f"{type(backbone.model).__name__} cannot go on from the keys and values of rows of "
            f"different lengths ({capabilities.caches}): each token of a rollout will cost its "
            "whole context.",
            stacklevel=4,
        )
    return capabilities


def kind_of(model: PreTrainedModel) -> Hashable:
    """Return what models have in common that can do the same."""
    layers = frozenset(type(layer) for layer in model.modules())  # an adapter's, too
    code = type(model), type(model).forward, layers
    return *code, model.config.to_json_string(use_diff=False), attention_of(model.config)


def _try(backbone: Probed) -> Tried:
    """Find out what a model can do."""
    name = type(backbone.model).__name__
    with realistic_weights(backbone.model), th.no_grad(), short_windows(backbone) as limit:
        reason = why_not_causal(backbone)
        if reason is not None:
            raise ValueError(
                f"{name} does not read from left to right alone: what comes after a token changes "
                f"what is made of it ({reason}). Choose a causal model (GPT-2, Llama, Qwen, ...); "
                "an encoder may have a config with is_decoder=True."
            )
        backbone.linear_head = why_no_head(backbone) is None
        reason = None if backbone.linear_head else why_no_head(backbone)
        if reason is not None:
            raise ValueError(
                f"{name} makes its logits of more than its last hidden states ({reason}), which is "
                "not supported: choose another causal model (GPT-2, Llama, Qwen, Mistral, ...)."
            )
        packs = why_no_packing(backbone)
        shares = "it does not pack" if packs is not None else why_no_sharing(backbone)
        caches = why_no_cache(backbone)
        backbone.decoder.own_masks = caches is not None
        if caches is not None and why_no_cache(backbone) is None:
            caches = None
        own_masks = backbone.decoder.own_masks and caches is None
    capabilities = Capabilities(caches, packs, why_no_programs(backbone, caches, own_masks), shares)
    return Tried(backbone.linear_head, own_masks, capabilities, limit)


def why_not_causal(backbone: Probed) -> str | None:
    """Return how what comes after a token changes its hidden state."""
    tokens = two_tokens(backbone.model)[th.tensor([[0, 1, 0, 0], [0, 1, 1, 1]])]
    hidden = backbone.trunk(input_ids=tokens, use_cache=False)[:, :2]
    return _difference(hidden[0], hidden[1])


def why_no_head(backbone: Probed) -> str | None:
    """Return why a model's logits are not what the backbone makes of its last hidden states."""
    tokens = two_tokens(backbone.model)[None]
    head = cast("th.nn.Module", backbone.model.get_output_embeddings())
    hidden = backbone.trunk(input_ids=tokens, use_cache=False)[0]
    size = float(backbone.model(input_ids=tokens, use_cache=False).logits.square().mean().sqrt())
    scale = LOGITS / size if size else 1.0
    hook = head.register_forward_hook(lambda _, inputs, output: output * scale)
    try:
        expected = backbone.model(input_ids=tokens, use_cache=False).logits[0]
        return why_not(partial(backbone.logits, hidden), expected)
    finally:
        hook.remove()


def why_no_cache(backbone: Probed) -> str | None:
    """Return why a model cannot go on from keys and values of rows of different lengths."""
    # Long prompts grow by little, short ones by much; many, since a wrong row may by chance
    # differ by little.
    rows, random = 16, np.random.default_rng(0)
    tokens = two_tokens(backbone.model).numpy()
    fixed = {
        "prompt": random.choice(tokens, (rows, 3)),
        "prompt_length": np.resize([3, 1], (rows, 1)),
        "response": random.choice(tokens, (rows, 5)),
    }
    reason = None
    for lengths in ([0, 0], [2, 5]):
        observation = {**fixed, "response_length": np.resize(lengths, (rows, 1))}
        ask = partial(backbone.decoder.next_hidden, observation, "rollout")
        reason = reason or why_not(ask, backbone.last_hidden(observation))
    backbone.decoder.clear()
    return reason


def why_no_programs(backbone: Probed, caches: str | None, own_masks: bool) -> str | None:
    """Return why the steps of a model are not compiled."""
    if caches is not None:
        return NO_STEPS
    if keeps_states(backbone.model.config.get_text_config()):
        return "its layers remember states"
    return "it makes its masks itself" if own_masks else None


def why_no_packing(backbone: Probed) -> str | None:
    """Return why a model cannot compute sequences in one row without padding."""
    if keeps_states(backbone.model.config.get_text_config()):
        return "its layers remember states of all that is in a row"
    attention = attention_of(backbone.model.config)
    if attention != "sdpa":
        return f"its attention is {attention!r}, and only 'sdpa' is packed"
    rows = th.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    tokens = two_tokens(backbone.model)[rows]
    wanted = th.arange(4) < th.tensor([[4], [3], [1]])  # two beside each other, one alone
    batch = SequenceBatch(tokens, wanted, wanted)
    return why_not(partial(backbone.packed, batch, share=False), backbone.padded(batch))


def why_no_sharing(backbone: Probed) -> str | None:
    """Return why a model cannot compute prefixes that sequences share once."""
    rows = [[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 1, 0, 0, 0]]
    tokens = two_tokens(backbone.model)[th.tensor(rows)]
    places = th.arange(5)
    wanted = (places >= 2) & (places < th.tensor([[5], [3], [4], [5]]))
    batch = SequenceBatch(tokens, wanted, wanted)
    reason = why_not(partial(backbone.packed, batch), backbone.padded(batch))
    return reason or _why_no_common_keys(backbone)


def _why_no_common_keys(backbone: Probed) -> str | None:
    """Return why steps of rows that go on from one prompt cannot read its keys once."""
    random, lengths = np.random.default_rng(0), np.array([[3]] * 4 + [[4]] * 4)
    tokens = two_tokens(backbone.model).numpy()
    observation = {
        "prompt": np.repeat(tokens[np.array([[0, 1, 1, 0], [1, 0, 1, 1]])], 4, axis=0),
        "prompt_length": lengths,
        "response": random.choice(tokens, (8, 3)),
        "response_length": np.zeros_like(lengths),
    }
    backbone.decoder.share_from = 2
    reason = None
    for said in range(3):
        observation = {**observation, "response_length": np.full_like(lengths, said)}
        ask = partial(backbone.decoder.next_hidden, observation, "rollout")
        reason = reason or why_not(ask, backbone.last_hidden(observation))
    backbone.decoder.clear()
    return reason


def two_tokens(model: PreTrainedModel, left_out: Collection[int] = ()) -> th.Tensor:
    """Return two tokens that mean something else to a model, (2,); some share an embedding."""
    weight = cast("Any", model.get_input_embeddings()).weight
    tokens = (token for token in range(len(weight)) if token not in left_out)
    first = next(tokens)
    others = (token for token in tokens if not th.equal(weight[token], weight[first]))
    return th.tensor([first, next(others, first)])


@contextmanager
def short_windows(backbone: Probed) -> Iterator[int | None]:
    """Let layers that see a number of tokens back see few, so that what is tried is longer.

    Yields:
        Up to how many tokens what is tried tells of more, or None: of any number.
    """
    config = backbone.model.config.get_text_config()
    places: list[tuple[Any, str, int]] = []
    for name in WINDOWS if has_windows(config) else ():
        length = getattr(config, name, None)
        if isinstance(length, int) and length > SHORT:
            owners = [config, *backbone.model.modules()]
            places += [
                (owner, name, length) for owner in owners if getattr(owner, name, None) == length
            ]
    tokens = two_tokens(backbone.model).repeat(2 * SHORT)[None]
    usual = backbone.trunk(input_ids=tokens, use_cache=False)
    for owner, name, _ in places:
        setattr(owner, name, SHORT)
    try:
        shortened = backbone.trunk(input_ids=tokens, use_cache=False)
        obeyed = not places or _difference(shortened, usual) is not None
        limits = [] if obeyed else [length for _, _, length in places]
        if getattr(config, "attn_temperature_tuning", False):  # Llama 4's, by a forward's places
            limits.append(int(config.floor_scale))
        yield min(limits, default=None)
    finally:
        for owner, name, length in places:
            setattr(owner, name, length)


@contextmanager
def realistic_weights(model: PreTrainedModel) -> Iterator[None]:
    """Make the weights of linear layers as large as training makes them, where they are tiny.

    They are multiplied by powers of two, so that they are afterwards what they were to the bit.
    """
    scales = _scales(model)
    with th.no_grad():
        for weight, scale in scales:
            weight.mul_(scale)
        try:
            yield
        finally:
            for weight, scale in scales:
                weight.mul_(1 / scale)


def _scales(model: PreTrainedModel) -> list[tuple[th.Tensor, float]]:
    head = model.get_output_embeddings()
    scales = []
    for layer in model.modules():
        if isinstance(layer, (th.nn.Linear, Conv1D)) and layer is not head:
            weight = layer.weight
            if not weight.is_floating_point():  # but quantised
                continue
            width = weight.shape[0 if isinstance(layer, Conv1D) else 1]
            gain = float(weight.detach().norm()) / sqrt(weight.numel()) * sqrt(width)
            if 0 < gain < GAIN:
                scales.append((weight, 2.0 ** ceil(log2(GAIN / gain))))
    return scales


def why_not(actual: Callable[[], th.Tensor], expected: th.Tensor) -> str | None:
    """Return why something does not compute what is expected, or None: it does."""
    try:
        answer = actual()
    except Exception as error:  # whatever a model does that knows nothing of it
        return f"{type(error).__name__}: {error}"
    return _difference(answer, expected)


def _difference(actual: th.Tensor, expected: th.Tensor) -> str | None:
    if actual.shape != expected.shape:
        return f"the shape is {tuple(actual.shape)} and not {tuple(expected.shape)}"
    if th.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE):
        return None
    worst = float((actual - expected).abs().max())
    return f"the results differ by up to {worst:.2g}"
