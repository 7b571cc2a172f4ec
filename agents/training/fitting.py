"""Training on sequences with labels, by `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from accelerate.utils import patch_environment
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from agents.compat import use_one_device


def fit(
    network: PreTrainedModel,
    data: Dataset[dict[str, th.Tensor]],
    collate: Callable[[list[Any]], dict[str, th.Tensor]],
    settings: Mapping[str, Any],
    progress: bool,
    device: th.device,
) -> None:
    """Train a model on token ids and labels, once through the data.

    Args:
        network: Changed in place.
        data: One item for each sequence.
        collate: Makes a batch of items: `input_ids`, `attention_mask` and `labels`.
        settings: `batch_size`, `warmup_steps`, `seed`, the `learning_rate` at its peak, and the
            `precision`, "no" or "bf16", whatever the surroundings say.
        progress: Whether to show a progress bar.
        device: Where the model is.
    """
    precision = patch_environment(ACCELERATE_MIXED_PRECISION=settings["precision"])
    with tempfile.TemporaryDirectory() as folder, precision:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=settings["warmup_steps"],
            seed=settings["seed"],
            use_cpu=device.type == "cpu",
            # As it is, or it is off in the model for good.
            use_cache=bool(getattr(network.config, "use_cache", True)),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        use_one_device(arguments)  # or each GPU that it sees takes a batch
        trainer = Trainer(model=network, args=arguments, train_dataset=data, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if progress:
            trainer.add_callback(ProgressBar())
        trainer.train()


class ProgressBar(TrainerCallback):
    """The bar alone: the Trainer's own prints its statistics, too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show an empty bar."""
        self._bar = tqdm(total=state.max_steps, desc="warm start", unit="batch", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance it."""
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it away."""
        self._bar.close()
