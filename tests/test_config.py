"""The run file and the command line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dpo_ds.config import (
    AdapterConfig,
    DataSource,
    Run,
    StreamingConfig,
    TrainConfig,
    check,
    dump_yaml,
    parse_run,
    resolve_path,
    settle,
    source_names,
)
from dpo_ds.errors import UserError
from dpo_ds.losses import LOSSES

SMALLEST = "model: {policy: org/model}\ndata: {train: pairs.jsonl}\noutput_dir: runs/x\n"


@pytest.fixture
def parse(tmp_path):
    """Parses a run file's text, with overrides behind it."""

    def parse_text(text: str = SMALLEST, *argv: str) -> Run:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return parse_run(["--config", str(file), *argv])

    return parse_text


def test_unset_keys_have_the_documented_defaults(parse):
    config = parse().config
    assert config.train == TrainConfig()
    assert (config.loss.type, config.loss.beta, config.loss.reduction) == ("sigmoid", 0.1, None)
    assert (config.train.learning_rate, config.train.betas, config.train.epochs) == (5e-7, (0.9, 0.999), 1)
    assert (config.model.dtype, config.data.max_length, config.tracking.wandb) == ("bfloat16", 1024, "offline")
    assert config.deepspeed.policy == "ds_configs/zero3.json"
    assert config.data.eval is None


@pytest.mark.parametrize(
    "argv",
    [["--loss.beta", "0.3", "--config", "FILE"], ["--config", "FILE", "--loss.beta=0.3"]],
    ids=["before", "after"],
)
def test_an_override_beats_the_file_whatever_the_order(tmp_path, argv):
    file = tmp_path / "run.yaml"
    file.write_text(SMALLEST + "loss: {beta: 0.2, label_smoothing: 0.1}\n")
    config = parse_run([str(file) if argument == "FILE" else argument for argument in argv]).config
    assert (config.loss.beta, config.loss.label_smoothing) == (0.3, 0.1)


