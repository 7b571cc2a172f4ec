"""Causal language models of all kinds from configs, small, by the names that users know them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCAB = 64
# The longest sequence, and what layers with a window see of it.
LENGTH, WINDOW = 48, 5
NO_ROLES: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, **NO_ROLES},
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}
PADDED: dict[str, Any] = {**GROUPED, "pad_token_id": 0}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, **NO_ROLES}
BLOOM: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
FALCON: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **NO_ROLES,
}
ALTERNATING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA: dict[str, Any] = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
}
STATES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, **NO_ROLES}
}


def made(model_type: str, **options: Any) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(model_type, **options)
    return config


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "Apertus": lambda: made("apertus", **{**PADDED, "head_dim": 8}),
    "Arcee": lambda: made("arcee", **HEADS),
    "Bamba": lambda: made("bamba", **PADDED, **MAMBA, attn_layer_indices=[1]),
    "BERT as a decoder": lambda: made(
        "bert", **{**SIZES, "pad_token_id": 0}, is_decoder=True, max_position_embeddings=128
    ),
    "BioGPT": lambda: made("biogpt", **{**SIZES, "pad_token_id": 1}, max_position_embeddings=128),
    "BitNet": lambda: made("bitnet", **GROUPED),
    "BLOOM (ALiBi)": lambda: made("bloom", **BLOOM),
    "CodeGen": lambda: made("codegen", **GPT, rotary_dim=4, n_positions=128),
    "Cohere": lambda: made("cohere", **HEADS),
    "Cohere 2 (window)": lambda: made("cohere2", **HEADS, **ALTERNATING),
    "CTRL": lambda: made(
        "ctrl", vocab_size=VOCAB, n_embd=32, dff=64, n_layer=2, n_head=4, n_positions=128
    ),
    "DeepSeek V3": lambda: made(
        "deepseek_v3",
        **{**SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        **{"moe_intermediate_size": 32, "n_shared_experts": 1},
    ),
    "DiffLlama": lambda: made("diffllama", **HEADS),
    "ERNIE 4.5": lambda: made("ernie4_5", **{**PADDED, "head_dim": 8}),
    "EXAONE 4 (window)": lambda: made("exaone4", **HEADS, **ALTERNATING),
    "Falcon": lambda: made("falcon", **FALCON),
    "Falcon (ALiBi)": lambda: made("falcon", **FALCON, alibi=True),
    "Falcon H1": lambda: made(
        "falcon_h1",
        **HEADS,
        **{**MAMBA, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_chunk_size": 8},
    ),
    "Falcon Mamba": lambda: made("falcon_mamba", **STATES),
    "Gemma": lambda: made("gemma", **HEADS),
    "Gemma 2 (window)": lambda: made(
        "gemma2", **HEADS, sliding_window=WINDOW, query_pre_attn_scalar=8
    ),
    "Gemma 3 (window)": lambda: made(
        "gemma3_text", **HEADS, **ALTERNATING, query_pre_attn_scalar=8
    ),
    "Gemma 3n (window)": lambda: made(
        "gemma3n_text",
        **{**HEADS, "intermediate_size": [64, 64], **ALTERNATING},
        **{"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
        **{"num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "GLM": lambda: made("glm", **{**PADDED, "head_dim": 8}),
    "GLM 4": lambda: made("glm4", **{**PADDED, "head_dim": 8}),
    "GPT": lambda: made(
        "openai-gpt", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128
    ),
    "GPT-2": lambda: made("gpt2", **GPT),
    "GPT-BigCode": lambda: made("gpt_bigcode", **GPT, n_positions=128),
    "GPT-J": lambda: made("gptj", **GPT, rotary_dim=4, n_positions=128),
    "GPT-Neo (window)": lambda: made(
        "gpt_neo",
        **{"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **NO_ROLES},
        **{"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        max_position_embeddings=128,
    ),
    "GPT-NeoX, Pythia": lambda: made("gpt_neox", **SIZES),
    "gpt-oss (window)": lambda: made("gpt_oss", **HEADS, **LOCAL_EXPERTS, **ALTERNATING),
    "Granite": lambda: made("granite", **HEADS, logits_scaling=8.0),
    "Granite MoE": lambda: made("granitemoe", **HEADS, **LOCAL_EXPERTS),
    "Granite 4 (hybrid)": lambda: made(
        "granitemoehybrid",
        **HEADS,
        **LOCAL_EXPERTS,
        **MAMBA,
        shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
    ),
    "Helium": lambda: made("helium", **HEADS),
    "Hunyuan": lambda: made("hunyuan_v1_dense", **{**PADDED, "head_dim": 8}),
    "Jamba": lambda: made(
        "jamba",
        **PADDED,
        **{"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8},
        use_mamba_kernels=False,
    ),
    "JetMoE": lambda: made(
        "jetmoe",
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, **NO_ROLES},
        **{"num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8, **LOCAL_EXPERTS},
    ),
    "LFM2": lambda: made("lfm2", **PADDED, layer_types=["conv", "full_attention"]),
    "Llama, SmolLM": lambda: made("llama", **HEADS),
    "Llama 3 (scaled rope)": lambda: made(
        "llama",
        **HEADS,
        max_position_embeddings=128,
        rope_parameters={
            **{"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 16,
        },
    ),
    "Llama 4 (chunks)": lambda: made(
        "llama4_text",
        **HEADS,
        **{"intermediate_size_mlp": 64, "num_local_experts": 4, "attention_chunk_size": WINDOW},
        layer_types=["chunked_attention", "full_attention"],
        **{"no_rope_layers": [1, 0], "moe_layers": [1]},
    ),
    "Mamba": lambda: made("mamba", **STATES),
    "Mamba 2": lambda: made("mamba2", **STATES, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "MiniMax": lambda: made(
        "minimax",
        **{**HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8},
        layer_types=["linear_attention", "full_attention"],
    ),
    "Mistral": lambda: made("mistral", **HEADS, sliding_window=None),
    "Mistral (window)": lambda: made("mistral", **HEADS, sliding_window=WINDOW),
    "Mixtral": lambda: made("mixtral", **HEADS, num_local_experts=4, sliding_window=None),
    "ModernBERT as a decoder (window)": lambda: made(
        "modernbert-decoder",
        **{**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"cls_token_id": 1, "sep_token_id": 2},
        **{"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
    ),
    "MPT (ALiBi)": lambda: made(
        "mpt", vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=128
    ),
    "Nemotron": lambda: made("nemotron", **HEADS),
    "OLMo": lambda: made("olmo", **GROUPED),
    "OLMo 2": lambda: made("olmo2", **GROUPED),
    "OLMo 3 (window)": lambda: made("olmo3", **GROUPED, **ALTERNATING),
    "OLMoE": lambda: made("olmoe", **GROUPED, **EXPERTS),
    "OPT": lambda: made(
        "opt",
        **{"vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    ),
    "Persimmon": lambda: made("persimmon", **SIZES),
    "Phi": lambda: made("phi", **SIZES),
    "Phi 3": lambda: made("phi3", **PADDED, sliding_window=None),
    "Phi 3 (window)": lambda: made("phi3", **PADDED, sliding_window=WINDOW),
    "Phi MoE": lambda: made("phimoe", **HEADS, num_local_experts=4, sliding_window=None),
    "Qwen 2": lambda: made("qwen2", **HEADS),
    "Qwen 2 (window)": lambda: made(
        "qwen2", **HEADS, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "Qwen 2 MoE": lambda: made(
        "qwen2_moe",
        **HEADS,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "Qwen 3": lambda: made("qwen3", **HEADS),
    "Qwen 3 MoE": lambda: made("qwen3_moe", **HEADS, **EXPERTS, moe_intermediate_size=32),
    "Qwen 3 Next": lambda: made(
        "qwen3_next",
        **HEADS,
        **EXPERTS,
        **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        layer_types=["linear_attention", "full_attention"],
    ),
    "RecurrentGemma": lambda: made(
        "recurrent_gemma",
        **{**PADDED, "num_key_value_heads": 1},
        **{"lru_width": 32, "attention_window_size": WINDOW},
        block_types=["recurrent", "attention"],
    ),
    "RoBERTa as a decoder": lambda: made(
        "roberta", **{**SIZES, "pad_token_id": 1}, is_decoder=True, max_position_embeddings=130
    ),
    "RWKV": lambda: made(
        "rwkv",
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        **NO_ROLES,
    ),
    "Seed-OSS": lambda: made("seed_oss", **HEADS),
    "SmolLM 3": lambda: made("smollm3", **PADDED),
    "StableLM": lambda: made("stablelm", **GROUPED),
    "StarCoder 2": lambda: made("starcoder2", **GROUPED, sliding_window=None),
    "XGLM": lambda: made(
        "xglm",
        **{"vocab_size": VOCAB, "d_model": 32, "ffn_dim": 64, "num_layers": 2},
        **{"attention_heads": 4, "max_position_embeddings": 128},
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    ),
    "Zamba 2 (hybrid)": lambda: made(
        "zamba2",
        **{**PADDED, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 8},
        **{
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
        },
        layers_block_type=["mamba", "hybrid"],
    ),
}
