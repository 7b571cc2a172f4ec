"""Supervised fine-tuning on a task's demonstrations, before any reward is known."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from agents import parallel
from agents.algorithms.checks import first_not_finite
from agents.files import atomic_path
from agents.models.causal import CausalBackbone
from agents.models.layout import IGNORED, CausalLayout, SequenceLayout, sequences_of
from agents.models.seq2seq import Seq2SeqBackbone
from agents.policies.transformer import TransformerPolicy
from agents.rng import preserved_rng_state
from agents.rollouts.buffer import Diverged
from agents.rollouts.vec_env import engine_of
from textenvs.envs.engine import TextEngine
from textenvs.envs.playing import Episode, ScriptedAgent, play
from textenvs.rewards import try_terms

# Of a warm start where nobody says how long it is: about so many tokens are read, prompts included,
# but no example is played more often than that.
WARM_START_TOKENS, MOST_PASSES = 2**21, 16
PROCEDURE = 2  # counts the changes of `fit`, so that results of an older one are not reused


class DemonstrationDataset(th.utils.data.Dataset[dict[str, th.Tensor]]):
    """Demonstrated episodes as sequences: all of it is read, the responses are learned.

    Args:
        episodes: Finished episodes, with their turns as token ids.
        layout: How turns become sequences: one for each episode of a causal model, unless its
            conversation was cut.
    """

    def __init__(self, episodes: Iterable[Episode], layout: SequenceLayout) -> None:
        self._items = [
            layout.features(sequence)
            for episode in episodes
            for sequence in sequences_of(layout, episode.turns)
        ]

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, th.Tensor]:
        """Return what a model's `forward` takes: `input_ids`, `labels`, ..., (tokens,) each."""
        return {name: th.as_tensor(array).long() for name, array in self._items[index].items()}

    @property
    def num_tokens(self) -> int:
        """How many tokens are read."""
        return sum(len(a) for item in self._items for name, a in item.items() if name != "labels")

    def digest(self) -> str:
        """Return a hash of the content."""
        digest = hashlib.sha256()
        for item in self._items:
            digest.update(b"".join(array.tobytes() for array in item.values()) + b"\n")
        return digest.hexdigest()


def demonstrations(
    engine: TextEngine, passes: int, seed: int = 0, layout: SequenceLayout | None = None
) -> DemonstrationDataset:
    """Let `Task.demonstrate` play every example of an environment, several times over.

    Args:
        engine: The environment's; it is left alone.
        passes: How often each example is played.
        seed: For the demonstrator and the episodes.
        layout: How turns become sequences. None: as for a causal model.
    """
    quiet = _quiet(engine)
    agent = ScriptedAgent(engine.task.demonstrate, seed)
    examples = range(len(engine.examples))
    episodes = (
        episode
        for number in range(passes)
        for episode in play(quiet, agent, examples, seed + number)
    )
    return DemonstrationDataset(episodes, layout or CausalLayout())


def _quiet(engine: TextEngine) -> TextEngine:
    """Return an engine for the same examples that rewards nothing."""
    quiet = engine.with_slots(min(64, len(engine.examples)))
    quiet.terms, quiet.observed = [], []
    return quiet


def default_passes(model: Any) -> int:
    """Return how often a warm start plays each example where nobody says so.

    A model from nothing has to learn to write: about two million tokens, 16 passes at most. A
    pretrained one has to see the task once.
    """
    if model.policy.pretrained:
        return 1
    engine = engine_of(model.env)
    some = np.linspace(0, len(engine.examples) - 1, min(64, len(engine.examples))).astype(int)
    agent = ScriptedAgent(engine.task.demonstrate, 0)
    played = play(_quiet(engine), agent, some.tolist(), 0)
    data = DemonstrationDataset(played, model.policy.backbone.layout)
    tokens = data.num_tokens * len(engine.examples) / len(some)
    return int(np.clip(round(WARM_START_TOKENS / tokens), 1, MOST_PASSES))


