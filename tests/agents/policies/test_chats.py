"""Agents whose prompts are chats: the same in environments, `generate`, and after saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from agents import PPO
from agents.policies import generation
from tests.textenvs.chats import TEMPLATES, chat_tokenizer
from textenvs.text.codec import TextCodec


def agent(**env: Any) -> Any:
    options: dict[str, Any] = {"tokenizer": chat_tokenizer("ChatML"), "max_new_tokens": 4, **env}
    envs: Any = gym.make_vec("TextGen-v0", num_envs=2, **options)
    return PPO("TransformerPolicy", envs, n_steps=4, seed=0, device="cpu")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the policy is given to answer."""
    seen: list[str] = []

    def respond(policy: Any, codec: TextCodec, prompts: Any, *_: Any) -> list[Any]:
        seen.extend(str(codec.tokenizer.decode(prompt)) for prompt in prompts)
        return [prompt[:0] for prompt in prompts]

    monkeypatch.setattr(generation, "_respond", respond)
    return seen


def test_generate_reads_what_was_trained_with(read: list[str], tmp_path: Path) -> None:
    spoken = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    spoken += "{% if add_generation_prompt %}[assistant]{% endif %}"
    chat = "<|im_start|>user\nHm<|im_end|>\n<|im_start|>assistant\n"
    for options, expected in (
        ({}, chat),
        ({"system_prompt": "Be kind."}, f"<|im_start|>system\nBe kind.<|im_end|>\n{chat}"),
        ({"chat_template": spoken}, "[user] Hm [assistant]"),
        ({"chat_template": False}, "<|bos|>Hm"),
    ):
        model = agent(**options)
        model.generate("Hm")
        model.save(tmp_path / "agent.zip")
        PPO.load(tmp_path / "agent.zip", device="cpu").generate("Hm")
        assert [text.removeprefix("<|bos|>") for text in read[-2:]] == [
            expected.removeprefix("<|bos|>")
        ] * 2
        # A folder has the template that its prompts were made with.
        model.policy.save_pretrained(tmp_path / "model")
        folder = TextCodec(str(tmp_path / "model"))
        used = options.get("chat_template", TEMPLATES["ChatML"])
        assert (folder.chat is None) == (used is False)
        assert used is False or folder.tokenizer.chat_template == used


def test_agents_of_before_there_were_chats_read_none(read: list[str], tmp_path: Path) -> None:
    model = agent(chat_template=False)
    for name in ("chat_template", "system_prompt"):
        del model.codec_options[name]
    model.policy.tokenizer = chat_tokenizer("ChatML")
    model.save(tmp_path / "agent.zip")
    PPO.load(tmp_path / "agent.zip", device="cpu").generate("Hm")
    assert "user" not in read[-1]
