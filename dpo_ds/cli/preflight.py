"""Everything that can be checked before an engine exists: in seconds, in one process, with one clear line."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dpo_ds.config import DataSource, Run, resolve_path
from dpo_ds.data.prepare import PreparedPairs, Source, prepare
from dpo_ds.data.schedule import Schedule
from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.engine.ds_config import check_cpu_collective, policy_ds_config, reference_ds_config
from dpo_ds.errors import UserError
from dpo_ds.models.causal_lm import load_model_config, longest_sequence, vocabulary_size
from dpo_ds.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """What a run needs, found and checked.

    Attributes:
        policy: folder or hub id of the model that trains.
        reference: folder or hub id of the frozen model, None for reference-free losses.
        tokenizer: folder, file or hub id.
        policy_config: the policy's resolved DeepSpeed config.
        reference_config: the reference's, None without one.
        train: folder of the prepared training pairs.
        evaluation: folder of the prepared held-out pairs, or None.
    """

    policy: str
    reference: str | None
    tokenizer: str
    policy_config: dict[str, Any]
    reference_config: dict[str, Any] | None
    train: Path
    evaluation: Path | None
