"""What a rank of a run will hold, by arithmetic: parameters, ds_configs and a micro-batch in, bytes out. No rank.

ZeRO-3's part is Rajbhandari et al. 2019, section 5, arXiv:1910.02054, with DeepSpeed's own buffers beside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Phase = Literal["all", "scoring", "training", "update"]

_GRADIENT = 4


@dataclass(frozen=True)
class Parameters:
    """How many values a model has, and how ZeRO-3 would hold them.

    Attributes:
        total: all.
        trained: those that train.
        whole: those of tensors that are small enough to stay whole on every rank.
        largest: those that are gathered for one layer, or for the embedding or the head, where that has more.
    """

    total: int
    trained: int
    whole: int
    largest: int


class Peaks(NamedTuple):
    """Bytes that a micro-batch holds beside the weights, at the moment when they are most.

    Attributes:
        training: forward and backward; with the gradients of one weight, which then go to the engine.
        scoring: forward alone.
        host: what of the training waits in host memory, where the tensors are not there anyway.
    """

    training: int
    scoring: int
    host: int = 0


class Share(NamedTuple):
    """Bytes that a rank needs for one purpose.

    Attributes:
        purpose: what for.
        device: on its accelerator.
        host: of host memory.
        files: in files of an NVMe disk.
        phase: when; ``all`` the time, or while one model scores, the other trains, or weights are updated.
    """

    purpose: str
    device: float = 0
    host: float = 0
    files: float = 0
    phase: Phase = "all"


def peak(shares: Iterable[Share]) -> Share:
    """Returns what is needed at one time: all that stays, and the phase that needs most."""
    lasting = [share for share in shares if share.phase == "all"]
    passing = [share for share in shares if share.phase != "all"]
    most = []
    for place in ("device", "host", "files"):
        phases: dict[str, float] = {}
        for share in passing:
            phases[share.phase] = phases.get(share.phase, 0) + getattr(share, place)
        most.append(sum(getattr(share, place) for share in lasting) + max(phases.values(), default=0))
    return Share("peak", *most)


def shares_of_policy(
    parameters: Parameters,
    ds_config: Mapping[str, Any],
    *,
    itemsize: int,
    ranks: int,
    activations: Peaks,
    state_bytes: int = 12,
) -> list[Share]:
    """Returns what the policy's engine takes on each rank.

    Args:
        parameters: the model's.
        ds_config: resolved.
        itemsize: bytes of a weight.
        ranks: that share the weights.
        activations: of a micro-batch.
        state_bytes: of the optimizer's master and states of one weight; AdamW's are 12.
    """
    zero = ds_config["zero_optimization"]
    part = parameters.trained / ranks
    bucket = zero.get("reduce_bucket_size", 5e8) * itemsize
    update = _GRADIENT * min(part, zero.get("sub_group_size", 1e9))
    on_device = Share("masters and optimizer states", device=state_bytes * part)
    states = {
        "none": [
            on_device,
            Share("gradients", device=_GRADIENT * part),
            Share("update", device=update, phase="update"),
        ],
        "cpu": [on_device._replace(device=0, host=on_device.device), Share("gradients", host=_GRADIENT * part)],
        "nvme": [
            on_device._replace(device=0, files=on_device.device),
            Share("gradients", host=_GRADIENT * part),
            Share("swap buffers", host=_swap_buffers(zero, part)),
        ],
    }
    return [
        *_shares_of_weights("policy", parameters, zero, itemsize=itemsize, ranks=ranks, phase="training"),
        *states[_device(zero, "offload_optimizer")],
        Share("gradient buckets", device=bucket),
        Share("gradient buckets, scattered", device=bucket, phase="training"),
        Share("activations of a micro-batch", device=activations.training, host=activations.host, phase="training"),
    ]


def shares_of_reference(
    parameters: Parameters, ds_config: Mapping[str, Any], *, itemsize: int, ranks: int, activations: Peaks
) -> list[Share]:
    """Returns what the reference's engine takes on each rank. Arguments as those of ``shares_of_policy``."""
    zero = ds_config["zero_optimization"]
    return [
        *_shares_of_weights("reference", parameters, zero, itemsize=itemsize, ranks=ranks, phase="scoring"),
        Share("reference's activations", device=activations.scoring, phase="scoring"),
    ]


def _shares_of_weights(
    name: str, parameters: Parameters, zero: Mapping[str, Any], *, itemsize: int, ranks: int, phase: Phase
) -> list[Share]:
    shards = itemsize * parameters.total / ranks
    is_away = _device(zero, "offload_param") != "none"
    # hpZ: a second copy, shared by fewer ranks, as those of one machine.
    sharers = zero.get("zero_hpz_partition_size", 1)
    again = itemsize * parameters.total / sharers if sharers > 1 else 0
    return [
        Share(f"{name}'s weights", host=shards) if is_away else Share(f"{name}'s weights", device=shards),
        Share(f"{name}'s weights again (hpZ)", device=again),
        Share(f"{name}'s small weights, whole", device=itemsize * parameters.whole),
        Share(f"{name}'s gathered weights", device=itemsize * gathered(parameters, zero), phase=phase),
    ]


def gathered(parameters: Parameters, zero: Mapping[str, Any]) -> float:
    """Returns how many values of the sharded tensors are whole on a rank at one time.

    Args:
        parameters: the model's.
        zero: its ds_config's section ``zero_optimization``.
    """
    in_use = parameters.largest + zero.get("stage3_prefetch_bucket_size", 5e7)
    kept = min(zero.get("stage3_max_live_parameters", 1e9), zero.get("stage3_max_reuse_distance", 1e9))
    return float(min(parameters.total - parameters.whole, max(in_use, kept)))


def keeps_for_backward(parameters: Parameters, zero: Mapping[str, Any]) -> bool:
    """Returns whether weights that were gathered for forward are still there in backward."""
    kept = min(zero.get("stage3_max_live_parameters", 1e9), zero.get("stage3_max_reuse_distance", 1e9) / 2)
    return bool(parameters.total - parameters.whole <= kept)


def _swap_buffers(zero: Mapping[str, Any], part: float) -> float:
    count = (zero.get("offload_optimizer") or {}).get("buffer_count", 4)
    return float(4 * count * min(part, zero.get("sub_group_size", 1e9)))


def _device(zero: Mapping[str, Any], section: str) -> str:
    return str((zero.get(section) or {}).get("device", "none"))
