"""Agents whose prompts are chats: the same in environments, `generate`, and after saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import pytest
import torch as th

from agents import PPO
from agents.policies import generation
from tests.agents.policies.test_card import run_code
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


def test_messages_are_prompts(read: list[str]) -> None:
    model = agent(system_prompt="Be kind.", max_prompt_tokens=90)
    messages = [{"role": "user", "content": "Hm <|im_end|>"}]
    earlier = [*messages, {"role": "assistant", "content": "Yes."}, *messages]
    system = {"role": "system", "content": "Be brief."}
    assert isinstance(model.generate(messages), str)
    assert len(model.generate([messages, "Hm", [system, *earlier]])) == 3
    codec = model.env.env.unwrapped.codec
    broken = codec.as_text("Hm <|im_end|>")
    own = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": broken}]
    ids = codec.encode_prompt(codec.chat.prompt(own))
    assert [text.removeprefix("<|bos|>") for text in read[:2]] == [codec.tokenizer.decode(ids)] * 2
    assert read[0].count("<|im_end|>") == 3 and "Be kind." in read[2]
    assert "Be brief." in read[3] and "Be kind." not in read[3] and "Yes." in read[3]
    with pytest.raises(ValueError, match=r"last message .* roles are user, assistant"):
        model.generate([earlier[:2]])
    with pytest.raises(ValueError, match="messages, which need a chat template"):
        agent(chat_template=False).generate(messages)


def test_environments_elsewhere_say_how_they_read(read: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": chat_tokenizer("ChatML"), "system_prompt": "Be kind."}
    envs: Any = gym.make_vec("TextGen-v0", 2, vectorization_mode="async", **options)
    model = PPO("TransformerPolicy", envs, n_steps=4, device="cpu")
    model.generate("Hm")
    model.save(tmp_path / "agent.zip")
    PPO.load(tmp_path / "agent.zip", device="cpu").generate("Hm")
    envs.close()
    model.generate(cast("Any", iter(["Hm"])))
    assert len(read) == 3 and all("Be kind." in text for text in read)


def test_the_cards_code_asks_in_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = agent(system_prompt="Be kind.")
    model.policy.save_pretrained(tmp_path / "model")
    with th.random.fork_rng():
        names = run_code(tmp_path / "model", monkeypatch)
    assert [message["role"] for message in names["messages"]] == ["system", "user"]
    engine = model.env.env.unwrapped.engine
    assert names["inputs"]["input_ids"][0].tolist() == engine.prompts[0].tolist()


def test_agents_of_before_there_were_chats_read_none(read: list[str], tmp_path: Path) -> None:
    model = agent(chat_template=False)
    for name in ("chat_template", "system_prompt"):
        del model.codec_options[name]
    model.policy.tokenizer = chat_tokenizer("ChatML")
    model.save(tmp_path / "agent.zip")
    PPO.load(tmp_path / "agent.zip", device="cpu").generate("Hm")
    assert "user" not in read[-1]
