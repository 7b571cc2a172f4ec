"""The part of a policy that writes folders for `transformers`, and reads what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th

from agents.compat import is_quantised
from agents.models.loading import check_device
from agents.policies import export
from agents.policies.base import BackbonePolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agents.models.lora import AdapterSpec

# Of `model_init_kwargs`: what is this user's and this machine's, and not the model's.
PRIVATE = ("token", "proxies", "cache_dir", "force_download", "local_files_only")

Self = TypeVar("Self", bound="SavedPolicy")


class SavedPolicy(BackbonePolicy):
    """A policy that can be saved; `TransformerPolicy` has the arguments."""

    _init_kwargs: dict[str, Any]
    _peft_config: AdapterSpec | None

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        merge: bool = False,
        results: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an ordinary Hugging Face folder: model, tokenizer, and the value head beside it.

        A LoRA adapter is saved as such, in the format of `peft`, if its model can be found by its
        name; a critic's own model is in a folder inside. README.md is the model card. With several
        ranks the main one writes.

        Args:
            directory: Where to; `AutoModelForCausalLM.from_pretrained` reads it.
            tokenizer: The tokenizer to write. None: the environment's, if `agents.PPO` set it.
            merge: Whether to add an adapter to the weights and write the whole model.
            results: What the model card says of the results: name and value.

        Raises:
            ValueError: If the folder holds something else, since it is replaced as a whole.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        export.save_policy(self, Path(directory), tokenizer, merge, results or {})

    def save(self, path: str) -> None:
        """Save as SB3 does: all weights, so that they must not be quantised."""
        if is_quantised(self.backbone):
            raise ValueError(
                "A policy is saved with all of its weights, and quantised ones cannot be loaded: "
                "save the agent, or the adapter by save_pretrained."
            )
        super().save(path)

    @classmethod
    def load(cls: type[Self], path: str, device: th.device | str = "auto") -> Self:
        """Load as SB3 does, to a device that is there."""
        check_device(device)
        return super().load(path, device)

    def saved_model(self, whole: bool = False) -> dict[str, Any]:
        """Return the arguments to make the model with before saved weights are loaded.

        The weights that an adapter leaves as they are come from where they came from, and so does
        code that came with a model; all others are saved, so that nothing depends on a path.

        Args:
            whole: Whether the weights that an adapter leaves as they are will be loaded, too.
        """
        adapter, model = self.backbone.adapter, self.backbone.made_of
        if adapter is not None and adapter.base is not None and not whole:
            model = adapter.base
        kept = {name: given for name, given in self._init_kwargs.items() if name not in PRIVATE}
        return {
            "model": model,
            "model_init_kwargs": kept if isinstance(model, str) and kept else None,
            "peft_config": self._peft_config,
        }

    def load_value_head(self, directory: str | Path) -> None:
        """Read the value head from a folder that `save_pretrained` wrote."""
        export.load_value_head(self.value_head, Path(directory))
