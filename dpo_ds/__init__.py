"""Direct Preference Optimization of large language models on DeepSpeed ZeRO-3."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_ds.dpo import DPO
    from dpo_ds.engine import initialize

__version__ = "0.1.0"
__all__ = ["DPO", "__version__", "initialize"]

_HOMES = {"DPO": "dpo_ds.dpo", "initialize": "dpo_ds.engine"}


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562), so that `--help` does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dpo_ds' has no attribute {name!r}")
