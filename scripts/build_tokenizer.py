"""Build the embedded tokenizer: a byte-level BPE over the texts of the tasks of the package.

    python scripts/build_tokenizer.py

The result is the same on every machine: the texts are procedural and seeded.
"""

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from textenvs.registration import BUILTIN_TASKS, load_task
from textenvs.task import Task, Transcript, Turn
from textenvs.text.loading import EMBEDDED_TOKENIZER, EOS_TOKEN, PAD_TOKEN

VOCABULARY = 2048

# Dialogues are sampled; a word that none of them holds is spelt with more tokens, nothing worse.
CONVERSATIONS = 500


def texts(task: Task) -> Iterator[str]:
    """Yield what is read and written in a task, as a model meets it."""
    for example in task.examples("train"):
        yield str(task.prompt(example))
        yield from (f" {reference}" for reference in example.references)
    yield from (f" {choice}" for choice in task.choices or ())
    if task.max_turns > 1:
        rng = np.random.default_rng(0)
        for example in task.examples("train")[:CONVERSATIONS]:
            turns: tuple[Turn, ...] = (Turn("user", example.prompt),)
            for _ in range(task.max_turns):
                response = task.demonstrate(example, turns, rng)
                yield f" {response}"
                turns = (*turns, Turn("agent", response))
                reply = task.reply(Transcript(example, turns), rng)
                if reply is None:
                    break
                yield task.format_reply(reply)
                turns = (*turns, Turn("user", reply))


def build() -> Tokenizer:
    """Train the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (text for name in BUILTIN_TASKS for text in texts(load_task(name)))
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


if __name__ == "__main__":
    EMBEDDED_TOKENIZER.parent.mkdir(exist_ok=True)
    build().save(str(EMBEDDED_TOKENIZER))
