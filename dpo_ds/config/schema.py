"""The run file's keys with their types and defaults. Reads no file and no argv."""

from collections.abc import Iterator
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any, Literal, TypeVar, get_type_hints

T = TypeVar("T")


def _key(default: T, text: str) -> T:
    return field(default=default, metadata={"help": text})


def _required(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    """The model that trains and the one that it is compared with."""

    policy: str = _required("Hugging Face folder or hub id of the model that trains")
    reference: str | None = _key(None, "folder or hub id of the frozen model; null: the policy's own starting weights")
    dtype: Literal["float32", "bfloat16", "float16"] = _key("bfloat16", "dtype of both models' weights")
    tokenizer: str | None = _key(None, "folder, hub id or SentencePiece .model file; null: the policy's")
    attention: str = _key("auto", "auto, or a transformers attention name, for padded rows")
    trust_remote_code: bool = _key(False, "whether code that comes with a model may run")


@dataclass(frozen=True)
class DataSource:
    """One data set among those that are trained or evaluated on.

    Attributes:
        path: file, folder or hub id.
        weight: how often an epoch of training holds each of its pairs: 2 is twice, 0.5 half of them, and the other half
            in the next epoch.
        split: the split's name where there are several.
        columns: our column names mapped to the data set's, where these differ; prompt and label may be several. Those
            that are read only where they are named: tools, probability, margin and weight, of each row.
        name: what metrics call it; None: after its file or hub id, as ``source_names`` says.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class StreamingConfig:
    """How pairs that do not fit a disk are prepared while others are trained on.

    Attributes:
        rows_per_shard: rows that are prepared together.
        keep: how many such shards may be on disk.
    """

    rows_per_shard: int
    keep: int = 3


@dataclass(frozen=True)
class DataConfig:
    """The preference pairs. In the run file ``train`` and ``eval`` may also be one path or hub id."""

    train: tuple[DataSource, ...] = _required(
        "file, glob, folder or hub id, or a list of {path, weight, split, columns, name}"
    )
    eval: tuple[DataSource, ...] | None = _key(None, "held-out pairs, given as train is; null: no evaluation")
    max_length: int = _key(1024, "tokens of prompt + longer response")
    truncation: Literal["prompt_start", "response_end"] | None = _key(
        None, "what is cut from pairs that are too long; null: they are dropped"
    )
    scored: Literal["last_turn", "all_assistant_turns"] = _key(
        "last_turn",
        "turns of a conversation that count: the last, or all of the assistant's that both sides do not share",
    )
    max_dropped: float = _key(0.05, "share of unusable rows above which the run is refused")
    shuffle: bool = _key(True, "false keeps the file's order")
    processes: int | None = _key(
        None, "how many tokenize; null: one on each core, 16 at most, where there is much to do"
    )
    streaming: StreamingConfig | None = field(
        default=None,
        metadata={"help": "{rows_per_shard, keep}: prepare so many rows at a time, ahead of training; null: all"},
    )


@dataclass(frozen=True)
class AdapterConfig:
    """What trains beside a frozen model; the names are peft's.

    Attributes:
        r: rank of each update.
        alpha: the update counts alpha / r times, or alpha / sqrt(r) times with use_rslora.
        target_modules: all-linear, or names of the linear layers that get one.
        use_dora: whether magnitudes train apart from directions.
        use_rslora: whether the scale is that of rank-stabilized LoRA.
        init: how the first of the two factors is drawn, default or gaussian; the second is 0.
        path: folder of an adapter to go on from, which decides all of the above; null begins anew.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_dora: bool = False
    use_rslora: bool = False
    init: Literal["default", "gaussian"] = "default"
    path: str | None = None


@dataclass(frozen=True)
class LossConfig:
    """How log-probs become a loss."""

    type: Literal[
        "sigmoid",
        "sigmoid_norm",
        "robust",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "bco_pair_unshifted",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "simpo",
        "orpo",
        "cpo",
        "slic",
        "sft",
        "dpop",
        "chi_po",
        "r_dpo",
        "beta_dpo",
        "cal_dpo",
    ] = _key("sigmoid", "the preference loss; DPO is sigmoid; dpo_ds/losses/README.md has all")
    beta: float = _key(0.1, "strength of the pull towards the reference")
    label_smoothing: float = _key(0.0, "probability that a pair's label is wrong")
    reduction: Literal["sum", "mean"] | None = _key(
        None, "a response's log-prob is the sum or the mean over its tokens; null: what the loss's paper says"
    )
    parameters: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "numbers of the losses' own equations, such as {gamma: 0.5} of simpo"},
    )
    add: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "further losses and their weights, such as {sft: 1.0}; that of loss.type is 1"},
    )
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = _key(
        "reverse_kl", "which divergence from the reference is bounded"
    )
    divergence_alpha: float = _key(0.5, "the alpha of alpha_divergence; 1 is reverse_kl, 0 forward_kl")
    router_aux: float = _key(
        0.0, "weight of the loss that balances a mixture's experts, such as 0.001; 0: routers see the loss alone"
    )
    weighting: Literal["none", "wpo"] = _key("none", "wpo: pairs count by how likely they are to the policy")
    ld_alpha: float | None = _key(
        None, "LD-DPO: what a response's tokens count beyond the length of the other one; null: as all others"
    )
    ld_reference: bool = _key(True, "whether loss.ld_alpha holds for the reference, too, as in the paper")


