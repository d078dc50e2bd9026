"""Preference losses: log-probs in, per-pair losses and rewards out, no reduction over pairs.

A new loss is one function of ``functions.py`` and one line of ``LOSSES``. No model, no config and no rank may enter.
"""

from dpo_ds.losses.objective import LOSSES, Loss, Objective, Running, preference_loss
from dpo_ds.losses.pairs import Divergence, PairLabels, PairLogps, PreferenceLoss, Reduction

__all__ = [
    "LOSSES",
    "Divergence",
    "Loss",
    "Objective",
    "PairLabels",
    "PairLogps",
    "PreferenceLoss",
    "Reduction",
    "Running",
    "preference_loss",
]
