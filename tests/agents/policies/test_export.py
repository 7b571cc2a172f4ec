"""Folders that are saved: `generate` ends turns and samples as the policy was trained to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch as th
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from tests.agents.helpers import gpt2, llama, policy_for, vec_env
from textenvs.text.loading import EMBEDDED_TOKENIZER, embedded_tokenizer


def a_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded one, with another EOS than the base model's."""
    return PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED_TOKENIZER), eos_token="!")


def a_base_model(folder: Path) -> Path:
    """A folder in half precision whose settings for generation are somebody else's."""
    model: Any = AutoModelForCausalLM.from_config(llama(eos_token_id=7, bos_token_id=3))
    model.generation_config = GenerationConfig(
        eos_token_id=7, do_sample=True, top_k=50, repetition_penalty=1.3, max_length=20
    )
    model.to(th.bfloat16).save_pretrained(folder)
    embedded_tokenizer().save_pretrained(str(folder))
    return folder


def test_what_is_saved_ends_turns_and_samples_as_it_was_trained(tmp_path: Path) -> None:
    env = vec_env(tokenizer=a_chat_tokenizer(), max_new_tokens=8, stop=[9])
    base = str(a_base_model(tmp_path / "base"))
    with pytest.warns(UserWarning, match=r"tokens \[7\], but .* make it with stop=\[7\]"):
        policy = policy_for(env, base, temperature=0.5, top_p=0.9)
    policy.save_pretrained(tmp_path / "saved", env.get_attr("tokenizer")[0])
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (eos,) = embedded_tokenizer().encode("!")
    assert config["eos_token_id"] == [eos, 9] and config["bos_token_id"] == 3
    assert config["dtype"] == "bfloat16"
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == th.bfloat16
    settings = loaded.generation_config
    assert (settings.eos_token_id, settings.max_new_tokens) == ([eos, 9], 8)
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (
        (True, 0.5, 0, 0.9)
    )
    assert settings.repetition_penalty in (None, 1.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == eos
    # Another environment made with the folder stops alike.
    again = vec_env(tokenizer=str(tmp_path / "saved"), max_new_tokens=8)
    assert again.action_space.stop_token_ids == env.action_space.stop_token_ids


def test_generate_stops_where_the_policy_does(tmp_path: Path) -> None:
    env = vec_env(tokenizer=a_chat_tokenizer(), stop=9)
    policy = policy_for(env, gpt2(n_layer=1, tie_word_embeddings=False), top_k=1)
    with th.no_grad():
        network = policy.backbone.model
        network.transformer.ln_f.weight.zero_()
        network.transformer.ln_f.bias.fill_(1)
        network.lm_head.weight[9] = 5.0
    policy.save_pretrained(tmp_path / "saved")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    prompt = th.tensor([[5, 6, 7]])
    said = loaded.generate(prompt, attention_mask=th.ones_like(prompt))
    assert said.tolist() == [[5, 6, 7, 9]]
    assert int(policy.predict(env.reset(), deterministic=True)[0][0]) == 9
