"""Chat templates of the kinds that instruct models come with, on a small tokenizer."""

from __future__ import annotations

import copy

from transformers import PreTrainedTokenizerBase

from textenvs.text.loading import embedded_tokenizer

LOOP = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {
    # Qwen, SmolLM
    "ChatML": LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + END
    + "<|im_start|>assistant\n{% endif %}",
    "Llama 3": "<|bos|>"
    + LOOP
    + "<|head|>{{ m.role }}<|body|>\n\n{{ m.content | trim }}<|im_end|>"
    + END
    + "<|head|>assistant<|body|>\n\n{% endif %}",
    "Gemma": "<|bos|>{% if messages[0].role == 'system' %}"
    + "{{ raise_exception('no system') }}{% endif %}"
    + LOOP
    + "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<|im_end|>\n"
    + END
    + "<|im_start|>model\n{% endif %}",
    "Mistral": "<|bos|>"
    + LOOP
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    + "{% elif m.role == 'assistant' %} {{ m.content }}<|eos|>"
    + "{% else %}[SYS] {{ m.content }} [/SYS]{% endif %}{% endfor %}",
    "Llama 2": LOOP
    + "{% if m.role == 'user' %}<|bos|>[INST] {{ m.content }} [/INST]"
    + "{% elif m.role == 'assistant' %} {{ m.content }} <|eos|>"
    + "{% else %}[SYS] {{ m.content }} [/SYS]{% endif %}{% endfor %}",
    # What was thought in earlier turns is left out, and the last one has empty thoughts.
    "Qwen 3": LOOP
    + "<|im_start|>{{ m.role }}\n"
    + "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    + "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    + END
    + "<|im_start|>assistant\n{% endif %}",
}
SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|body|>")


def chat_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a template and its special tokens."""
    tokenizer = copy.deepcopy(embedded_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.bos_token = "<|bos|>"
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer
