"""A saved folder says what it holds and how to use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch as th

from agents.files import read_json
from agents.policies.export import write_card
from tests.agents.agents import ITERATION, make_agent
from tests.agents.helpers import llama, policy_for, vec_env


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the code of a folder's card there."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_card_tells_the_training_and_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_agent(policy={"temperature": 0.5, "top_k": 7}, kl_coef=0.1).learn(ITERATION)
    model.policy.save_pretrained(tmp_path / "model", results={"reward": "0.5 ± 0.1"})
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in (
        "| task | TextGen |",
        "| environment | TextGen-v0 |",
        "| reward | task x 1, length_penalty x 0.01 |",
        "| algorithm | PPO |",
        "| learning rate | 0.003 |",
        "| kl_coef | 0.1 |",
        f"| tokens of training | {ITERATION} |",
        "| sampling | temperature 0.5, top_k 7, top_p 1 |",
        "| reward | 0.5 ± 0.1 |",
    ):
        assert row in card, row
    assert "split 'train'" in card and "only some tokens could be said (7 tokens)" in card
    with th.random.fork_rng():
        names = run_code(tmp_path / "model", monkeypatch)
    new = names["output"].shape[1] - names["inputs"]["input_ids"].shape[1]
    assert 1 <= new <= 8 and len(capsys.readouterr().out) > 0


def test_the_card_of_an_adapter_names_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    policy_for(vec_env(), llama()).save_pretrained(tmp_path / "base")
    policy = {"model": str(tmp_path / "base"), "peft_config": {"r": 2}}
    model = make_agent(policy=policy)
    model.policy.save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: peft" in card and f"LoRA of `{tmp_path / 'base'}`" in card
    assert "Nothing was measured." in card
    with th.random.fork_rng():
        run_code(tmp_path / "model", monkeypatch)
    model.policy.save_pretrained(tmp_path / "merged", merge=True)
    assert "LoRA" not in (tmp_path / "merged" / "README.md").read_text()
    write_card(model.policy, tmp_path / "model", {"reward": 1})
    assert "| reward | 1 |" in (tmp_path / "model" / "README.md").read_text()


def test_a_policy_by_itself_has_a_card_too(tmp_path: Path) -> None:
    policy_for(vec_env(), llama()).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# Model\n" in card and "none was saved" in card
    assert read_json(tmp_path / "model" / "sampling.json")["temperature"] == 1
