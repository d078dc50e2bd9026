"""Writing the policy as a Hugging Face folder, a parameter at a time, and proving what was written.

Written aside and fsynced, read back and compared with the live shards, listed with checksums, loaded again as a frozen
engine that must score as the policy does, and only then renamed.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_ds.data.batch import PairBatch
from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.engine import initialize_reference
from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.shards import hollow, part_held, stored_buffers
from dpo_ds.engine.weight_files import INDEX, difference_of_divided, difference_of_shards
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, UserError, first_line
from dpo_ds.files import settled, sync_folder
from dpo_ds.models.adapters import Adapter, merged, merging, published, save_configs
from dpo_ds.models.stored import as_stored

MAX_SHARD_SIZE = "50GB"
"""Of one file: what transformers' ``save_pretrained`` says."""

CHECKSUMS = "SHA256SUMS"
_CARD = "README.md"
_ASIDE, _OLDER = ".tmp", ".old"
_SPARE_BYTES = 2**26
"""For all that is not weights: tokenizer, configs, card."""
_SEEN_WITHIN_S = 10.0
"""Shared file systems show another node's new file after a few seconds."""


@dataclass(frozen=True)
class Probe:
    """How an export is tried out: loaded again, it must score as the live policy does.

    Attributes:
        batch: the same on every rank.
        ds_config: of an engine without an optimizer.
        attention: the policy's.
        trust_remote_code: the policy's.
        bound: largest difference of two log-probs, per token; 0 where equal weights score equally to the bit.
        adapter_of: folder or hub id of the model that the export is an adapter of; None: it is a model, into whose
            weights an adapter is merged where there is one.
    """

    batch: PairBatch
    ds_config: Mapping[str, Any]
    attention: str
    trust_remote_code: bool
    bound: float
    adapter_of: str | None = None


