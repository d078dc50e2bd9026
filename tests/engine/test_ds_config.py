"""The DeepSpeed configs: the shipped ones, and what is refused."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dpo_ds.engine.ds_config import policy_ds_config, reference_ds_config, stated_values
from dpo_ds.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
POLICIES = [path for path in SHIPPED if "reference" not in path.stem]
REFERENCES = [path for path in SHIPPED if "reference" in path.stem]
STAGE_3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def written(tmp_path):
    """Writes a ds_config, given as text or as an object."""

    def write(content: object) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def policy(path: Path, *, dtype: str = "bfloat16", gradient_clipping: float = 1.0) -> dict:
    return policy_ds_config(path, dtype=dtype, gradient_clipping=gradient_clipping)


def test_every_situation_has_its_files():
    assert {path.stem for path in SHIPPED} == {
        "zero3",
        "zero3_hpz",
        "zero3_reference_hpz",
        "zero3_offload_optimizer",
        "zero3_offload_parameters",
        "zero3_cpu",
        "zero3_large_cpu",
        "zero3_reference",
        "zero3_reference_offload",
        "zero3_reference_cpu",
    }
    table = (SHIPPED[0].parent / "README.md").read_text()
    assert all(path.name in table for path in SHIPPED)


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("dtype", "section"), [("float32", None), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_a_shipped_policy_config_is_one_that_deepspeed_reads_as_meant(path, dtype, section):
    config = DeepSpeedConfig(policy(path, dtype=dtype, gradient_clipping=0.5))
    assert config.zero_optimization_stage == 3
    assert config.bfloat16_config.enabled == (section == "bf16")
    assert config.float16_config.enabled == (section == "fp16")
    assert config.gradient_clipping == 0.5
    assert config.grad_accum_dtype == "fp32"
    assert not config.managed_gradient_accumulation
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (1, 1)
    assert config.optimizer_name is None
    assert config.scheduler_name is None


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shipped_reference_config_shards_and_has_no_optimizer(path, dtype):
    config = DeepSpeedConfig(reference_ds_config(path, dtype=dtype))
    assert config.zero_optimization_stage == 3
    assert config.bfloat16_config.enabled == (dtype == "bfloat16")
    assert config.optimizer_name is None
    assert config.zero_config.offload_optimizer is None
    # Without a backward no weight is used again soon.
    assert config.zero_config.max_reuse_distance == 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_offloads_what_its_name_says(path):
    zero = json.loads(path.read_text())["zero_optimization"]
    offloaded = {key for key in ("offload_param", "offload_optimizer") if key in zero}
    assert offloaded == {
        "zero3_offload_optimizer": {"offload_optimizer"},
        "zero3_offload_parameters": {"offload_param", "offload_optimizer"},
        "zero3_reference_offload": {"offload_param"},
        "zero3_large_cpu": {"offload_optimizer"},
    }.get(path.stem, set())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_states_nothing_that_the_run_file_owns(path):
    assert stated_values(path) == {}


def test_own_settings_of_a_dtype_are_kept(written):
    config = policy(written({**STAGE_3, "bf16": {"check_grad_overflow": False}}))
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}


def test_names_that_deepspeed_has_twice_are_known(written):
    policy(written({"zero_optimization": {"stage": 3, "param_persistence_threshold": 0}}))
    policy(written({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))


def test_other_keys_of_deepspeed_reach_it(written):
    config = policy(written({**STAGE_3, "wall_clock_breakdown": True, "aio": {"block_size": 4096}, "timers": {}}))
    assert config["wall_clock_breakdown"] is True
    assert config["aio"] == {"block_size": 4096}


def test_stated_values_are_named_as_in_the_run_file(written):
    path = written({**STAGE_3, "fp16": {"enabled": True}, "bf16": {"enabled": False}, "gradient_clipping": 2})
    assert stated_values(path) == {"model.dtype": "float16", "train.gradient_clipping": 2.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n  3", "line 2: not valid JSON: "),
        ('{"a": 1, "a": 2}', ": a is given twice"),
        ([1], r" must hold a DeepSpeed config, which is an object, got \[1\]"),
        (
            {**STAGE_3, "zero_allow_untrusted_optimizer": True},
            r"knows no key zero_allow_untrusted_optimizer; did you mean zero_allow_untested_optimizer\?",
        ),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            r"knows no key zero_optimization.overlap_com; did you mean zero_optimization.overlap_comm\?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            r"knows no key zero_optimization.offload_param.devise; did you mean .*offload_param.device\?",
        ),
        ({**STAGE_3, "bf16": {"enable": True}}, r"knows no key bf16.enable; did you mean bf16.enabled\?"),
        (
            {**STAGE_3, "data_types": {"grad_accum_type": "fp32"}},
            r"knows no key data_types.grad_accum_type; did you mean data_types.grad_accum_dtype\?",
        ),
        ({**STAGE_3, "aio": {"blok_size": 1}}, r"knows no key aio.blok_size; did you mean aio.block_size\?"),
        ({**STAGE_3, "bf16": True}, ": bf16 must be an object, got true"),
        ({"zero_optimization": True}, ": zero_optimization must be an object, got true"),
        ({**STAGE_3, "aio": 3}, ": aio must be an object, got 3"),
        ({"zero_optimization": {"stage": 2}}, ": zero_optimization.stage must be 3, got 2"),
        ({}, ": zero_optimization.stage must be 3, got null"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            ': zero_optimization.reduce_bucket_size is "auto"',
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0.5}},
            "stage3_prefetch_bucket_size: Input should be a valid integer, .*got 0.5",
        ),
        ({**STAGE_3, "tensorboard": {"enabled": "perhaps"}}, "enabled: Input should be a valid boolean"),
        ({**STAGE_3, "amp": {}}, "DeepSpeed refuses it: NVIDIA Apex AMP integration has been removed"),
        ({**STAGE_3, "gradient_allreduce_op": "sum"}, "DeepSpeed refuses it: .* not supported with ZeRO stage 3"),
        ({**STAGE_3, "train_batch_size": 8}, ": train_batch_size must not be here: train.pairs_per_step says"),
        ({**STAGE_3, "train_micro_batch_size_per_gpu": 8}, "per_gpu must not be here: train.tokens_per_micro_batch"),
        ({**STAGE_3, "gradient_accumulation_steps": 8}, "steps must not be here: it follows from train.pairs_per_step"),
        ({**STAGE_3, "managed_gradient_accumulation": True}, "accumulation must not be here: the number of micro-b"),
        ({**STAGE_3, "compile": {"deepcompile": True}}, "compile.deepcompile must not be here: DeepCompile wants"),
        ({**STAGE_3, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel must not be here: ZeRO-3 shards every"),
        (
            {**STAGE_3, "torch_autocast": {"enabled": True}},
            "torch_autocast must not be here: weights are of model.dtype",
        ),
        ({**STAGE_3, "scheduler": {"type": "WarmupLR"}}, ": scheduler must not be here: train.schedule"),
        ({**STAGE_3, "optimizer": {"type": "AdamW"}}, ": optimizer must not be here: "),
        (
            {**STAGE_3, "bf16": {"bf16_master_weights_and_grads": True}},
            "grads must not be here: at DPO",
        ),
        ({**STAGE_3, "bfloat16": {"enabled": True}}, ': bfloat16 must not be here: its name is "bf16"'),
    ],
)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_wrong_config_is_one_line_that_names_file_and_key(written, content, message, role):
    path = written(content)
    with pytest.raises(UserError, match=message) as raised:
        policy(path) if role == "policy" else reference_ds_config(path, dtype="bfloat16")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, but model.dtype is bfloat16"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, but model.dtype is bfloat16"),
    ],
)
def test_a_dtype_that_contradicts_the_runs_is_refused(written, section, message):
    path = written({**STAGE_3, **section})
    with pytest.raises(UserError, match=message):
        policy(path)
    with pytest.raises(UserError, match=message):
        reference_ds_config(path, dtype="bfloat16")


def test_a_clipping_that_contradicts_the_runs_is_refused(written):
    with pytest.raises(UserError, match=r"gradient_clipping is 0.5, but train.gradient_clipping is 1.0"):
        policy(written({**STAGE_3, "gradient_clipping": 0.5}))
    assert policy(written({**STAGE_3, "gradient_clipping": 1}))["gradient_clipping"] == 1.0


def test_a_clipping_that_is_no_number_is_refused(written):
    with pytest.raises(UserError, match='gradient_clipping must be a number, got "much"'):
        stated_values(written({**STAGE_3, "gradient_clipping": "much"}))


def test_gradients_are_summed_in_fp32(written):
    with pytest.raises(UserError, match=r'data_types.grad_accum_dtype must be "fp32", got "bf16"'):
        policy(written({**STAGE_3, "data_types": {"grad_accum_dtype": "bf16"}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**STAGE_3, "gradient_clipping": 1.0}, "gradient_clipping must not be here: a reference has no gradients"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            r"zero_optimization.offload_optimizer must not be here: a reference has no optimizer",
        ),
    ],
)
def test_what_has_no_meaning_for_a_reference_is_refused(written, content, message):
    with pytest.raises(UserError, match=message):
        reference_ds_config(written(content), dtype="bfloat16")


def test_a_missing_config_is_named():
    with pytest.raises(UserError, match=r"^no/such.json cannot be read: .*No such file"):
        policy(Path("no/such.json"))
