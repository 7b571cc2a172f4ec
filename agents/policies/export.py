"""Folders that `transformers` reads: a policy's model, with its value head beside it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gymnasium import spaces

from agents import parallel
from agents.files import atomic_path
from agents.policies.card import model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agents.policies.base import BackbonePolicy
    from agents.policies.heads import ValueHead

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_FOLDER = "value_model"
SAMPLING_FILE = "sampling.json"
CARD_FILE = "README.md"
CONFIG_FILE = "config.json"


def save_policy(
    policy: BackbonePolicy,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    merge: bool,
    results: Mapping[str, Any],
) -> None:
    """Write models, tokenizer, value head, sampling and model card; of ranks the main one writes.

    Args:
        policy: The policy.
        directory: Where to.
        tokenizer: The tokenizer to write, or None.
        merge: Whether to add an adapter to the weights.
        results: What the model card says of the results.

    Raises:
        ValueError: If the folder holds something else, since it is replaced as a whole.
    """
    from safetensors.torch import save_file

    if not parallel.is_main():
        return
    if not (directory / VALUE_HEAD_FILE).exists() and (
        directory.is_file() or (directory.is_dir() and any(directory.iterdir()))
    ):
        raise ValueError(
            f"{directory} holds something that save_pretrained did not write and would "
            "replace: choose a new or empty folder."
        )
    with atomic_path(directory) as folder:
        folder.mkdir()
        save = policy.backbone.save_merged if merge else policy.backbone.save_pretrained
        save(folder)
        if policy.value_backbone is not None:
            policy.value_backbone.save_pretrained(folder / VALUE_MODEL_FOLDER)
        weights = {} if policy.value_head is None else policy.value_head.state_dict()
        _generate_as_trained(policy, folder)
        head = {name: value.detach().contiguous() for name, value in weights.items()}
        save_file(head, folder / VALUE_HEAD_FILE)
        (folder / SAMPLING_FILE).write_text(json.dumps(vars(policy.sampling)))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        write_card(policy, folder, results)  # last: peft writes one of its own


def write_card(policy: BackbonePolicy, folder: Path, results: Mapping[str, Any]) -> None:
    """Write the model card into a folder that holds a policy's model.

    Args:
        policy: The policy.
        folder: The folder.
        results: What is known of the results: name and value.
    """
    (folder / CARD_FILE).write_text(model_card(policy, folder, results), encoding="utf-8")


def _generate_as_trained(policy: BackbonePolicy, folder: Path) -> None:
    """Let `generate` of what has been saved end turns and sample as the policy does.

    The settings that the model had before are somebody else's: another EOS, or a `top_k` that was
    not trained with.
    """
    from transformers import GenerationConfig

    space = policy.action_space
    stops = list(getattr(space, "stop_token_ids", ()))
    if not (folder / CONFIG_FILE).is_file() or not stops:
        return  # no model of transformers, or nothing that ends a turn
    ends = stops if len(stops) > 1 else stops[0]
    (budget,) = cast("spaces.Dict", policy.observation_space)["response"].shape or ()
    config = json.loads((folder / CONFIG_FILE).read_text())
    GenerationConfig(
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=ends,
        pad_token_id=getattr(space, "pad_token_id", stops[0]),
        do_sample=True,
        max_new_tokens=budget,
        **vars(policy.sampling),
        **policy.backbone.generation_settings(),
    ).save_pretrained(folder)
    config["eos_token_id"] = ends
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def tell_of_stops(policy: BackbonePolicy) -> None:
    """Warn where a model ends turns with tokens that the environment goes on after."""
    settings = getattr(getattr(policy.backbone, "model", None), "generation_config", None)
    ids = getattr(settings, "eos_token_id", None)
    known = getattr(policy.action_space, "stop_token_ids", None)
    if ids is None or known is None:
        return
    own = [ids] if isinstance(ids, int) else [int(token) for token in ids]
    missing = [token for token in own if token not in known and token < policy.vocab_size]
    if missing:
        warnings.warn(
            f"The model's generation config ends turns with the tokens {own}, but the environment "
            f"with {list(known)} alone: make it with stop={missing}, or with the model's folder as "
            "its tokenizer.",
            stacklevel=2,
        )


def load_value_head(head: ValueHead | None, directory: Path) -> None:
    """Read a value head from a folder that `save_policy` wrote.

    Raises:
        ValueError: If there is none to read it into.
    """
    from safetensors.torch import load_file

    if head is None:
        raise ValueError("The policy has no critic: make it with critic=True.")
    head.load_state_dict(load_file(directory / VALUE_HEAD_FILE))