def export(
    policy: PolicyEngine,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    config: PretrainedConfig,
    card: str,
    probe: Probe,
    world: World,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes weights, config, generation config, tokenizer and model card; collective.

    No rank holds more than one parameter whole. Each file has one rank that writes it. A tied head is stored once, and
    a mixture's experts one by one, as transformers does. The probe needs memory for the weights' shards a second time,
    in the policy's dtype.

    Args:
        policy: the engine.
        tokenizer: the run's.
        folder: where the model goes, on a file system that all ranks share; an older export there is replaced.
        config: what the model was loaded with; the live one has its dropout off.
        card: text of the model card.
        probe: how the files are tried out.
        world: the ranks.
        max_shard_size: of one file, such as ``5GB``.

    Raises:
        UserError: the folder cannot be written, or is not an export; nothing half-written is left.
        RunError: the files do not hold the live weights, or a weight is not finite, or the files score otherwise.
    """
    policy.model.eval()
    with torch.no_grad():
        expected = policy.score(probe.batch)
    # That has asked for weights of a backward that never comes: gathering one of them again would fail.
    policy.engine.empty_partition_cache()
    world.trim_memory()
    model = policy.model.model
    contents = _Contents.of(model, max_shard_size, adapter_alone=probe.adapter_of is not None)
    aside = folder.with_name(folder.name + _ASIDE)
    try:
        world.agree(
            _begin(aside, folder, contents, policy, tokenizer, config, card, probe.adapter_of)
            if world.rank == 0
            else None
        )
        world.agree(_unseen({aside: None}))
        world.agree(_unwritable(folder, _write_weights(model, aside, contents, world)))
        world.agree(_unseen({aside / file: contents.size_of(file) for file in contents.files}))
        for difference in (_difference, _difference_of_divided):
            _refuse(world, f"the export to {folder} is not what the policy is", difference(model, aside, contents))
        _write_checksums(aside, folder, world)
        _refuse(
            world,
            f"the export to {folder} was loaded again",
            _other_scores(aside, probe, expected, policy, world),
        )
        world.agree(_put_in_place(aside, folder) if world.rank == 0 else None)
    except (UserError, RunError):  # on all ranks alike
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def why_not_replaceable(folder: Path) -> str | None:
    """Returns why an export must not go to a place, in one line, or None if it may."""
    if not folder.exists() or (folder / CHECKSUMS).exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    return (
        f"export.folder {folder} holds something that is no verified export (it has no {CHECKSUMS}), which would be "
        "replaced; move it away, or name another folder"
    )


def lack_of_room(policy: PolicyEngine, folder: Path, *, adapter_alone: bool = False) -> str | None:
    """Returns why an export would not fit, in one line, or None if it would.

    Args:
        policy: the engine.
        folder: where the model goes.
        adapter_alone: whether that is an adapter.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    tensors = map(hollow, _exported(policy.model.model, adapter_alone=adapter_alone).values())
    needed, free = sum(tensor.nbytes for tensor in tensors) + _SPARE_BYTES, shutil.disk_usage(there).free
    if free >= needed:
        return None
    return _unwritable(folder, f"it needs {needed / 2**30:.2f} GiB, where {free / 2**30:.2f} GiB are free")


def _exported(model: PreTrainedModel, *, adapter_alone: bool) -> dict[str, Tensor]:
    weights, _, is_whole = published(model, adapter_alone=adapter_alone)
    return {**weights, **(stored_buffers(model) if is_whole else {})}


@dataclass(frozen=True)
class _Contents:
    """Which tensors go into which file.

    Attributes:
        live: this rank's parts of the weights, and the buffers.
        parts: as which tensors each of them is stored.
        tensors: those, shape and dtype alone.
        files: names of each file's tensors.
        index: which file holds each tensor, where there are several files.
    """

    live: Mapping[str, Tensor]
    parts: Mapping[str, Sequence[str]]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Sequence[str]]
    index: Mapping[str, Any] | None

    @classmethod
    def of(cls, model: PreTrainedModel, max_shard_size: str, *, adapter_alone: bool) -> "_Contents":
        live, pattern = (
            _exported(model, adapter_alone=adapter_alone),
            published(model, adapter_alone=adapter_alone).pattern,
        )
        # An adapter's names are peft's.
        stored = {
            name: {name: hollow(tensor)} if adapter_alone else as_stored(model, name, hollow(tensor))
            for name, tensor in live.items()
        }
        tensors = {part: tensor for parts in stored.values() for part, tensor in parts.items()}
        plan = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename} if plan.is_sharded else None
        parts = {name: list(parts) for name, parts in stored.items()}
        return cls(live, parts, tensors, plan.filename_to_tensors, index)

    def layout(self, file: str) -> tuple[bytes, dict[str, int]]:
        return safetensors_layout({name: self.tensors[name] for name in self.files[file]})

    def size_of(self, file: str) -> int:
        return len(self.layout(file)[0]) + sum(self.tensors[name].nbytes for name in self.files[file])

    @property
    def divided(self) -> set[str]:
        """Names of the weights that are not stored as they are."""
        return {name for name, parts in self.parts.items() if [*parts] != [name]}


