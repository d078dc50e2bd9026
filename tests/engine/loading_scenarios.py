"""What real ranks do in the tests of loading, see ``scenarios.py``."""

import sys
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, modeling_utils
from transformers.integrations import HfDeepSpeedConfig

from dpo_ds.engine import World
from dpo_ds.engine.loading import load_sharded
from dpo_ds.engine.shards import fingerprint, shard_of
from dpo_ds.errors import UserError
from dpo_ds.models.causal_lm import load_causal_lm
from tests.engine.scenarios import DTYPES, REFERENCE_CONFIG, main


def ds_config(dtype: str) -> dict[str, Any]:
    return REFERENCE_CONFIG | {"bf16": {"enabled": dtype == "bfloat16"}}


def by_transformers(model: str, dtype: str) -> PreTrainedModel:
    living = HfDeepSpeedConfig(ds_config(dtype))
    loaded = load_causal_lm(model, dtype=DTYPES[dtype])
    del living
    return loaded


def by_us(model: str, dtype: str, world: World) -> PreTrainedModel:
    return load_sharded(
        model,
        ds_config=ds_config(dtype),
        dtype=DTYPES[dtype],
        attention="auto",
        trust_remote_code=False,
        world=world,
    )


@contextmanager
def tensors_sent_whole():
    """Yields a list that gets, at each load, how many tensors transformers is left to send around."""
    send_whole, counts = modeling_utils._load_state_dict_into_zero3_model, []

    def counted(model, tensors, config):
        counts.append(len(tensors))
        return send_whole(model, tensors, config)

    modeling_utils._load_state_dict_into_zero3_model = counted
    yield counts
    modeling_utils._load_state_dict_into_zero3_model = send_whole


def loads_alike(world: World, model: str, dtype: str, reads_parts: bool = True) -> None:
    with tensors_sent_whole() as sent:
        expected, loaded = by_transformers(model, dtype), by_us(model, dtype, world)
    assert sent[0] > 0
    assert (sent[1] == 0) == reads_parts
    weights = dict(loaded.named_parameters())
    assert list(weights) == [name for name, _ in expected.named_parameters()]  # tied ones are named once
    for name, weight in expected.named_parameters():
        ours, theirs = shard_of(weights[name]).values, shard_of(weight).values
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
        assert weights[name].requires_grad == weight.requires_grad, name
    buffers = dict(loaded.named_buffers())
    assert list(buffers) == [name for name, _ in expected.named_buffers()]
    for name, buffer in expected.named_buffers():
        assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(buffers[name], buffer), name
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (loaded, expected)]
    assert tied[0] == tied[1]
    assert fingerprint(loaded, world) == fingerprint(expected, world)
    assert loaded.config.to_dict() == expected.config.to_dict()
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    assert loaded.name_or_path == expected.name_or_path == model
    assert loaded.training == expected.training


def is_refused(world: World, model: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        by_us(model, "float32", world)


if __name__ == "__main__":
    main(sys.argv[1], globals())
