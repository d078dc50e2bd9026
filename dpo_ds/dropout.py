"""Dropout off: what a policy does at random would enter its implicit rewards as noise.

PyTorch only. No particular model family and no rank may enter.
"""

from typing import Any

from torch import nn

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def disable_dropout(model: nn.Module) -> int:
    """Sets every dropout rate of a model to 0, so that a forward in training mode equals one in evaluation mode.

    A rate is a float in (0, 1], or a tuple or list of such, that a module keeps under a name with ``drop`` in it (among
    them those that reach ``nn.functional.dropout``, attention kernels and layer drop), the ``p`` of the ``nn.Dropout``
    kinds, and the same names of a module's ``config``, which some forwards read. Training mode stays what it is, since
    gradient checkpointing depends on it. Noise of other kinds, such as a router's jitter, is left alone.

    Returns:
        How many rates were not 0 before.
    """
    disabled = 0
    for module in model.modules():
        if isinstance(module, _DROPOUTS) and module.p > 0:
            module.p = 0.0
            disabled += 1
        disabled += _zero_rates(module)
        # From __dict__, since a missing attribute of a module is an error and a submodule is no config.
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            disabled += _zero_rates(config)
    return disabled


def _zero_rates(owner: Any) -> int:
    names = [name for name, value in vars(owner).items() if "drop" in name and _is_rate(value)]
    for name in names:
        value = getattr(owner, name)
        setattr(owner, name, 0.0 if isinstance(value, float) else type(value)(0.0 for _ in value))
    return len(names)


def _is_rate(value: object) -> bool:
    """Says whether a value is a dropout rate, or a sequence of them, that drops something."""
    if isinstance(value, (tuple, list)):
        return any(_is_rate(v) for v in value) and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in value)
    return isinstance(value, float) and 0 < value <= 1
