"""Further arguments of `from_pretrained`: code of a model's own, few bits, other attention."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch as th

from agents import PPO, Run, RunSpec
from tests.agents.agents import ITERATION, collect, make_agent, same, train, weights
from tests.agents.helpers import llama, policy_for, vec_env
from textenvs.text.loading import embedded_tokenizer, load_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("init_kwargs") / "model"
    policy_for(vec_env(), llama()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same model, whose code is beside it."""
    copy = shutil.copytree(folder, tmp_path / "with_code")
    (copy / "own_code.py").write_text(CODE)
    config = json.loads((copy / "config.json").read_text())
    places = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    config |= {"model_type": "own", "auto_map": places}
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def test_they_are_given_on_and_saved_agents_need_none(folder: str, tmp_path: Path) -> None:
    eager = {"model": folder, "model_init_kwargs": {"attn_implementation": "eager"}}
    model = make_agent(policy=eager)
    assert model.policy.backbone.capabilities.packs == (
        "its attention is 'eager', and only 'sdpa' is packed"
    )
    model.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", device="cpu")
    assert same(weights(model.policy), weights(loaded.policy))
    assert model.policy_kwargs["model_init_kwargs"] is None


def test_what_is_given_elsewhere(folder: str) -> None:
    for name, value in (("dtype", th.float16), ("torch_dtype", "auto"), ("device_map", "cpu")):
        with pytest.raises(ValueError, match=f"model_init_kwargs must not have {name}: "):
            make_agent(policy={"model": folder, "model_init_kwargs": {name: value}})
    with pytest.raises(ValueError, match="made from a config: leave them out"):
        make_agent(policy={"model_init_kwargs": {"revision": "main"}})


def test_code_of_a_model_runs_if_it_is_trusted(own: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could be loaded from .*trust_remote_code"):
        make_agent(policy={"model": own})
    trusted = {"model": own, "model_init_kwargs": {"trust_remote_code": True}}
    options: dict[str, Any] = {"kl_coef": 0.1, "learning_rate": 1e-3}
    model = make_agent(policy={**trusted, "value_model": "copy"}, **options)
    assert type(model.policy.backbone.model).__name__ == "OwnModel"
    assert model.policy.backbone.capabilities.caches is None
    model.learn(ITERATION)
    assert model.logger.name_to_value["train/first_ratio_error"] < 1e-5
    model.policy.save(tmp_path / "policy")
    policy = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    assert same(weights(model.policy), weights(policy))
    model.save(tmp_path / "agent.zip")
    model.learn(ITERATION, reset_num_timesteps=False)
    loaded = PPO.load(tmp_path / "agent.zip", env=make_agent().env, device="cpu")
    loaded.learn(ITERATION, reset_num_timesteps=False)
    assert same(weights(model.policy), weights(loaded.policy))
    model.policy.save_pretrained(tmp_path / "folder")
    again = make_agent(policy={**trusted, "model": str(tmp_path / "folder")})
    assert same(weights(again.policy.backbone), weights(model.policy.backbone))
    # What is saved names the code: a process that has not seen it imports it from there.
    beside = {**trusted, "value_model": own}
    several = make_agent(policy=beside, kl_coef=0.1, ref_model=own)
    assert several.ref_config == several.policy_kwargs["value_model"] == own
    assert several.policy_kwargs["model"] == own


def test_code_of_the_model_of_a_run(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    with pytest.raises(ValueError, match="No tokenizer could be loaded"):
        load_tokenizer(own)
    embedded_tokenizer().save_pretrained(own)
    spec = RunSpec("TextGen-v0", model=own, timesteps=64, num_envs=2, n_steps=8, warm_start=0)
    spec = replace(spec, eval_examples=2)
    with pytest.raises(ValueError, match="or --trust-remote-code on the command line"):
        Run.create(spec, tmp_path / "run").train()
    run = Run.create(replace(spec, trust_remote_code=True), tmp_path / "run")
    run.train()
    assert type(run.load_agent(device="cpu").policy.backbone.model).__name__ == "OwnModel"


def test_what_is_this_users_is_not_saved(folder: str, tmp_path: Path) -> None:
    own_own = {"token": "hf_SECRET", "attn_implementation": "eager"}
    policy = {"model": folder, "model_init_kwargs": own_own, "peft_config": {"r": 2}}
    model = make_agent(policy=policy)
    model.save(tmp_path / "agent.zip")
    assert model.policy_kwargs["model_init_kwargs"] == {"attn_implementation": "eager"}
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        assert not any(b"SECRET" in archive.read(name) for name in archive.namelist())


def test_another_model_is_found_by_its_name_alone(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "inner")
    inner = {"model": str(tmp_path), "model_init_kwargs": {"subfolder": "inner"}}
    model = make_agent(policy={**inner, "value_model": folder}, kl_coef=0.1, ref_model=folder)
    assert same(weights(model.policy.backbone), weights(model.reference))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_beside_few_bits(bits: int, folder: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    few = {f"load_in_{bits}bit": True, "bnb_4bit_compute_dtype": th.float32}
    init_kwargs = {"quantization_config": BitsAndBytesConfig(**few)}
    quantised = {"model": folder, "model_init_kwargs": init_kwargs}
    with pytest.raises(ValueError, match="Weights that are quantised cannot be trained"):
        make_agent(policy=quantised)
    options: dict[str, Any] = {"kl_coef": 0.1, "learning_rate": 1e-3}
    model = make_agent(policy={**quantised, "peft_config": {"r": 2}}, **options)
    layers = {type(part).__name__ for part in model.policy.backbone.model.modules()}
    assert layers & {"Linear4bit", "Linear8bitLt"}
    # Eight bits round what is read, too, and by what is beside it.
    error = train(collect(model)).log["train/first_ratio_error"]
    assert error < (1e-5 if bits == 4 else 0.5)
    model.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", device="cpu")
    assert same(weights(model.policy), weights(loaded.policy))
    with pytest.raises(ValueError, match=r"quantised ones cannot be loaded: save the agent"):
        model.policy.save(tmp_path / "policy")
    model.policy.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="not merged into weights that are quantised"):
        model.policy.save_pretrained(tmp_path / "merged", merge=True)