def safetensors_layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Returns how a safetensors file begins, and where in it the bytes of each tensor do.

    Args:
        tensors: by name; their shapes and dtypes count, not their values.
    """
    # The order, and what dtypes are called, is the library's own: it is asked with tensors that have no elements.
    empty = serialized(
        {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}, metadata={"format": "pt"}
    )
    described = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    order = [name for name in described if name != "__metadata__"]
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        described[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    begin = len(header).to_bytes(8, "little") + header
    return begin, {name: len(begin) + described[name]["data_offsets"][0] for name in order}


def _begin(
    aside: Path,
    folder: Path,
    contents: _Contents,
    policy: PolicyEngine,
    tokenizer: Tokenizer,
    config: PretrainedConfig,
    card: str,
    adapter_of: str | None,
) -> str | None:
    """Writes all but the weights, if there is space for those, too; returns why it cannot."""
    model, older = policy.model.model, folder.with_name(folder.name + _OLDER)
    try:
        if problem := why_not_replaceable(folder):
            return problem
        if older.exists() and not folder.exists():
            older.rename(folder)  # killed between the two renames of an earlier export
        shutil.rmtree(older, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        if problem := lack_of_room(policy, folder, adapter_alone=adapter_of is not None):
            return problem
        save_configs(model, config, aside, adapter_of=adapter_of)
        tokenizer.save(aside)
        (aside / _CARD).write_text(card, encoding="utf-8")
        if contents.index is not None:
            (aside / INDEX).write_text(json.dumps(contents.index, indent=2))
    except Exception as error:  # what tokenizers' Rust raises on a full disk has no other class
        return _unwritable(folder, first_line(error))
    return None


def _unwritable(folder: Path, why: str | None) -> str | None:
    return why and (
        f"the model cannot be exported to {folder}: {why}; make room and make it writable, or name another folder with "
        "export.folder"
    )


def _unseen(sizes: Mapping[Path, int | None]) -> str | None:
    """Returns which of the files and folders, with their sizes, this rank does not see, though they were written."""
    deadline = time.monotonic() + _SEEN_WITHIN_S
    for path, size in sizes.items():
        while not (path.exists() and size in (None, path.stat().st_size)):
            if time.monotonic() > deadline:
                return f"export.folder must be on a file system that all ranks share: some rank does not see {path}"
            time.sleep(0.2)
    return None


def _write_weights(model: PreTrainedModel, folder: Path, contents: _Contents, world: World) -> str | None:
    """Writes this rank's files; returns why one could not be written."""
    files = _Files(folder)
    for number, file in enumerate(contents.files):
        if number % world.size == world.rank:
            files.begin(file, *contents.layout(file))
    for name, tensor in _whole_tensors(model, contents.live, world):
        if files.want(contents.parts[name]):
            stored = {name: tensor} if name in contents.tensors else as_stored(model, name, tensor)
            for part, values in stored.items():
                files.write(part, values)
    return files.close()


class _Files:
    """Safetensors files that are written tensor by tensor; the library wants all of a file's at once.

    What cannot be written is noted: a rank that raised would leave the others in a collective.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened = ExitStack()
        self._place_of: dict[str, tuple[FileIO, int]] = {}
        self._problem: str | None = None

    def begin(self, name: str, header: bytes, offsets: Mapping[str, int]) -> None:
        """Opens a file and writes what stands before its tensors, which begin at the offsets."""
        with self._noting():
            file = self._opened.enter_context((self._folder / name).open("wb", buffering=0))
            _write(file, memoryview(header))
            self._place_of |= {tensor: (file, offset) for tensor, offset in offsets.items()}

    def want(self, names: Iterable[str]) -> bool:
        """Returns whether any of these tensors is still to be written here."""
        return self._problem is None and not self._place_of.keys().isdisjoint(names)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor, if it belongs into one of these files."""
        if not self.want([name]):
            return
        file, offset = self._place_of[name]
        bits = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        with self._noting():
            file.seek(offset)
            _write(file, bits)

    def close(self) -> str | None:
        """Returns why something could not be written, or None."""
        with self._noting():
            self._opened.close()
        return self._problem

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._problem = self._problem or first_line(error)


def _write(file: FileIO, bits: memoryview) -> None:
    while bits:
        bits = bits[file.write(bits) :]


def _whole_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    layers = merging(model)
    for name, tensor in tensors.items():
        if name in layers:
            with deepspeed.zero.GatheredParameters(list(layers[name].parameters())):
                yield name, merged(layers[name])
        elif isinstance(tensor, nn.Parameter):
            with deepspeed.zero.GatheredParameters([tensor]):
                yield name, tensor.detach()
        else:
            yield name, tensor
        world.trim_memory()  # else what each has left behind would add up to the model
        world.progressed()