def warm_start(
    model: Any,
    passes: int | None = None,
    learning_rate: float | None = None,
    batch_size: int = 16,
    progress: bool = True,
    cache: bool | Path = True,
    seed: int = 0,
) -> None:
    """Fit a model to its task's demonstrations, in place, by `transformers.Trainer`.

    The result is kept in the user's cache folder and taken from there when model, data and
    settings are the same. No global random generator is changed. With several ranks, each has to
    call it: the main one fits, and the others get its weights.

    Args:
        model: An `agents.PPO` (or another SB3 algorithm) with a `TransformerPolicy` and a text
            environment.
        passes: How often each example is demonstrated. A demonstrator that varies (most do) says
            something else each time. 0: do nothing. None: see `default_passes`.
        learning_rate: Its peak; it falls to 0 linearly. None: 2e-3 for a model that was
            initialised at random, 5e-5 for a pretrained one.
        batch_size: Demonstrated episodes to a step.
        progress: Whether to show a progress bar.
        cache: Whether to keep the result, or where to.
        seed: For the demonstrator and the order of the data.

    Raises:
        Diverged: If it ends with weights that are not finite; they are not kept.
        TypeError: For a policy, or a backbone, that is no transformer of `transformers`.
        ValueError: For arguments that make no sense; for a reward that fails.
    """
    if passes is not None and passes < 0:
        raise ValueError(f"passes must be at least 0, but it is {passes}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but it is {batch_size}.")
    policy = model.policy
    if not isinstance(policy, TransformerPolicy):
        raise TypeError(f"warm_start needs a TransformerPolicy, not a {type(policy).__name__}.")
    if not isinstance(policy.backbone, (CausalBackbone, Seq2SeqBackbone)):
        raise TypeError(
            "warm_start fits models of transformers, but the policy's is a "
            f"{type(policy.backbone).__name__}: train it before, by its own means."
        )
    if passes is None:
        passes = default_passes(model)
    if passes == 0:
        return
    if learning_rate is None:
        learning_rate = 5e-5 if policy.pretrained else 2e-3
    engine = engine_of(model.env)
    # A reward that fails is told now, and not after the minutes that fitting takes.
    try_terms(engine.task, [*engine.terms, *engine.observed], engine.examples[0])
    if parallel.is_main():
        with parallel.main_process_only():
            _fit_or_read(model, passes, learning_rate, batch_size, progress, cache, seed)
    policy.follow_actor()
    parallel.broadcast(policy)
    policy.set_training_mode(False)
    policy.clear_cache()


def _fit_or_read(
    model: Any,
    passes: int,
    learning_rate: float,
    batch_size: int,
    progress: bool,
    cache: bool | Path,
    seed: int,
) -> None:
    """Give a model's actor the weights that `warm_start` describes."""
    policy = model.policy
    data = demonstrations(engine_of(model.env), passes, seed, policy.backbone.layout)
    adapter = policy.backbone.adapter
    settings = {
        "procedure": PROCEDURE,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "warmup_steps": min(20, len(data) // batch_size // 10),
        "seed": seed,
        "precision": "no" if policy.backbone.autocast is None else "bf16",
        "adapter": None if adapter is None else adapter.config.to_dict(),
    }
    network = policy.backbone.model
    folder = default_cache() if cache is True else cache
    key = _key(network, data, settings) if folder else ""
    file = Path(folder) / f"{key}.pt" if folder else None
    if file is not None and file.is_file():
        network.load_state_dict(th.load(file, map_location=policy.device, weights_only=True))
    else:
        # Only now: the Trainer's import takes seconds.
        from agents.training.fitting import fit

        with preserved_rng_state():
            fit(network, data, _collate, settings, progress, policy.device)
        name = first_not_finite(network.named_parameters())
        if name is not None:
            raise Diverged(
                f"The warm start has diverged: {name} is not finite, and the model is of no "
                f"use any more. Lower its learning rate ({learning_rate:g}) and make it anew."
            )
        if file is not None:
            with atomic_path(file) as temporary:
                th.save(network.state_dict(), temporary)


def default_cache() -> Path:
    """Return the folder for warm-started weights; `XDG_CACHE_HOME` moves it."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "textenvs" / "warm_start"


def _collate(items: list[dict[str, th.Tensor]]) -> dict[str, th.Tensor]:
    """Pad on the right; what is padded is neither attended to nor learned."""
    padded = {
        name: pad_sequence(
            [item[name] for item in items],
            batch_first=True,
            padding_value=IGNORED if name == "labels" else 0,
        )
        for name in items[0]
    }
    lengths = th.tensor([len(item["input_ids"]) for item in items])
    real = th.arange(padded["input_ids"].shape[1]) < lengths[:, None]
    return {**padded, "attention_mask": real.long()}


def _key(network: PreTrainedModel, data: DemonstrationDataset, settings: Mapping[str, Any]) -> str:
    """Return a name for the result: model, data, settings, versions of what computes it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode())
    digest.update(f"{transformers.__version__} {th.__version__} {data.digest()}".encode())
    digest.update(network.config.to_json_string().encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(th.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _plain(value: Any) -> Any:
    """Return what JSON can hold for what is in a LoRA config."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
