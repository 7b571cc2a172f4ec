"""What is loaded is what was meant, fits, or is refused with the cause and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from agents import A2C, PPO, TransformerPolicy
from agents.models.causal import CausalBackbone
from tests.agents.agents import collect, make_agent, train
from tests.agents.architectures import ARCHITECTURES
from tests.agents.helpers import EOS, VOCAB, gpt2, llama, policy_for, ragged, vec_env
from textenvs.text.loading import embedded_tokenizer


def words_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("<eos>", "<unk>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", model_max_length=512
    )


def save(folder: Path, tokenizer: Any, **changes: Any) -> str:
    with th.random.fork_rng():
        th.manual_seed(0)
        LlamaForCausalLM(llama(**changes)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that was trained with the embedded tokenizer."""
    return save(tmp_path_factory.mktemp("own"), embedded_tokenizer())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of as many tokens, each of which means something else."""
    words = words_tokenizer(*(f"w{i}" for i in range(VOCAB - 2)))
    return save(tmp_path_factory.mktemp("other"), words)


def agent(model: str, env: Any = None, cls: Any = PPO, **kwargs: Any) -> Any:
    envs = gym.make_vec("TextGen-v0", num_envs=2) if env is None else env
    policy = {"model": model, **kwargs.pop("policy", {})}
    return cls("TransformerPolicy", envs, policy_kwargs=policy, device="cpu", **kwargs)


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [PPO, A2C])
def test_another_tokenizer_than_the_models_shows_the_line_to_write(cls: Any, other: str) -> None:
    with pytest.raises(ValueError, match="ids mean something else") as raised:
        agent(other, cls=cls)
    line = str(raised.value)[str(raised.value).index("gym.make_vec(") :]
    envs = eval(line, {"gym": gym})
    assert envs.num_envs == 2 and envs.tokenizer.name_or_path == other
    agent(other, envs, cls=cls)


def test_the_models_own_tokenizer_is_welcome(own: str, tmp_path: Path) -> None:
    """Also with tokens that a user has added, and where the model has none to compare with."""
    agent(own)
    more = PreTrainedTokenizerFast.from_pretrained(own)
    more.add_tokens(["<think>"])
    agent(own, gym.make_vec("TextGen-v0", num_envs=2, tokenizer=more))
    agent(save(tmp_path / "bare", None))


@pytest.mark.parametrize("role", ["ref_model", "value_model"])
def test_other_models_beside_the_policys_have_tokenizers_too(role: str, other: str) -> None:
    kwargs = {"ref_model": other, "kl_coef": 0.1} if role == "ref_model" else {}
    policy = {"value_model": other} if role == "value_model" else {}
    with pytest.raises(ValueError, match="is not that of the model"):
        agent("tiny", policy=policy, **kwargs)


def test_a_saved_agent_knows_its_tokenizer(other: str, tmp_path: Path) -> None:
    own = words_tokenizer(*(f"{i}w" for i in range(VOCAB - 2)))
    budgets: dict[str, Any] = {"num_envs": 2, "max_prompt_tokens": 64, "max_new_tokens": 8}
    envs = [gym.make_vec("TextGen-v0", **budgets, tokenizer=t) for t in (own, other)]
    agent("tiny", envs[0]).save(tmp_path / "agent")
    PPO.load(tmp_path / "agent", env=envs[0], device="cpu")
    with pytest.raises(ValueError, match="is not that of the saved agent"):
        PPO.load(tmp_path / "agent", env=envs[1], device="cpu")


# --- Ids that a model lacks -----------------------------------------------------------------------


def added_pad() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=embedded_tokenizer().backend_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|eos|>", "pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCAB
    return tokenizer


@pytest.mark.parametrize("config", [gpt2, llama])
@pytest.mark.parametrize("packs", [True, False])
def test_ids_that_the_model_lacks_are_never_emitted_nor_read(config: Any, packs: bool) -> None:
    model = make_agent(
        env={"tokenizer": added_pad()},
        policy={"model": config(n_layer=1) if config is gpt2 else config(), "allowed_tokens": None},
    )
    policy = model.policy
    assert policy.vocab_size == policy.backbone.num_logits == VOCAB < model.action_space.n
    if not packs:
        vars(policy.backbone)["capabilities"] = type(policy.backbone.capabilities)(packs="no")
    assert train(collect(model)).log["train/first_ratio_error"] < 1e-5
    obs, _ = policy.obs_to_tensor(model.env.reset())
    assert policy.get_distribution(obs).log_probs.shape == (4, VOCAB)


def test_prompts_of_ids_that_the_model_lacks() -> None:
    with pytest.raises(ValueError, match=r"The prompts hold the token .* has only 300: .*resize"):
        make_agent(policy={"model": llama(vocab_size=300), "allowed_tokens": None})
    policy = policy_for(vec_env(), llama(vocab_size=300))
    for ask in (policy.backbone.last_hidden, policy.backbone.next_hidden):
        with pytest.raises(ValueError, match="it is to read the token 300"):
            ask(ragged([[5, 6], [7, 300, 8]]))
    with pytest.raises(ValueError, match=r"allowed_tokens must be ids in \[0, 300\)"):
        policy_for(vec_env(), llama(vocab_size=300), allowed_tokens=[1, 300])


def test_a_model_that_cannot_end_a_turn() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=embedded_tokenizer().backend_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|the end|>"})
    with pytest.raises(ValueError, match=rf"{VOCAB + 1} tokens .* only {VOCAB}, .* ends a turn"):
        make_agent(env={"tokenizer": tokenizer}, policy={"allowed_tokens": None})


def test_a_reference_of_fewer_tokens(tmp_path: Path) -> None:
    folder = save(tmp_path / "small", None, vocab_size=300)
    with pytest.raises(ValueError, match=f"emits {VOCAB} tokens, .* knows only 300"):
        make_agent(ref_model=folder, kl_coef=0.1)


# --- Causes ---------------------------------------------------------------------------------------


def test_a_damaged_file_is_the_cause(own: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(own).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"SafetensorError: .*") as raised:
        policy_for(vec_env(), str(folder))
    assert "connection" not in str(raised.value) and raised.value.__cause__ is not None
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not a valid JSON"):
        policy_for(vec_env(), str(folder))
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}')
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        policy_for(vec_env(), str(folder))


def test_of_several_files_the_damaged_one_is_named(tmp_path: Path) -> None:
    LlamaForCausalLM(llama()).save_pretrained(tmp_path, max_shard_size="40KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    policy_for(vec_env(), str(tmp_path))
    files[1].write_bytes(files[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"the file {files[1].name} is damaged.*SafetensorError"):
        policy_for(vec_env(), str(tmp_path))
    files[1].unlink()
    with pytest.raises(ValueError, match=files[1].name):
        policy_for(vec_env(), str(tmp_path))


def dtype_of(folder: Path) -> th.dtype:
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    (found,) = {parameter.dtype for parameter in model.parameters()}
    assert model.config.dtype == found
    return found


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16, th.float32])
def test_a_checkpoint_keeps_its_precision(dtype: th.dtype, tmp_path: Path) -> None:
    """It is trained in float32, and an agent keeps that; a folder is as it was."""
    made: Any = LlamaForCausalLM(llama())
    made.to(dtype).save_pretrained(tmp_path / "model")
    model = make_agent(policy={"model": str(tmp_path / "model")})
    assert {p.dtype for p in model.policy.parameters()} == {th.float32}
    model.save(tmp_path / "agent.zip")
    again = PPO.load(tmp_path / "agent.zip", device="cpu")
    policies: dict[str, Any] = {"made": model.policy, "loaded": again.policy}
    for name, policy in policies.items():
        policy.save_pretrained(tmp_path / name)
        assert dtype_of(tmp_path / name) == dtype
        assert {p.dtype for p in policy.parameters()} == {th.float32}
    lora: Any = make_agent(policy={"model": str(tmp_path / "model"), "peft_config": {"r": 2}})
    lora.policy.save_pretrained(tmp_path / "merged", merge=True)
    assert dtype_of(tmp_path / "merged") == dtype


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16])
def test_what_a_checkpoint_has_in_float32_stays_so(dtype: th.dtype, tmp_path: Path) -> None:
    made: Any = AutoModelForCausalLM.from_config(ARCHITECTURES["DeepSeek V3"](), dtype=dtype)
    made.config.dtype = dtype
    made.save_pretrained(tmp_path / "model")
    backbone = CausalBackbone(str(tmp_path / "model"), 64, 48)
    bias = [n for n in backbone.model.state_dict() if n.endswith("e_score_correction_bias")]
    with th.no_grad():
        for name in bias:
            backbone.model.get_buffer(name).normal_()
    backbone.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert bias and {name: value.dtype for name, value in saved.items()} == {
        name: th.float32 if name in bias else dtype for name in saved
    }
    assert all(th.equal(saved[name], backbone.model.get_buffer(name)) for name in bias)


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path: Path) -> None:
    config = llama(tie_word_embeddings=False)
    AutoModel.from_config(config).save_pretrained(tmp_path / "trunk")
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM, .*lm_head"):
        policy_for(vec_env(), str(tmp_path / "trunk"))


def test_an_encoder_reads_both_ways_unless_it_is_told_not_to() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCAB, intermediate_size=32, **sizes)
    with pytest.raises(ValueError, match="does not read from left to right"):
        policy_for(vec_env(), config)


# --- Heads ----------------------------------------------------------------------------------------

GROUPED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEADS: dict[str, Any] = {
    "soft-cap": Gemma2Config(**GROUPED, sliding_window=512, final_logit_softcapping=0.5),
    "factor": CohereConfig(**GROUPED),
    "divisor": GraniteConfig(**GROUPED, logits_scaling=8.0),
}


@pytest.mark.parametrize("name", list(HEADS))
def test_what_a_model_does_behind_its_output_layer_is_the_backbones(name: str) -> None:
    model = make_agent(policy={"model": HEADS[name], "value_model": "copy"}, kl_coef=0.1)
    backbone = model.policy.backbone
    assert not backbone.linear_head and backbone.capabilities.caches is None
    tokens = th.tensor([[5, 6, 7, 8]])
    with th.no_grad():
        hidden = backbone.trunk(input_ids=tokens, use_cache=False)[0]
        expected = backbone.model(tokens).logits[0]
        plain = backbone.model.get_output_embeddings()(hidden)
        assert th.equal(backbone.logits(hidden), expected)
        assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
        th.testing.assert_close(backbone.decoder.head(hidden), expected, rtol=1e-5, atol=1e-5)
    for _ in range(2):
        assert train(collect(model)).log["train/first_ratio_error"] < 1e-5
    assert abs(model.rollout_buffer.ref_log_probs).max() > 0.1


def test_embeddings_of_another_width_than_the_layers() -> None:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=1,
        do_layer_norm_before=False,
    )
    model = make_agent(policy={"model": config})
    assert model.policy.backbone.hidden_size == 16
    assert train(collect(model)).log["train/first_ratio_error"] < 1e-5


# --- Rotary embeddings that depend on the longest row ---------------------------------------------


def rope(kind: str, original: int, longest: int) -> LlamaConfig:
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        parameters |= {"original_max_position_embeddings": original}
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return llama(max_position_embeddings=longest, rope_parameters=parameters)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_that_follows_the_longest_row_is_refused_beyond_its_length(kind: str) -> None:
    env = vec_env(max_prompt_tokens=30, max_new_tokens=20)
    longest = 50 if kind == "dynamic" else 200
    policy_for(env, rope(kind, 50, longest))
    with pytest.raises(ValueError, match=rf"50 tokens, but beyond 49 .*'{kind}'.*longest row"):
        policy_for(env, rope(kind, 49, longest - (kind == "dynamic")))


def test_rope_that_is_the_same_for_all_lengths_goes_on() -> None:
    parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    env = vec_env(max_prompt_tokens=30, max_new_tokens=20)
    policy_for(env, llama(rope_parameters=parameters))


# --- Padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [llama, gpt2])
def test_eos_learns_though_it_pads(config: Any) -> None:
    model = make_agent(
        "several turns",
        policy={"model": config(pad_token_id=EOS, tie_word_embeddings=False)},
        learning_rate=1e-2,
    )
    weight = model.policy.backbone.model.get_input_embeddings().weight
    before = weight.detach().clone()
    collect(model)
    train(model)
    assert not th.equal(weight[EOS], before[EOS])
    assert th.equal(weight[VOCAB - 1], before[VOCAB - 1])  # which is never read


def test_a_tokenizer_that_cannot_be_compared_is_told(tmp_path: Path) -> None:
    own = str(tmp_path)
    policy_for(vec_env(), llama()).save_pretrained(own)
    embedded_tokenizer().save_pretrained(own)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be compared .* tokenizer\.json is damaged"):
        make_agent(policy={"model": own})


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.skipif(th.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    model = make_agent()
    model.save(tmp_path / "agent")
    model.policy.save(str(tmp_path / "policy.pt"))
    asks: list[Any] = [
        lambda: make_agent(device="cuda"),
        lambda: PPO.load(tmp_path / "agent", device="cuda:1"),
        lambda: TransformerPolicy.load(str(tmp_path / "policy.pt"), device="cuda"),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=r"device is 'cuda(:1)?', but torch sees no such"):
            ask()
    PPO("MlpPolicy", "CartPole-v1", device="cuda")  # as in SB3, which takes the CPU
