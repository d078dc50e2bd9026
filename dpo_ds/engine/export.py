"""Writing the policy as a Hugging Face folder, and reading it back to prove it."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.engine.files import settled, sync_folder
from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.shards import INDEX, ZeroParameter, difference_from_files, stored_buffers
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, first_line

CHECKSUMS = "SHA256SUMS"
CARD = "README.md"
_SHARD_BYTES = 2 * 2**30
_ROOM = 2**24  # for all that is no weight


def export(
    policy: PolicyEngine,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    config: PretrainedConfig,
    world: World,
    card: str = "",
    prove: Callable[[Path], None] = lambda folder: None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes weights, config, generation config, tokenizer, model card and checksums; collective.

    Weights are gathered one by one. Each rank writes its own files, of which it holds one at a time. The folder
    appears, in place of an older one, when every rank has found its live shards in the files again. A tied head is
    stored once, as transformers does.

    Args:
        policy: the engine.
        tokenizer: the run's.
        folder: where the model goes.
        config: what the model was loaded with; the live one has its dropout off.
        world: the ranks.
        card: text of its model card.
        prove: looks at the finished files on every rank, and raises if they are not what they should be.
        shard_bytes: bound on the size of a file, unless one weight is larger.

    Raises:
        UserError: the files cannot be written; what was there before is still there.
        RunError: a weight is not finite, or the files do not hold the live weights.
    """
    # The last forward has asked for weights of a backward that never came: gathering one of them again would fail.
    policy.engine.empty_partition_cache()
    aside = folder.with_name(folder.name + ".tmp")
    try:
        _write(policy, tokenizer, aside, config=config, world=world, card=card, shard_bytes=shard_bytes)
        problems = [found for found in world.gather(difference_from_files(policy.model.model, aside)) if found]
        if problems:
            raise RunError(f"the export to {folder} does not hold the policy's weights: {problems[0]}")
        prove(aside)
        world.agree(_problem_of(lambda: _replace(folder, aside), folder) if world.rank == 0 else None)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def lack_of_room(policy: PolicyEngine, folder: Path) -> str | None:
    """Returns why an export would not fit into a folder's file system, in one line, or None if it would.

    Args:
        policy: the engine.
        folder: one that exists.
    """
    needed = policy.parameters * policy.dtype.itemsize + _ROOM
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"the export needs about {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} GiB are free; make "
        "room, or name another folder"
    )


def _write(
    policy: PolicyEngine,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    config: PretrainedConfig,
    world: World,
    card: str,
    shard_bytes: int,
) -> None:
    model, problem = policy.model.model, None

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config.dtype = model.dtype
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.save(folder)
        (folder / CARD).write_text(card, encoding="utf-8")

    if world.rank == 0:
        problem = _problem_of(begin, folder) or lack_of_room(policy, folder)
    world.agree(problem)
    parameters: dict[str, ZeroParameter] = dict(model.named_parameters())
    buffers = stored_buffers(model)
    # Planned on tensors without data.
    hollow = {name: torch.empty(p.ds_shape, dtype=p.dtype, device="meta") for name, p in parameters.items()}
    hollow |= {name: buffer.to("meta") for name, buffer in buffers.items()}
    plan = split_torch_state_dict_into_shards(hollow, max_shard_size=shard_bytes)
    files = list(plan.filename_to_tensors)
    for first in range(0, len(files), world.size):
        mine: dict[str, Tensor] = {}
        for writer, file in enumerate(files[first : first + world.size]):
            mine |= _gathered(plan.filename_to_tensors[file], parameters, buffers, keep=writer == world.rank)
        _check_finite(mine, world)
        problem = None
        if mine:
            path = folder / files[first + world.rank]
            problem = _problem_of(partial(_save, mine, path), folder)
        world.agree(problem)
    if plan.is_sharded and world.rank == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        problem = _problem_of(lambda: (folder / INDEX).write_text(json.dumps(index, indent=2)), folder)
    world.agree(problem)
    _write_checksums(folder, world)


def _write_checksums(folder: Path, world: World) -> None:
    problem, mine = None, dict[str, str]()
    names = sorted(path.name for path in folder.iterdir())
    try:
        mine = {name: settled(folder / name)[1] for name in names[world.rank :: world.size]}
    except OSError as error:
        problem = _unwritable(folder, error)
    world.agree(problem)
    sums = {name: digest for part in world.gather(mine) for name, digest in part.items()}
    if world.rank == 0:
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        problem = _problem_of(lambda: (folder / CHECKSUMS).write_text(lines), folder)
    world.agree(problem)


def _gathered(
    names: Sequence[str], parameters: Mapping[str, ZeroParameter], buffers: Mapping[str, Tensor], *, keep: bool
) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        if name in buffers:
            if keep:
                tensors[name] = buffers[name].to("cpu")
            continue
        with deepspeed.zero.GatheredParameters([parameters[name]]):
            if keep:
                tensors[name] = parameters[name].detach().to("cpu", copy=True)
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], world: World) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    found = [name for names in world.gather(bad) for name in names]
    if found:
        raise RunError(f"nothing is exported: {len(found)} weights hold values that are not finite ({found[0]} ...)")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # as the user's umask has it; the library's own files nobody else may read
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _replace(folder: Path, aside: Path) -> None:
    older = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(older, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(older)
    aside.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


def _problem_of(work: Callable[[], object], folder: Path) -> str | None:
    """Does the work; returns why it could not be done, for the ranks to agree on."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return _unwritable(folder, error)
    return None


def _unwritable(folder: Path, error: Exception) -> str:
    return f"the export cannot be written to {folder}: {first_line(error)}; make room there or name another folder"
