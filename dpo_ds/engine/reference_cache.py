"""The reference's log-probs on disk: scored once, and found again by all that they depend on.

Rank 0 alone touches the disk. A block of pairs is complete or absent: written aside, renamed, with its own digest.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dpo_ds.data.batch import PairBatch, packed_batch, padded_batch
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.schedule import PackedRows, PaddedRows, Plan, Rows, plan_evaluation
from dpo_ds.engine.data_parallel import DataParallel
from dpo_ds.engine.reference import ReferenceEngine
from dpo_ds.engine.reference_key import Scoring
from dpo_ds.engine.stopping import Agreement
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, Stopped


class Source(NamedTuple):
    """Who scored, known only once the engine is there.

    Attributes:
        fingerprint: of the live weights.
        packed: whether pairs shared rows.
    """

    fingerprint: str
    packed: bool


class LogpCache:
    """A frozen model's log-probs of one set of prepared pairs. Every method is collective, unless it says otherwise."""

    def __init__(
        self, root: Path, scoring: Scoring, pairs: PreparedPairs, *, world: World, data_parallel: DataParallel
    ) -> None:
        """Reads what is there; damaged blocks count as missing.

        Args:
            root: folder of all cached log-probs.
            scoring: how these are scored.
            pairs: which are scored.
            world: the ranks.
            data_parallel: which of them score which pairs.
        """
        self.folder = root / scoring.key
        self.pairs = pairs
        self._scoring = scoring
        self._world = world
        self._data_parallel = data_parallel
        # (2, pairs), NaN where missing.
        self._logps, self.source = world.broadcast(self._read() if world.rank == 0 else None)

    @property
    def is_complete(self) -> bool:
        """Whether no pair is missing; not collective."""
        return not bool(self._logps.isnan().any())

    def logps(self, pairs: Sequence[int]) -> Tensor:
        """Returns ``(2, pairs)``, as ``ReferenceEngine.score`` does, on the CPU; not collective."""
        found = self._logps[:, list(pairs)]
        assert not found.isnan().any()
        return found

    def expect(self, source: Source) -> None:
        """Forgets what another source has scored."""
        if self.source != source:
            self._logps.fill_(torch.nan)
            self.source = source

    def fill(self, reference: ReferenceEngine, agreement: Agreement) -> None:
        """Scores the missing blocks; each is on disk before the next begins.

        Args:
            reference: the live engine, which ``expect`` was told of.
            agreement: whether the ranks were asked to stop.

        Raises:
            UserError: the folder cannot be written.
            RunError: a log-prob is not finite, or the reference has moved.
            Stopped: the ranks were asked to stop; the block that was begun is scored again.
        """
        missing = [block for block in self._blocks() if self._logps[:, block.start : block.stop].isnan().any()]
        pairs = len(self.pairs)
        present = pairs - sum(map(len, missing))
        rank = self._world.rank
        with tqdm(total=pairs, initial=present, desc="reference", unit="pair", disable=rank != 0) as bar:
            for block in missing:
                for scored in self._score(block, reference):
                    if reason := agreement.ask():
                        raise Stopped(reason.name, step=0, checkpoint=None)
                    bar.update(scored)
                self._world.agree(self._write(block) if rank == 0 else None)
        reference.check()

    def sample(self, pairs: int, *, seed: int) -> list[tuple[PairBatch, Tensor]]:
        """Returns this rank's share of the micro-batches of some pairs, as they were scored, and what was scored.

        Equal weights score them to the bit. There are as many on every rank, none only where nothing is known.

        Args:
            pairs: how many are drawn from those that are known.
            seed: of the draw.
        """
        known = (~self._logps.isnan().any(0)).nonzero().flatten()
        drawn = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:pairs]].tolist()
        blocks = {block: [pair for pair in drawn if pair in block] for block in self._blocks()}
        batches = [
            micro_batch.pairs
            for block, wanted in blocks.items()
            if wanted
            for micro_batch in self._plan(block, ranks=1)[0]
            if not set(wanted).isdisjoint(micro_batch.pairs)
        ]
        rank, size = self._data_parallel.rank, self._data_parallel.size
        mine = [batches[(start + rank) % len(batches)] for start in range(0, len(batches), size)]
        return [(self._batch(some), self.logps(some).to(self._world.device)) for some in mine]

    def _score(self, block: range, reference: ReferenceEngine) -> Iterator[int]:
        """Yields how many pairs each turn of the ranks has scored."""
        plan, mine = self._plan(block, ranks=self._data_parallel.size), []
        for turn in zip(*plan, strict=True):
            micro_batch = turn[self._data_parallel.rank]
            # A stand-in is scored too: the other ranks gather weights with this one.
            scores = reference.score(self._batch(micro_batch.pairs)).cpu()
            if micro_batch.weight:
                mine.append((list(micro_batch.pairs), scores))
            yield sum(len(other.pairs) for other in turn if other.weight)
        for scored in self._data_parallel.gather(mine):
            for pairs, scores in scored:
                self._logps[:, pairs] = scores
        bad = [pair for pair in block if not self._logps[:, pair].isfinite().all()]
        if bad:
            named = ", ".join([*map(self.pairs.where, bad[:4]), *["..."] * (len(bad) > 4)])
            raise RunError(f"the reference's log-probs of {len(bad)} pairs are not finite ({named}); look at them")

    def _plan(self, block: range, *, ranks: int) -> Plan:
        lengths = self.pairs.lengths
        # By tokens alone, not by what they cost this model: the shapes must follow from the key.
        rows: Rows = (
            PackedRows(lengths.tokens, lengths.tokens.astype(float)) if self._packed else PaddedRows(lengths.longer)
        )
        budget = self._scoring.tokens_per_micro_batch
        return plan_evaluation(block, rows=rows, ranks=ranks, tokens_per_micro_batch=budget)

    def _batch(self, pairs: Sequence[int]) -> PairBatch:
        lay_out = packed_batch if self._packed else padded_batch
        return lay_out([self.pairs.pair(pair) for pair in pairs]).to(self._world.device)

    @property
    def _packed(self) -> bool:
        assert self.source is not None
        return self.source.packed

    def _blocks(self) -> list[range]:
        size, pairs = self._scoring.block_pairs, len(self.pairs)
        return [range(start, min(start + size, pairs)) for start in range(0, pairs, size)]

    def _tokens(self, block: range) -> Tensor:
        """Returns ``(2, pairs)``: tokens of the chosen and of the rejected responses."""
        lengths = self.pairs.lengths
        return torch.stack(
            [torch.from_numpy(part[block.start : block.stop]) for part in (lengths.chosen, lengths.rejected)]
        )

    def _file(self, block: range) -> Path:
        return self.folder / f"pairs-{block.start:08d}.safetensors"

    def _read(self) -> tuple[Tensor, Source | None]:
        logps = torch.full((2, len(self.pairs)), torch.nan)
        source = None
        for block in self._blocks():
            try:
                with safe_open(self._file(block), framework="pt") as file:
                    about, found, tokens = file.metadata(), file.get_tensor("logps"), file.get_tensor("tokens")
            except (OSError, SafetensorError):
                continue
            if about.get("digest") != _digest(found, about) or not torch.equal(tokens, self._tokens(block)):
                continue
            scored_by = Source(about["fingerprint"], about["layout"] == "packed")
            source = source or scored_by
            if scored_by == source:
                logps[:, block.start : block.stop] = found
        return logps, source

    def _write(self, block: range) -> str | None:
        assert self.source is not None
        logps = self._logps[:, block.start : block.stop].contiguous()
        about = {"fingerprint": self.source.fingerprint, "layout": "packed" if self.source.packed else "padded"}
        about["digest"] = _digest(logps, about)
        file = self._file(block)
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Beside the blocks, for whoever wonders what the folder is.
            (self.folder / "scoring.json").write_text(json.dumps(asdict(self._scoring), indent=1) + "\n")
            save_file({"logps": logps, "tokens": self._tokens(block)}, aside, metadata=about)
            with suppress(FileNotFoundError):  # another run that scores the same has tidied up, see below
                aside.replace(file)
            for left_by_a_killed_process in self.folder.glob(f".{file.name}.*"):
                left_by_a_killed_process.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                aside.unlink()
            return f"reference.cache_dir {self.folder.parent} cannot be written: {error}; name another folder"
        return None


def _digest(logps: Tensor, about: dict[str, str]) -> str:
    said = json.dumps([about.get("fingerprint"), about.get("layout")]).encode()
    return hashlib.blake2b(said + logps.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class CachedReference:
    """A reference whose engine is not needed: the log-probs of all sets of pairs of a run.

    Attributes:
        caches: one for each set of prepared pairs.
    """

    caches: tuple[LogpCache, ...]

    @property
    def is_complete(self) -> bool:
        """Whether no pair is missing and all were scored by the same weights in the same layout."""
        return all(cache.is_complete for cache in self.caches) and len({cache.source for cache in self.caches}) == 1

    @property
    def fingerprint(self) -> str:
        """Of the weights that scored."""
        (source,) = {cache.source for cache in self.caches}
        assert source is not None
        return source.fingerprint

    def logps(self, pairs: PreparedPairs, indices: Sequence[int]) -> Tensor:
        """Returns ``(2, indices)``, on the CPU: the log-probs of some pairs of one of the sets."""
        (cache,) = (cache for cache in self.caches if cache.pairs.manifest.key == pairs.manifest.key)
        return cache.logps(indices)