def test_the_launchers_local_rank_is_accepted_as_first_argument(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(SMALLEST)
    assert parse_run(["--local_rank=1", "--config", str(file), "--dry_run"]).dry_run


def test_a_run_needs_no_file():
    run = parse_run(["--model.policy", "org/model", "--data.train", "a.jsonl", "--output_dir", "runs/x"])
    assert run.file is None
    assert run.config.data.train == (DataSource("a.jsonl"),)


def test_explicit_keys_are_those_of_the_file_and_the_command_line(parse):
    run = parse(SMALLEST + "loss: {beta: 0.1}\n", "--train.seed", "3", "--env.A", "1", "--dry_run")
    assert run.explicit == {"model.policy", "data.train", "output_dir", "loss.beta", "train.seed", "env"}


def test_numbers_without_a_decimal_point_are_numbers(parse):
    # YAML 1.1 reads 5e-7 as text.
    assert parse(SMALLEST + "train: {learning_rate: 5e-7, weight_decay: 1}\n").config.train.learning_rate == 5e-7


def test_sources_keep_their_weight_split_and_columns(parse):
    text = SMALLEST.replace(
        "pairs.jsonl", "[{path: a.jsonl, weight: 2, columns: {chosen: good}}, {path: b/c, split: t}]"
    )
    assert parse(text).config.data.train == (
        DataSource("a.jsonl", weight=2, columns={"chosen": "good"}),
        DataSource("b/c", split="t"),
    )


def test_sources_are_called_by_their_name_or_file_or_hub_id():
    paths = ["a/ultra.v2.jsonl.gz", "org/hh-rlhf", "data/some-*/*.jsonl", "ü b.json", "**/*.json"]
    sources = (*map(DataSource, paths), DataSource("a.jsonl", name="mine"))
    assert source_names(sources) == ("ultra", "hh-rlhf", "data", "ü-b", "data", "mine")


def test_environment_values_become_text(parse):
    text = SMALLEST + "env: {OMP_NUM_THREADS: 1, MODE: fast}\n"
    env = parse(text, "--env.LEVEL", "2").config.env
    assert env == {"OMP_NUM_THREADS": "1", "MODE": "fast", "LEVEL": "2"}


def test_an_empty_section_keeps_its_defaults(parse):
    assert parse(SMALLEST + "loss:\n").config.loss.beta == 0.1


@pytest.mark.parametrize(
    "text",
    [
        SMALLEST,
        SMALLEST + "data: {train: [{path: a, weight: 2.5}, {path: b, columns: {chosen: x}}], eval: e.jsonl}\n",
        SMALLEST + "train: {betas: [0.8, 0.95], eps: 1e-9, max_steps: 3}\nenv: {A: 'true', B: 007}\n",
        SMALLEST + "loss: {type: ipo, reduction: mean}\nmodel: {policy: ../ü, reference: r, tokenizer: t.model}\n",
    ],
)
def test_the_dumped_config_parses_to_itself(parse, text):
    lines = dict(line.split(":", 1) for line in text.splitlines())
    first = parse("".join(f"{key}:{value}\n" for key, value in lines.items())).config
    assert parse(dump_yaml(first)).config == first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.learning_rat", "3"], r"unknown option --train.learning_rat; did you mean --train.learning_rate\?"),
        (["--beta", "3"], r"unknown option --beta; did you mean --loss.beta\?"),
        (["--train.learning_rate", "abc"], "train.learning_rate must be a number, got 'abc'"),
        (["--train.epochs", "1.5"], "train.epochs must be a whole number, got '1.5'"),
        (["--train.max_steps", "x"], "train.max_steps must be a whole number or null, got 'x'"),
        (["--train.betas", "[0.9]"], r"train.betas must be a list of two numbers, got '\[0.9\]'"),
        (["--data.shuffle", "maybe"], "data.shuffle must be true or false, got 'maybe'"),
        (["--loss.type", "dpo"], f"loss.type must be one of {', '.join(LOSSES)}, got 'dpo'"),
        (["--train.optimizer", "sgd"], "train.optimizer must be one of adamw, lion, rmsprop, got 'sgd'"),
        (["--loss.beta"], "argument --loss.beta: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--data.train", "3"], r"data.train must be a path, a hub id, or a list of \{path, .*, got 3"),
        (["--data.train", "[{pth: a}]"], r"data.train\[0\] must be \{path, .* at least a path, got"),
        (["--data.train", "[{path: a, weigt: 1}]"], r"data.train\[0\]: unknown key weigt; a source has path, weight"),
        (
            ["--data.train", "[{path: a/x.jsonl}, {path: b/x.jsonl}]"],
            r"data.train\[1\] is called x in the metrics, as data.train\[0\] is; give one a name",
        ),
        (["--data.train", "[{path: a, name: x/y}]"], r"data.train\[0\].name must be letters, digits"),
        (["--data.train", "[{path: a, weight: 0}]"], r"data.train\[0\].weight must be a number > 0, got 0"),
        (["--data.eval", "[]"], r"data.eval must be a path, a hub id, or a list"),
        (["--config", "other.yaml"], "--config is given twice"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_was_expected(parse, argv, message):
    with pytest.raises(UserError, match=f"^{message}") as raised:
        parse(SMALLEST, *argv)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", r"run.yaml: unknown key train.learning_rat; did you mean train.learning_rate\?"),
        ("beta: 1", r"run.yaml: unknown key beta; did you mean loss.beta\?"),
        ("dry_run: true", "run.yaml: unknown key dry_run"),
        ("train: {epochs: two}", "^train.epochs must be a whole number, got 'two'"),
        ("train: {learning_rate: null}", "^train.learning_rate must be a number, got null"),
        ("train: {epochs: true}", "^train.epochs must be a whole number, got true"),
        ("env: {A: [1]}", "^env must be a mapping of names to values, got"),
        ("train: 3", "run.yaml: train must be a section of keys, got 3"),
        ("loss: {beta: 0.1}\nloss: {beta: 0.2}", "run.yaml line 5: not valid YAML: loss is given twice"),
        ("loss: {beta: 0.1", "run.yaml line 5: not valid YAML: "),
        ("\tloss: 1", "run.yaml line 4: not valid YAML: "),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_or_key(parse, text, message):
    with pytest.raises(UserError, match=message) as raised:
        parse(f"{SMALLEST}{text}\n")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "run.yaml: a run file must be a section of keys, got"),
        ("", "^model.policy is required: "),
        ("model: {policy: m}\noutput_dir: x", "^data.train is required: "),
        ("model: {policy: m}\ndata: {train: null}\noutput_dir: x", "^data.train is required: "),
        ("model: {policy: m}\ndata: {train: d}", "^output_dir is required: "),
        ("model: {policy: 3}\ndata: {train: d}\noutput_dir: x", "^model.policy must be text, got 3"),
    ],
)
def test_what_a_run_cannot_do_without_is_asked_for(parse, text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_a_missing_run_file_is_named_with_the_place_looked_at():
    with pytest.raises(UserError, match=r"^--config: there is no no/such.yaml; looked for .*/no/such.yaml"):
        parse_run(["--config", "no/such.yaml"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss.beta", "-0.1", "must be > 0, got -0.1"),
        ("loss.beta", "0", "must be > 0, got 0.0"),
        ("loss.beta", ".inf", "must be finite, got inf"),
        ("loss.label_smoothing", "0.5", "must be >= 0 and < 0.5, got 0.5"),
        ("data.scored", "some", "must be one of last_turn, all_assistant_turns, got 'some'"),
        ("data.max_length", "1", "must be >= 2, got 1"),
        ("data.max_dropped", "1.1", "must be >= 0 and <= 1, got 1.1"),
        ("data.processes", "0", "must be >= 1 or null, got 0"),
        ("data.eval", "[{path: a, weight: 2}]", "must be sources of weight 1, since an evaluation scores every"),
        ("train.pairs_per_step", "0", "must be >= 1, got 0"),
        ("train.tokens_per_micro_batch", "0", "must be >= 1, got 0"),
        ("train.epochs", "0", "must be >= 1, got 0"),
        ("train.max_steps", "0", "must be >= 1 or null, got 0"),
        ("train.learning_rate", "0", "must be > 0, got 0.0"),
        ("train.learning_rate", ".nan", "must be finite, got nan"),
        ("train.warmup_ratio", "1.01", "must be >= 0 and <= 1, got 1.01"),
        ("train.betas", "[0.9, 1.0]", r"must be two numbers >= 0 and < 1, got \[0.9, 1.0\]"),
        ("train.eps", "0", "must be > 0, got 0.0"),
        ("train.weight_decay", "-1", "must be >= 0, got -1.0"),
        ("train.gradient_clipping", "-1", r"must be >= 0 \(0 switches it off\), got -1.0"),
        ("train.seed", "-1", "must be >= 0, got -1"),
        ("train.eval_every", "0", "must be >= 1 or null, got 0"),
        ("train.eval_every", "5", "must be null while data.eval is null, got 5"),
        ("tracking.log_every", "0", "must be >= 1, got 0"),
        ("reference.sync_every", "0", "must be >= 1 or null, got 0"),
        ("reference.sync_weight", "0", "must be > 0 and <= 1, got 0.0"),
        ("tracking.answers", "-1", "must be >= 0, got -1"),
        ("tracking.answers", "2", "must be 0 while data.eval is null, got 2"),
        ("tracking.answer_tokens", "0", "must be >= 1, got 0"),
        ("output_dir", "", "must be the name of a folder, got ''"),
        ("reference.mode", "adapter", "must be engine, cache or none while adapter is null, got 'adapter'"),
        ("reference.tokens_per_micro_batch", "9", r"must be null or >= train.tokens_per_micro_batch, got 9"),
        ("checkpoint.every", "0", "must be >= 1 or null, got 0"),
        ("checkpoint.keep", "0", "must be >= 1, got 0"),
        ("checkpoint.keep_every", "5", "must be null or a multiple of checkpoint.every, got 5"),
        ("checkpoint.keep_best", "loss", "must be null unless train.eval_every divides checkpoint.every, got 'loss'"),
        ("export.merged", "true", "must be false while adapter is null, got true"),
        ("adapter", "{r: 0}", r"must be of r >= 1, alpha > 0, got \{'r': 0,"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(parse, key, value, message):
    with pytest.raises(UserError, match=f"^{key} {message}"):
        parse(SMALLEST, f"--{key}={value}")


def test_an_attention_of_the_users_own_and_packed_rows_exclude_each_other(parse):
    assert parse(SMALLEST, "--model.attention", "eager").config.model.attention == "eager"
    with pytest.raises(UserError, match=r"^model\.attention must be auto where rows are packed, got 'eager'"):
        parse(SMALLEST, "--model.attention", "eager", "--train.layout", "packed")


def test_every_loss_can_be_configured(parse):
    for name in LOSSES:
        assert parse(SMALLEST, "--loss.type", name).config.loss.type == name
    with pytest.raises(UserError, match=f"one of {', '.join(LOSSES)}, got"):
        parse(SMALLEST, "--loss.type", "unheard of")


def test_a_value_stated_elsewhere_beats_a_default(parse):
    run = settle(parse(), {"model.dtype": "float32", "train.gradient_clipping": 0.5}, source="zero3.json")
    assert (run.config.model.dtype, run.config.train.gradient_clipping) == ("float32", 0.5)


def test_a_value_stated_elsewhere_may_equal_the_users(parse):
    run = parse(SMALLEST, "--train.gradient_clipping", "0.5")
    assert settle(run, {"train.gradient_clipping": 0.5}, source="zero3.json") == run


def test_two_explicit_values_are_an_error(parse):
    run = parse(SMALLEST, "--model.dtype", "float32")
    with pytest.raises(
        UserError, match=r"^model.dtype is 'float32' in the run, but zero3.json says 'bfloat16': take one"
    ):
        settle(run, {"model.dtype": "bfloat16"}, source="zero3.json")


def test_a_value_stated_elsewhere_is_checked_too(parse):
    with pytest.raises(UserError, match=r"^train.gradient_clipping must be >= 0"):
        settle(parse(), {"train.gradient_clipping": -1.0}, source="zero3.json")


def test_a_config_made_in_python_is_checked_too(parse):
    config = parse().config
    with pytest.raises(UserError, match=r"^loss.beta must be > 0, got -1"):
        check(replace(config, loss=replace(config.loss, beta=-1.0)))


def test_paths_are_looked_for_beside_the_run_file_then_here_then_in_the_package(tmp_path, monkeypatch):
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes, here):
        folder.mkdir()
        (folder / "both.json").write_text("{}")
    (here / "one.json").write_text("{}")
    monkeypatch.chdir(here)

    def found(value: str) -> Path:
        return Path(resolve_path(value, key="deepspeed.policy", run_file=recipes / "run.yaml"))

    assert found("both.json") == recipes / "both.json"
    assert found("one.json") == here / "one.json"
    assert found("ds_configs/zero3.json").is_file()
    assert found(str(here / "one.json")) == here / "one.json"


def test_a_missing_path_is_named_with_every_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^deepspeed.policy: there is no no.json; .*/recipes/no.json, .*/no.json, .*no.json"
    ):
        resolve_path("no.json", key="deepspeed.policy", run_file=tmp_path / "recipes" / "run.yaml")


@pytest.mark.parametrize("value", ["org/model", "gpt2", "Org-1/model.v2_x"])
def test_a_hub_id_is_passed_on(value):
    assert resolve_path(value, key="model.policy", run_file=None, hub=True) == value


@pytest.mark.parametrize("value", ["data/pairs.jsonl", "/no/such", "./model", "runs/x/export", "../model"])
def test_what_can_be_no_hub_id_must_exist(value):
    with pytest.raises(UserError, match=r"^data.train: there is no "):
        resolve_path(value, key="data.train", run_file=None, hub=True)


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


PARSE = "import sys; from dpo_ds.config import parse_run; parse_run(sys.argv[1:])"


def test_help_explains_every_key():
    answer = run_python(PARSE, "--help")
    assert answer.returncode == 0
    for text in (
        "--loss.beta",
        "strength of the pull towards the reference",
        "--config",
        "--dry_run",
        "--print_config",
    ):
        assert text in answer.stdout


def test_print_config_prints_a_run_file_even_without_one(parse, tmp_path):
    defaults = yaml.safe_load(run_python(PARSE, "--print_config").stdout)
    assert defaults["model"]["policy"] is None
    assert defaults["train"]["betas"] == [0.9, 0.999]
    parse()
    answer = run_python(PARSE, "--config", str(tmp_path / "run.yaml"), "--loss.beta", "0.3", "--print_config")
    assert parse(answer.stdout).config == parse(SMALLEST, "--loss.beta", "0.3").config


def test_parsing_imports_no_torch():
    code = "import sys, dpo_ds.config; assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    assert run_python(code).returncode == 0


STREAMED = SMALLEST.replace("pairs.jsonl", "pairs.jsonl, streaming: {rows_per_shard: 100}").replace(
    "data:", "train: {tokens_per_micro_batch: 2048}\ndata:"
)


def test_streaming_is_read_and_written_back(parse, tmp_path):
    config = parse(STREAMED).config
    assert config.data.streaming == StreamingConfig(rows_per_shard=100, keep=3)
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert parse_run(["--config", str(tmp_path / "again.yaml")]).config == config
    assert parse(STREAMED, "--data.streaming", "{rows_per_shard: 7, keep: 2}").config.data.streaming.keep == 2
    assert parse(STREAMED, "--data.streaming", "null").config.data.streaming is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.streaming", "true"], r"data.streaming must be \{rows_per_shard, keep\} with at least rows_per_shard"),
        (["--data.streaming", "{keep: 2}"], r"with at least rows_per_shard, or null, got \{'keep': 2\}"),
        (["--data.streaming", "{rows_per_shard: 1e3}"], "data.streaming.rows_per_shard must be a whole number"),
        (["--data.streaming", "{rows_per_shard: 9, keep: 1}"], r"rows_per_shard >= 1, keep >= 2, got \{.*'keep': 1\}"),
        (["--reference.mode", "cache"], "reference.mode must be engine or none while data.streaming is set, since"),
        (["--data.train", "[{path: a, weight: 2}]"], "data.train must be sources of weight 1 while data.streaming is"),
        (["--data.max_length", "1025"], "train.tokens_per_micro_batch must be >= 2050, twice data.max_length"),
    ],
)
def test_what_does_not_go_with_streaming_is_refused(parse, argv, message):
    with pytest.raises(UserError, match=message):
        parse(STREAMED, *argv)


