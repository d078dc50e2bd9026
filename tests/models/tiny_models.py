"""Tiny random causal language models of many families, whose weights are large enough that a wrong mask shows."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama with tied heads": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "attn_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 4,
    },
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 5},
    "olmo2": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0]},
    "gpt2": {},
}

UNPACKABLE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "bloom": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}

ATTENTION_SINKS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
}


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns a model of the family, without dropout, on the attention that transformers gives it."""
    torch.manual_seed(5)
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 700,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    settings = shape | (FAMILIES | UNPACKABLE | ATTENTION_SINKS)[family]
    config = AutoConfig.for_model(family.split(" ")[0], **settings)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)