def _difference(model: PreTrainedModel, folder: Path, contents: _Contents) -> str | None:
    """Returns what of this rank's live weights the files do not hold, or why they should not be published."""
    # What is merged exists in the files alone: the scores must speak for it.
    layers = merging(model)
    held = {name: part_held(tensor) for name, tensor in contents.live.items() if name not in layers}
    for name, shard in held.items():
        if not torch.isfinite(shard.values).all():
            return f"the weight {name} is not finite"
    try:
        for path, names in contents.files.items():
            with safe_open(folder / path, framework="pt") as file:
                if set(file.keys()) != set(names):
                    return f"{path} holds other tensors than it should"
                for name in names:
                    found, planned = file.get_tensor(name), contents.tensors[name]
                    if (found.shape, found.dtype) != (planned.shape, planned.dtype):
                        return f"{path} holds {name} as {found.dtype} {tuple(found.shape)}"
        place_of = {name: (str(folder / path), name) for path, names in contents.files.items() for name in names}
        return difference_of_shards({name: held[name] for name in held if name not in contents.divided}, place_of)
    except (OSError, SafetensorError) as error:
        return f"it cannot be read: {first_line(error)}"


def _difference_of_divided(model: PreTrainedModel, folder: Path, contents: _Contents) -> str | None:
    """Returns which of the weights that this rank has compared is not what its tensors in the files are; collective."""
    place_of = {name: (str(folder / path), name) for path, names in contents.files.items() for name in names}
    names = contents.divided - merging(model).keys()
    sources = {name: {part: place_of[part] for part in contents.parts[name]} for name in names}
    return difference_of_divided(model, {name: contents.live[name] for name in names}, sources)


def _refuse(world: World, what: str, problem: str | None) -> None:
    problems = [named for named in world.gather(problem) if named]
    if problems:
        raise RunError(f"{what}: {problems[0]}; nothing was exported")


def _write_checksums(aside: Path, folder: Path, world: World) -> None:
    listed = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
    names: list[str] = world.broadcast(listed)
    problem, mine = None, dict[str, str]()
    try:
        mine = {name: settled(aside / name)[1] for name in names[world.rank :: world.size]}
    except OSError as error:
        problem = first_line(error)
    world.agree(_unwritable(folder, problem))
    digests = {name: digest for part in world.gather(mine) for name, digest in part.items()}
    if world.rank == 0:
        try:
            (aside / CHECKSUMS).write_text("".join(f"{digests[name]}  {name}\n" for name in names))
            settled(aside / CHECKSUMS)
        except OSError as error:
            problem = first_line(error)
    world.agree(_unwritable(folder, problem))


def _other_scores(aside: Path, probe: Probe, expected: Tensor, policy: PolicyEngine, world: World) -> str | None:
    copy = initialize_reference(
        probe.adapter_of or str(aside),
        world=world,
        config=probe.ds_config,
        dtype=policy.dtype,
        attention=probe.attention,
        trust_remote_code=probe.trust_remote_code,
        adapter=Adapter(path=str(aside)) if probe.adapter_of else None,
    )
    copy.model.computes_as(policy.model)
    differences = (copy.score(probe.batch) - expected).flatten() / probe.batch.response_tokens
    copy.free()
    worst = float(differences.abs().max())
    if worst <= probe.bound:
        return None
    return f"a pair scores otherwise than by the live policy, by {worst:.3g} a token (bound {probe.bound:g})"


def _put_in_place(aside: Path, folder: Path) -> str | None:
    older = folder.with_name(folder.name + _OLDER)
    try:
        sync_folder(aside)
        # At any moment one of the two is there whole, under one of three names.
        if folder.exists():
            folder.rename(older)
        try:
            aside.rename(folder)
        except OSError:
            if older.exists():
                older.rename(folder)
            raise
        sync_folder(folder.parent)
    except OSError as error:
        return _unwritable(folder, first_line(error))
    shutil.rmtree(older, ignore_errors=True)
    return None