def test_an_adapter_is_read_and_written_back(parse, tmp_path):
    for given, expected in (
        ("{r: 4, alpha: 8, target_modules: [q_proj]}", AdapterConfig(r=4, alpha=8, target_modules=("q_proj",))),
        ("{path: somewhere}", AdapterConfig(path="somewhere")),
    ):
        config = parse(SMALLEST, "--adapter", given, "--reference.mode", "adapter").config
        assert config.adapter == expected
        (tmp_path / "again.yaml").write_text(dump_yaml(config))
        assert parse_run(["--config", str(tmp_path / "again.yaml")]).config == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reference.sync_every", "3", "--reference.mode", "none"], "sync_every must be null where reference.mode"),
        (["--reference.sync_every", "3", "--adapter", "{r: 4}"], "sync_every must be null where adapter is set"),
        (["--reference.sync_every", "1"], "sync_every must be above 1 where reference.sync_weight is 1: the reference"),
        (["--adapter", "true"], r"adapter must be \{r, alpha, .*path\}, or null, got true"),
        (["--adapter", "{rank: 4}"], "adapter: unknown key rank; did you mean"),
        (["--adapter", "{use_dorra: true}"], "adapter: unknown key use_dorra; did you mean use_dora"),
        (["--adapter", "{r: 4.5}"], "adapter.r must be a whole number, got 4.5"),
        (["--adapter", "{init: pissa}"], "adapter.init must be default or gaussian, got 'pissa'"),
        (["--adapter", "{target_modules: some}"], "adapter.target_modules must be all-linear or a list of names"),
        (["--adapter", "{path: a, r: 4}"], "adapter must hold no other key beside path"),
        (
            ["--adapter", "{r: 4}", "--reference.mode", "adapter", "--model.reference", "b"],
            "model.reference must be null where reference.mode is adapter",
        ),
    ],
)
def test_what_is_no_adapter_or_does_not_go_with_one_is_refused(parse, argv, message):
    with pytest.raises(UserError, match=message):
        parse(SMALLEST, *argv)
