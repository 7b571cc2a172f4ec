"""What all tests share: no network, one thread, a Hugging Face tokenizer built on the spot."""

from __future__ import annotations

import os

# Before anything that reads them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

TEXT = (
    "The soup at the corner cafe was warm and full of flavour, and we loved every bite.",
    "User: I would like to book a table for 4 people.\nAgent: What day would you like?",
    "English: Today the small dog sees a cat.\nGerman: Heute sieht der kleine Hund eine Katze.",
    "Review: It was far from great. A friend called it boring, but it was not.\nSentiment:",
    "positive negative Booking: Friday, 7 pm, 4 people, Thai.",
)


def pytest_sessionstart() -> None:
    """Collect no garbage while modules are imported: a third of that time would go there."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what imports have made out of garbage collection: a tenth of the time goes there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch, in tests that import it, to one thread."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C be seen also where the tests are started in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_folder_of_logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let SB3 make no folder for each logger that it configures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SB3_LOGDIR", str(tmp_path_factory.mktemp("logs")))
        yield


@pytest.fixture(scope="session", autouse=True)
def smaller_model() -> Iterator[None]:
    """Make "tiny", of which tests need no more than that it is a model, a fifth as expensive."""
    if "agents" not in sys.modules:
        yield
        return
    from agents.models import causal, loading

    def smaller(vocab_size: int, max_positions: int) -> LlamaConfig:
        config = loading.tiny_config(vocab_size, max_positions)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config.update({**size, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16})
        config.layer_types = None
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "tiny_config", smaller)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_collection_with_each_training() -> Iterator[None]:
    """Let `Trainer` not look for garbage before each training: all of the tests' would be there."""
    if "agents" not in sys.modules:
        yield
        return
    from accelerate.utils import memory

    with pytest.MonkeyPatch.context() as patch:
        clear = memory.clear_device_cache
        patch.setattr(memory, "clear_device_cache", lambda garbage_collection=False: clear())
        yield


@pytest.fixture(scope="session")
def hf_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer like GPT-2's: byte-level BPE whose only special token is EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def hf_tokenizer(hf_tokenizer_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in that folder, whose padding is EOS."""
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(hf_tokenizer_path))
