"""Which tokens may be said: what the action space allows, and of that what a constraint allows."""

from __future__ import annotations

import pickle
import pkgutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from agents.models.backbone import Observation, Scope
from agents.models.layout import SequenceBatch
from agents.policies.observations import as_sequences, on_host
from textenvs.constraints import AllOf, ChoiceConstraint, TokenConstraint
from textenvs.text.codec import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = ("start", "advance", "allowed")  # of a `TokenConstraint`
# What was said before a token, and the constraint's states that it led to.
States = Mapping[tuple[bytes, bytes], Any]


class Said(NamedTuple):
    """What has been said where a token is chosen.

    Args:
        state: The constraint's state there.
        prompt: (k,) token ids.
        response: (n,) the response so far.
    """

    state: Any
    prompt: TokenIds
    response: TokenIds


Places = Sequence[Said]


class TokenMasks(nn.Module):
    """Masks over the vocabulary; they move with the policy and are not saved.

    The states of rollouts and predictions are remembered from call to call, so that a response
    that grew by a token is advanced by it alone. What is remembered only saves work.

    Args:
        vocab_size: How many tokens there are.
        allowed_tokens: The only ones to sample. None: all.
        constraint: What more confines them, "package.module:Name" for that, or None.
        choices: The only responses, as token ids without EOS. None: any.
        eos_token_id: The token that ends those that leave room for it.

    Raises:
        ValueError: If `allowed_tokens` are no ids of the vocabulary, or none; if there is no such
            constraint, or it cannot be pickled.
        TypeError: If `constraint` is no `TokenConstraint`.
    """

    def __init__(
        self,
        vocab_size: int,
        allowed_tokens: Collection[int] | None,
        constraint: TokenConstraint[Any] | str | None = None,
        choices: Collection[Sequence[int]] | None = None,
        eos_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.allowed: th.Tensor | None
        mask = None if allowed_tokens is None else _mask(vocab_size, allowed_tokens)
        self.register_buffer("allowed", mask, persistent=False)
        self._within = np.ones(vocab_size, dtype=np.bool_) if mask is None else mask.numpy().copy()
        if eos_token_id is not None and not self._within[eos_token_id]:
            eos_token_id = None
        every = [] if constraint is None else [resolve_constraint(constraint)]
        # Choices of one token that nothing follows are what `allowed_tokens` says already.
        if choices is not None and not (eos_token_id is None and {*map(len, choices)} == {1}):
            every.append(ChoiceConstraint(choices, eos_token_id))
        self.constraint = AllOf(every) if len(every) > 1 else every[0] if every else None
        self._states: dict[Scope, States] = {}

    def said(
        self, obs: PyTorchObs | SequenceBatch, scope: Scope = "predict"
    ) -> tuple[()] | tuple[Places]:
        """Return what has been said wherever a token is chosen; nothing without a constraint.

        Args:
            obs: Observations, or sequences, which must say where responses begin.
            scope: Predictions leave alone what a rollout remembers.

        Raises:
            ValueError: If sequences do not say where responses begin.
        """
        if self.constraint is None:
            return ()
        batch = as_sequences(obs)
        if batch is None:
            return (self._at_rows(on_host(cast("dict[str, th.Tensor]", obs)), scope),)
        if not isinstance(obs, SequenceBatch) and "turn_starts" not in obs:
            raise ValueError(
                "With a constraint, sequences must say where responses begin: expected tokens, "
                f"action_positions and turn_starts, but there are only {sorted(obs)}."
            )
        return (self._at_actions(batch),)

    def forward(
        self,
        said: Places,
        device: th.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> th.Tensor:
        """Return a mask over the vocabulary for each of some places, (n, vocabulary).

        Args:
            said: What has been said there.
            device: Where the masks go.
            tokenizer: What shows it in errors, if there is one.

        Raises:
            ValueError: If nothing may be said somewhere, or ids of no token.
        """
        constraint = cast("TokenConstraint[Any]", self.constraint)
        masks = np.tile(self._within, (len(said), 1))
        for mask, here in zip(masks, said, strict=True):
            allowed = constraint.allowed(here.state)
            if allowed is not None:
                ids = _ids(allowed)
                if len(ids) and not 0 <= ids.min() <= ids.max() < len(mask):
                    raise ValueError(
                        f"A constraint allows ids in [0, {len(mask)}), but "
                        f"{type(constraint).__name__} allowed {ids.min()}..{ids.max()} "
                        f"{_shown(here, tokenizer)}."
                    )
                outside = np.ones(len(mask), dtype=np.bool_)
                outside[ids] = False
                mask[outside] = False
            if not mask.any():
                raise ValueError(
                    f"Of the tokens that the action space allows, {type(constraint).__name__} "
                    f"allows none {_shown(here, tokenizer)}: let it allow the token that ends a "
                    "turn where a response is complete."
                )
        return th.as_tensor(masks, device=device)

    def clear(self) -> None:
        """Forget the states of rollouts and predictions."""
        self._states = {}

    def _at_rows(self, observation: Observation, scope: Scope) -> Places:
        known, states = self._states.get(scope, {}), dict[tuple[bytes, bytes], Any]()
        said = []
        for prompt, response in _rows(observation):
            key = prompt.tobytes(), response.tobytes()
            if key not in states:
                states[key] = self._state(prompt, response, known)
            said.append(Said(states[key], prompt, response))
        self._states[scope] = states
        return said

    def _at_actions(self, batch: SequenceBatch) -> Places:
        constraint = cast("TokenConstraint[Any]", self.constraint)
        fields = (batch.tokens, batch.action_positions, batch.turn_starts)
        said = []
        sources: list[TokenIds | None] = [None] * len(batch.tokens)
        if batch.source is not None and batch.source_lengths is not None:
            read_apart = batch.source.cpu().numpy(), batch.source_lengths.tolist()
            sources = [source[:length] for source, length in zip(*read_apart, strict=True)]
        rows = zip(*(field.cpu().numpy() for field in fields), sources, strict=True)
        for row, wanted, begins, source in rows:
            starts, start, state, read = np.flatnonzero(begins), -1, None, 0
            for position in np.flatnonzero(wanted):
                turn = np.searchsorted(starts, position, side="right") - 1
                if turn < 0:
                    raise ValueError(
                        "A constraint must know where a response begins, but no turn start comes "
                        f"before the action position {position} of the tokens {row.tolist()}."
                    )
                if starts[turn] != start:
                    start, read = int(starts[turn]), int(starts[turn]) + 1
                    prompt = row[:read] if source is None else source
                    state = constraint.start(_ids(prompt))
                for token in row[read : position + 1]:
                    state = constraint.advance(state, int(token))
                read = position + 1
                said.append(Said(state, prompt, row[start + 1 : read]))
        return said

    def _state(self, prompt: TokenIds, response: TokenIds, known: States) -> Any:
        """Return the state after a response, going on from what is known of it."""
        constraint = cast("TokenConstraint[Any]", self.constraint)
        for read in range(len(response), max(len(response) - 2, -1), -1):
            key = prompt.tobytes(), response[:read].tobytes()
            if key in known:
                state, response = known[key], response[read:]
                break
        else:
            state = constraint.start(_ids(prompt))
        for token in response:
            state = constraint.advance(state, int(token))
        return state


def resolve_constraint(constraint: TokenConstraint[Any] | str) -> TokenConstraint[Any]:
    """Return a constraint, imported if it is a path "package.module:Name"; a class is called.

    Raises:
        ValueError: If there is no such path; if the constraint cannot be pickled.
        TypeError: If it has not what a `TokenConstraint` has.
    """
    given, path = constraint, isinstance(constraint, str)
    if isinstance(constraint, str):
        try:
            constraint = pkgutil.resolve_name(constraint)
        except (ValueError, ImportError, AttributeError) as error:
            raise ValueError(
                f"constraint must be an object or 'package.module:Name', but {given!r} could not "
                f"be imported: {error}."
            ) from error
    if isinstance(constraint, type):
        constraint = constraint()
    if not all(callable(getattr(constraint, name, None)) for name in METHODS):
        raise TypeError(
            f"A constraint needs the methods {', '.join(METHODS)} (see "
            f"textenvs.constraints.TokenConstraint), but {given!r} has not all of them."
        )
    if not path:
        try:
            pickle.dumps(constraint)
        except Exception as error:  # whatever the object's own code raises
            raise ValueError(
                "The constraint is saved with the agent, but it cannot be pickled; give its path "
                f"as a text, 'package.module:Name', instead: {error}"
            ) from error
    return cast("TokenConstraint[Any]", constraint)


def _mask(vocab_size: int, allowed: Collection[int]) -> th.Tensor:
    if not allowed or min(allowed) < 0 or max(allowed) >= vocab_size:
        raise ValueError(
            f"allowed_tokens must be ids in [0, {vocab_size}), at least one, "
            f"but they are {allowed}."
        )
    mask = th.zeros(vocab_size, dtype=th.bool)
    mask[list(allowed)] = True
    return mask


def _rows(observation: Observation) -> Iterator[tuple[TokenIds, TokenIds]]:
    """Return prompt and response of each row, without padding."""
    columns = [observation[key] for key in ("prompt", "prompt_length")]
    columns += [observation[key] for key in ("response", "response_length")]
    for prompt, prompt_length, response, length in zip(*columns, strict=True):
        yield prompt[: int(prompt_length[0])], response[: int(length[0])]


def _ids(tokens: Collection[int] | npt.NDArray[Any]) -> TokenIds:
    """Return token ids as an array of their own."""
    if isinstance(tokens, np.ndarray):
        return tokens.astype(np.int64)
    return np.fromiter(tokens, dtype=np.int64)


def _shown(here: Said, tokenizer: PreTrainedTokenizerBase | None) -> str:
    prompt, response = (
        ids.tolist() if tokenizer is None else repr(tokenizer.decode(ids.tolist()))
        for ids in (here.prompt, here.response)
    )
    return f"after the response {response} to the prompt {prompt}"
