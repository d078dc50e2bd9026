"""A node's devices, before its ranks take them. Nothing is allocated here."""

from deepspeed.accelerator import get_accelerator

from dpo_ds.errors import UserError


def kind_of_devices(ranks: int) -> str:
    """Returns what this node's ranks will compute on, as ``cuda`` or ``cpu``.

    Args:
        ranks: of this node, each of which needs a device of its own; ranks on CPUs share them.

    Raises:
        UserError: there are fewer devices than ranks.
    """
    accelerator = get_accelerator()
    kind = str(accelerator.device_name())
    devices = accelerator.device_count()
    if kind != "cpu" and devices < ranks:
        raise UserError(
            f"this node has {devices} {kind} device{'s' * (devices != 1)} for {ranks} ranks; start fewer ranks a node, "
            "or let each rank see all devices of its node (CUDA_VISIBLE_DEVICES, srun --gpus-per-task)"
        )
    return kind
