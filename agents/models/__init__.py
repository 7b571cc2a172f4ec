"""The language models behind policies: loading, LoRA, what they can do."""