@dataclass(frozen=True)
class ReferenceConfig:
    """Where the reference's log-probs come from."""

    mode: Literal["engine", "cache", "adapter", "none"] = _key(
        "engine",
        "engine: a second, frozen engine; cache: scored once, kept on disk; adapter: the policy's engine without its "
        "adapter, or with the one of adapter.path; none: every reference log-prob is 0",
    )
    tokens_per_micro_batch: int | None = _key(
        None, "its own, larger micro-batches, for fewer gathers of its weights; null: the policy's, for equal rounding"
    )
    sync_every: int | None = _key(
        None, "steps after which the reference takes in the policy's weights (TR-DPO); null: it never moves"
    )
    sync_weight: float = _key(
        1.0, "part of the way that it then goes: 1 all of it, the hard update; in bfloat16 small parts round to nothing"
    )
    cache_dir: str | None = _key(None, "folder of cached log-probs, for several runs; null: output_dir/reference")


@dataclass(frozen=True)
class TrainConfig:
    """The schedule and the optimizer."""

    pairs_per_step: int = _key(16, "pairs in one optimizer step, over all ranks")
    tokens_per_micro_batch: int = _key(
        4096, "tokens that one rank, or one sequence-parallel group, puts through at once"
    )
    sequence_parallel_size: int = _key(
        1, "ranks that compute a micro-batch together, each a part of every row, for pairs too long for one (Ulysses)"
    )
    layout: Literal["auto", "packed", "padded"] = _key(
        "auto", "packed: pairs in one row, each prompt once; auto: where the model allows it"
    )
    activation_checkpointing: Literal["none", "full", "offload"] = _key(
        "none", "full: keep only each layer's input, compute the rest again in backward; offload: keep it on the host"
    )
    tokens_per_mlp_tile: int | None = _key(
        None, "tokens that an MLP takes at a time, for long pairs; a tile is computed again in backward; null: all"
    )
    optimizer: Literal["adamw", "lion", "rmsprop"] = _key(
        "adamw", "lion and rmsprop keep one number of every weight in place of two"
    )
    epochs: int = _key(1, "passes over the data")
    max_steps: int | None = _key(None, "optimizer steps of the run, in place of train.epochs; null: as that says")
    learning_rate: float = _key(5e-7, "peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = _key("linear", "the learning rate's course after its warm-up")
    warmup_ratio: float = _key(0.1, "share of the steps in which the learning rate rises to its peak")
    betas: tuple[float, float] = _key(
        (0.9, 0.999), "decay rates; Lion's paper takes [0.9, 0.99]; rmsprop has the second alone"
    )
    eps: float = _key(1e-8, "what AdamW and RMSprop add to a root of squares")
    weight_decay: float = _key(0.0, "decoupled weight decay of matrices")
    gradient_clipping: float = _key(1.0, "largest norm of a step's gradient; 0 switches clipping off")
    seed: int = _key(0, "decides the order of the pairs and everything random")
    eval_every: int | None = _key(None, "evaluate after so many steps; null: before the first and after the last only")


@dataclass(frozen=True)
class EnginesConfig:
    """The DeepSpeed JSON file of each engine."""

    policy: str = _key("ds_configs/zero3.json", "the policy's DeepSpeed config")
    reference: str = _key("ds_configs/zero3_reference.json", "the reference's DeepSpeed config")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved for resuming."""

    every: int | None = _key(
        None, "save after so many steps, and after the last; null: only when the run is asked to stop"
    )
    keep: int = _key(2, "how many of the newest are kept")
    keep_every: int | None = _key(None, "checkpoints of the steps that it divides are never removed")
    keep_best: str | None = _key(None, "an evaluation's mean, such as rewards/accuracies, whose best checkpoint stays")
    background: bool = _key(
        False,
        "copy each rank's part in host memory (12 bytes a parameter, over all ranks) and write it meanwhile",
    )
    resume: str = _key("auto", "auto: from the newest checkpoint in output_dir, if any | never | a checkpoint's PATH")


@dataclass(frozen=True)
class ExportConfig:
    """Where the trained model goes."""

    folder: str | None = _key(None, "folder of the exported model; null: output_dir/export")
    push_to_hub: str | None = _key(
        None, "hub id that the verified export is pushed to, with the token in HF_TOKEN; null: none"
    )
    merged: bool = _key(
        False, "whether an adapter is merged into the weights of a whole model; false: the adapter alone"
    )


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = _key("offline", "wandb's mode")
    project: str = _key("dpo_ds", "wandb's project")
    log_every: int = _key(1, "steps between two logged ones")
    answers: int = _key(0, "held-out prompts that the policy answers greedily at each evaluation, for people to read")
    answer_tokens: int = _key(64, "tokens of such an answer at most")
    entropy: bool = _key(
        False, "whether the entropy of the policy's tokens is logged, mean nats a token; costs some time"
    )
    machines: bool = _key(False, "whether memory and load of each machine are logged with each step that is")


@dataclass(frozen=True)
class WatchdogsConfig:
    """What a run that goes wrong is told of, once each."""

    action: Literal["warn", "stop"] = _key("warn", "whether a watchdog's finding is a line on stderr or the run's end")
    not_moving_steps: int | None = _key(20, "more steps in a row whose rewards are exactly 0 are too many; null: never")
    chosen_drop: float | None = _key(
        1.0, "nats a token that the chosen responses may lose against the reference; null: any"
    )


@dataclass(frozen=True)
class TimeoutsConfig:
    """Seconds after which a rank ends that makes no progress, or hears nothing of another machine, and says so."""

    load_s: float = _key(3600.0, "reading the weights and building the engines")
    cache_s: float = _key(1800.0, "one micro-batch of scoring for the cache")
    train_s: float = _key(1800.0, "one micro-batch of training or evaluation")
    data_s: float = _key(1800.0, "a shard of data.streaming that is not prepared yet")
    save_s: float = _key(3600.0, "one checkpoint, or the export")
    silence_s: float = _key(60.0, "another machine that does not answer: its link or its power is gone")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: EnginesConfig = field(default_factory=EnginesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    watchdogs: WatchdogsConfig = field(default_factory=WatchdogsConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    adapter: AdapterConfig | None = field(
        default=None,
        metadata={
            "help": "{r, alpha, target_modules, use_dora, use_rslora, init, path}: LoRA and its kin train, the "
            "model's own weights do not; null: all weights train"
        },
    )
    env: dict[str, str] = field(default_factory=dict, metadata={"help": "variables that the workers get"})
    output_dir: str = _required("folder of all that the run writes; relative to the working folder")


def entries() -> Iterator[tuple[str, type, Field[Any]]]:
    """Yields every key as ``(section.key, its dataclass, its field)``, in the order of the run file."""
    sections = get_type_hints(RunConfig)
    for entry in fields(RunConfig):
        if is_dataclass(sections[entry.name]):
            for inner in fields(sections[entry.name]):
                yield f"{entry.name}.{inner.name}", sections[entry.name], inner
        else:
            yield entry.name, RunConfig, entry


def flat(config: RunConfig) -> dict[str, Any]:
    """Returns every value of a run under its dotted key."""
    return {name: attrgetter(name)(config) for name, _, _ in entries()}


def shown(value: object) -> str:
    """Returns a value as a run file would write it, short enough for one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    value = asdict(value) if isinstance(value, StreamingConfig | AdapterConfig) else value
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
