"""The model card of an export: what it was made from and how, and how well it did. No ranks, no models."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from dpo_ds.config import RunConfig, flat, shown

_SECTIONS = ("loss.", "train.", "reference.", "data.max_length", "data.truncation", "model.dtype")
_TEXT = """---
{about}
---

# {base}, aligned by Direct Preference Optimization

{base} after {step} steps of Direct Preference Optimization
([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) on {data}, by dpo_ds.

{figures}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

These files were read back and compared with the trained weights bit for bit; `sha256sum -c SHA256SUMS` checks them.

## Settings

{settings}

## Versions

{versions}
"""
_FIGURES = {
    "loss": "held-out loss",
    "rewards/accuracies": "held-out reward accuracy",
    "rewards/margins": "held-out reward margin",
}


def model_card(
    config: RunConfig, *, step: int, evaluation: Mapping[str, float] | None, versions: Mapping[str, str | None]
) -> str:
    """Returns a model card's text.

    Args:
        config: the run's. What lies on this machine's disk is named by its last part alone, and no variable is named.
        step: optimizer steps behind the weights.
        evaluation: means over the held-out pairs after that step, None where there was none.
        versions: of the packages at work.
    """
    base = _name(config.model.policy)
    about = ModelCardData(
        base_model=None if Path(config.model.policy).exists() else base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization", "deepspeed"],
    )
    figures = {said: f"{evaluation[name]:.4g}" for name, said in _FIGURES.items() if evaluation and name in evaluation}
    settings = {
        f"`{key}`": f"`{shown(value)}`"
        for key, value in flat(config).items()
        if key.startswith(_SECTIONS) and value is not None and key != "reference.cache_dir"
    }
    return _TEXT.format(
        about=about.to_yaml(),
        base=base,
        step=step,
        data=", ".join(_name(source.path) for source in config.data.train),
        figures=_table(figures),
        settings=_table(settings),
        versions=_table({name: version for name, version in versions.items() if version}),
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]) if rows else ""


def _name(path: str) -> str:
    return Path(path).name if Path(path).exists() else path
