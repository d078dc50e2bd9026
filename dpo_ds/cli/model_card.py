"""The model card of an export: what it was trained from, how, and how that went. No ranks, no weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from dpo_ds.cli.preflight import Inputs
from dpo_ds.config import DataSource, flat
from dpo_ds.data.prepared import open_prepared
from dpo_ds.tracking import METRICS_FILE, versions

# Neither what only the user's machine knows (places, environment) nor what does not change the model.
_TOLD = (
    *("loss.", "train.", "data.max_", "data.truncation", "data.shuffle"),
    *("model.dtype", "reference.mode", "reference.sync"),
)
_FIGURES = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}


def model_card(inputs: Inputs, *, step: int, tokens: int, evaluation: Mapping[str, Any] | None) -> str:
    """Returns the text of a model card. Local files are named without their folders.

    Args:
        inputs: of the run.
        step: after which the weights are those of the card.
        tokens: trained on until then.
        evaluation: means over the held-out pairs, None where there are none.
    """
    config = inputs.config
    policy = shown_source(inputs.policy)
    reference = "none" if inputs.reference is None else shown_source(inputs.reference)
    held_out = open_prepared(inputs.evaluation) if inputs.evaluation else None
    data = ModelCardData(
        library_name="peft" if inputs.exports_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization", "dpo_ds"],
        base_model=policy if _is_on_hub(inputs.policy) else None,
        datasets=[source.path for source in config.data.train if _is_on_hub(source.path)] or None,
    )
    settings = {key: value for key, value in flat(config).items() if key.startswith(_TOLD)}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    lines = [
        f"# {policy}, aligned",
        "",
        f"`{policy}` after {step} optimizer steps of Direct Preference Optimization",
        "([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) by dpo_ds on DeepSpeed ZeRO-3.",
        "",
        f"* reference: `{reference}`",
        f"* pairs: {_trained_on(inputs)}",
        *([f"* held out: {len(held_out)} of {_named(config.data.eval or ())}"] if held_out is not None else []),
        f"* tokens trained on: {tokens}",
        "",
        *_figures(evaluation, step),
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "The files were compared with the trained weights bit for bit; `sha256sum -c SHA256SUMS` finds later damage.",
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "Versions: " + ", ".join(f"{package} {number}" for package, number in versions().items() if number) + ".",
        "",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def last_evaluation(folder: Path, *, step: int) -> dict[str, Any] | None:
    """Returns the last line of a run's record that tells of held-out pairs, up to a step; None where there is none.

    Args:
        folder: the run's output folder.
        step: later lines do not count.
    """
    try:
        whole, _, _ = (folder / METRICS_FILE).read_text(encoding="utf-8").rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()]
    except (OSError, ValueError):  # a checkpoint may lie anywhere, without its run's record
        return None
    return next((line for line in reversed(lines) if line["split"] == "eval" and line["step"] <= step), None)


def shown_source(name: str) -> str:
    """Returns a hub id as it is, and of a path or an address its last part alone."""
    return name if _is_on_hub(name) else Path(name.partition("?")[0]).name


def _is_on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _named(sources: tuple[DataSource, ...]) -> str:
    return ", ".join(f"`{shown_source(source.path)}`" for source in sources)


def _trained_on(inputs: Inputs) -> str:
    named = _named(inputs.config.data.train)
    if inputs.stream is not None:
        return f"streamed from {inputs.stream.rows} rows of {named}, key `{inputs.stream.key}`"
    pairs = open_prepared(inputs.train)
    return f"{len(pairs)} of {named}, key `{pairs.manifest.key}`"


def _figures(evaluation: Mapping[str, Any] | None, step: int) -> list[str]:
    if evaluation is None:
        return []
    known = {title: evaluation[name] for name, title in _FIGURES.items() if evaluation.get(name) is not None}
    return [
        f"## Held-out pairs, after step {evaluation.get('step', step)}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {value:.4g} |" for title, value in known.items()),
        "",
    ]
