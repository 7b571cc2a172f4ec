"""The model card of a saved folder: what the model was trained on and how, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.policies.base import BackbonePolicy

CARD = """---
library_name: {library}
pipeline_tag: {pipeline}
tags: [reinforcement-learning, textenvs]
{base}---

# {title}

{article} that was trained by reinforcement learning on a text task.

{facts}
## Results

{results}
## How to use it

{note}
```python
from transformers import {loader}, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder{tokenizer})
model = {loader}.from_pretrained(folder)
{inputs}
output = model.generate(
    **inputs,
    do_sample=True,
    temperature={temperature},
    top_k={top_k},
    top_p={top_p},
    max_new_tokens={new_tokens},
    eos_token_id={stops},
    pad_token_id={pad},
)
print(tokenizer.decode(output[0{behind}], skip_special_tokens=True))
```

The critic's value head is in `value_head.safetensors`, how tokens were sampled in `sampling.json`.
"""

# What differs with the kind of model.
KINDS = {
    False: {
        "article": "A causal language model",
        "pipeline": "text-generation",
        "loader": "AutoModelForCausalLM",
        "behind": ', inputs["input_ids"].shape[1] :',
    },
    True: {
        "article": "An encoder-decoder",
        "pipeline": "text2text-generation",
        "loader": "AutoModelForSeq2SeqLM",
        "behind": "",
    },
}
TEXT = 'inputs = tokenizer({prompt!r}, return_tensors="pt")'
CHAT = """messages = {prompt!r}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""

CONFINED = """While it was trained, only some tokens could be said ({what}). The code below does not
confine the model; `generate` of the saved agent does.
"""


def model_card(policy: BackbonePolicy, folder: Path, results: Mapping[str, Any]) -> str:
    """Return a model card in Markdown.

    Args:
        policy: The policy whose model is saved; its `facts` are told.
        folder: Where model and tokenizer are already.
        results: What is known of the results: name and value.
    """
    facts = {name: value for name, value in policy.facts.items() if value is not None}
    prompt = facts.pop("prompt", "Hello")
    adapter = policy.backbone.adapter
    is_adapter = (folder / "adapter_config.json").is_file()
    base = adapter.base if is_adapter and adapter is not None else None
    facts.update({"sampling": ", ".join(f"{k} {v:g}" for k, v in vars(policy.sampling).items())})
    if base is not None:
        facts["adapter"] = f"LoRA of `{base}`, which is loaded with it (needs the package peft)"
    task, space = facts.get("task"), policy.action_space
    own_tokenizer = any(folder.glob("tokenizer*"))
    return CARD.format(
        library="transformers" if base is None else "peft",
        base="" if base is None or Path(base).is_dir() else f"base_model: {base}\n",
        title="Model" if task is None else f"Model of the task {task}",
        facts=_table("setting", facts),
        results=_table("measure", results) if results else "Nothing was measured.\n",
        note=_note(policy),
        tokenizer="" if own_tokenizer else "  # none was saved: give the name of the model's own",
        **KINDS[bool(getattr(policy.backbone.config, "is_encoder_decoder", False))],
        inputs=(TEXT if isinstance(prompt, str) else CHAT).format(prompt=prompt),
        stops=list(getattr(space, "stop_token_ids", ())) or None,
        pad=getattr(space, "pad_token_id", None),
        temperature=policy.sampling.temperature,
        top_k=policy.sampling.top_k,
        top_p=policy.sampling.top_p,
        new_tokens=facts.get("response budget", 32),
    )


def _note(policy: BackbonePolicy) -> str:
    allowed, constraint = policy.masks.allowed, policy.masks.constraint
    what = [] if allowed is None else [f"{int(allowed.sum())} tokens"]
    what += [] if constraint is None else [f"what {type(constraint).__name__} allowed"]
    return CONFINED.format(what=" and ".join(what)) if what else ""


def _table(name: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |".replace("\n", " ") for key, value in values.items()]
    return "\n".join([f"| {name} | value |", "| --- | --- |", *rows, ""])
