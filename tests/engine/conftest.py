"""Tiny models of several families, saved as a user would have them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"model_type": "cohere", "num_key_value_heads": 4, "logit_scale": 0.25},
    "granite": {"model_type": "granite", "num_key_value_heads": 2, "logits_scaling": 4.0},
    "phi": {"model_type": "phi", "num_key_value_heads": 4},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **{"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
        **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random tiny models, by family; weights large enough that log-probs differ between tokens."""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for seed, (name, settings) in enumerate(FAMILIES.items()):
        torch.manual_seed(seed)
        sizes = {} if settings["model_type"] == "gpt2" else SMALL
        config = AutoConfig.for_model(**settings, **sizes, vocab_size=64, initializer_range=0.2)
        folders[name] = root / name
        model = AutoModelForCausalLM.from_config(config)
        for _, stored in [*model.named_parameters(), *model.named_buffers()]:
            if not stored.any():  # biases start at zero, where a lost one would not show
                torch.nn.init.normal_(stored, std=0.2)
        model.save_pretrained(folders[name])
    return folders
