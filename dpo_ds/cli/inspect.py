"""``python -m dpo_ds inspect``: what a run's data holds, before anything is spent on it. No rank, no model."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from dpo_ds.config import DataSource, Run, parse_run, resolve_path
from dpo_ds.data.messages import Message
from dpo_ds.data.preferences import Scored, Source
from dpo_ds.data.prepared import check_dropped
from dpo_ds.data.row_tokenizer import tokenize
from dpo_ds.data.rows import load_rows
from dpo_ds.data.tokenization import Mask, TokenizedPair, Tokenizer, Truncation, merges_at_boundary
from dpo_ds.models.tokenizer import SentencePieceTokenizer, load_tokenizer

_SAMPLES = 3
_ROWS_NAMED = 100  # of each reason in the object, a tenth of them in the text
_SHOWN_CHARACTERS = 240
_GREEN, _RED, _INVERSE, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[7m", "\x1b[0m"
_PARTS = ("prompt", "chosen", "rejected")
_NUMBERS = ("probability", "margin", "weight")


class Decoder(NamedTuple):
    """A tokenizer's way back, opened by its own library: what is shown has not come through our encoding.

    Attributes:
        text: the text of some ids.
        special: the names of ids that stand for no text.
    """

    text: Callable[[list[int]], str]
    special: Mapping[int, str]

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, trust_remote_code: bool) -> "Decoder":
        """Opens the tokenizer again."""
        if isinstance(tokenizer, SentencePieceTokenizer):
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_file=tokenizer.name)
            controls = filter(pieces.is_control, range(pieces.vocab_size()))
            return cls(pieces.decode, {token: pieces.id_to_piece(token) for token in controls})
        from transformers import AutoTokenizer

        opened = AutoTokenizer.from_pretrained(tokenizer.name, trust_remote_code=trust_remote_code)
        added = {token: str(name) for token, name in opened.added_tokens_decoder.items() if name.special}
        return cls(lambda ids: str(opened.decode(ids, clean_up_tokenization_spaces=False)), added)

    def spans(self, ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
        """Yields the texts between special tokens and these tokens' names, each with whether it is special."""
        plain: list[int] = []
        for token in ids:
            if token in self.special:
                if plain:
                    yield self.text(plain), False
                yield self.special[token], True
                plain = []
            else:
                plain.append(token)
        if plain:
            yield self.text(plain), False


@dataclass
class Findings:
    """What became of the rows of ``data.train`` or ``data.eval``.

    Attributes:
        sources: files, folders and hub ids.
        max_length: bound on the tokens of prompt + longer response.
        rows_read: rows of all sources.
        rows_of: rows by source.
        pairs_of: pairs by source.
        dropped: rows that cannot be used, by reason.
        dropped_rows: the first of them, as ``(source, row)``.
        lengths: tokens of prompt, chosen and rejected, one list each.
        prompts: hashes of their tokens.
        ids: of the pairs.
        turned: pairs that occur with chosen and rejected exchanged, too.
        merges: pairs whose tokens would merge across the boundary.
        bos_first: prompts that begin with BOS.
        bos_repeated: pairs with more than one BOS.
        eos_last: responses that end with EOS.
        eos_inside: responses that go on behind another EOS.
        before_eos: in how many responses each token stands shortly before the last EOS.
        numbers: probabilities, margins and weights of the pairs that have one.
        samples: places and tokens of some pairs.
    """

    sources: list[str]
    max_length: int
    rows_of: list[int]
    pairs_of: list[int]
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_rows: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    lengths: tuple[list[int], list[int], list[int]] = field(default_factory=lambda: ([], [], []))
    prompts: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    turned: int = 0
    merges: int = 0
    bos_first: int = 0
    bos_repeated: int = 0
    eos_last: int = 0
    eos_inside: int = 0
    before_eos: Counter[int] = field(default_factory=Counter)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    samples: list[tuple[str, TokenizedPair]] = field(default_factory=list)

    @property
    def rows_read(self) -> int:
        """Rows of all sources."""
        return sum(self.rows_of)

    @property
    def pairs(self) -> int:
        """What can be used."""
        return sum(self.pairs_of)

    @property
    def expanded(self) -> int:
        """How many more pairs than one a row the rows with ranked answers name."""
        return self.pairs + self.dropped.total() - self.rows_read

    @property
    def first_dropped(self) -> dict[str, str]:
        """For each reason the row where it was met first."""
        return {reason: self.name(*rows[0]) for reason, rows in self.dropped_rows.items()}

    def name(self, source: int, row: int) -> str:
        """Returns how messages call a row."""
        return f"{self.sources[source]} row {row}"


def inspect(argv: Sequence[str], *, as_json: bool) -> None:
    """Prints what a run's data holds.

    Args:
        argv: as of a training run.
        as_json: whether to print one object in place of a text.

    Raises:
        UserError: the data cannot be read, or more than ``data.max_dropped`` of it cannot be used; what was found is
            printed before.
    """
    run = parse_run(argv)
    os.environ.update(run.config.env)
    data, model = run.config.data, run.config.model
    key = "model.tokenizer" if model.tokenizer else "model.policy"
    path = resolve_path(model.tokenizer or model.policy, key=key, run_file=run.file, hub=True)
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code)
    decoder = Decoder.of(tokenizer, trust_remote_code=model.trust_remote_code)

    def found(sources: Sequence[DataSource], key: str) -> Findings:
        return examine(
            [_source(source, run, key) for source in sources],
            tokenizer,
            max_length=data.max_length,
            truncation=data.truncation,
            scored=data.scored,
        )

    train = found(data.train, "data.train")
    evaluation = found(data.eval, "data.eval") if data.eval else None
    if as_json:
        print(json.dumps(_object(train, evaluation, tokenizer, decoder), ensure_ascii=False))
    else:
        print(_text(train, evaluation, tokenizer, decoder, max_dropped=data.max_dropped, coloured=_is_coloured()))
    for findings in filter(None, (train, evaluation)):
        check_dropped(findings, data.max_dropped)


def examine(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation | None,
    scored: Scored = "last_turn",
) -> Findings:
    """Reads and tokenizes sources, and counts what is found.

    Args:
        sources: read one after the other.
        tokenizer: the policy's.
        max_length: bound on the tokens of prompt + longer response.
        truncation: as in ``tokenize_pair``.
        scored: as in ``read_preferences``.

    Raises:
        UserError: a source cannot be read or lacks a column.
    """
    files = [rows for source in sources for rows in load_rows(source)]
    findings = Findings([rows.path for rows in files], max_length, [len(rows) for rows in files], [0] * len(files))
    outcomes = tokenize(files, tokenizer, max_length=max_length, truncation=truncation, scored=scored)
    for number, (source, row, preference, pair) in enumerate(outcomes):
        if isinstance(pair, str):
            findings.dropped[pair] += 1
            named = findings.dropped_rows.setdefault(pair, [])
            if len(named) < _ROWS_NAMED:
                named.append((source, row))
            continue
        assert preference is not None
        findings.pairs_of[source] += 1
        _count(findings, pair, tokenizer)
        findings.merges += merges_at_boundary(preference, tokenizer)
        # From the beginning, the middle and the end.
        if number * _SAMPLES >= len(findings.samples) * findings.rows_read and len(findings.samples) < _SAMPLES:
            findings.samples.append((findings.name(source, row), pair))
    return findings


def _source(source: DataSource, run: Run, key: str) -> Source:
    path = resolve_path(source.path, key=key, run_file=run.file, hub=True)
    return Source(path, source.split or "train", source.columns)


def _count(findings: Findings, pair: TokenizedPair, tokenizer: Tokenizer) -> None:
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    for lengths, part in zip(findings.lengths, parts, strict=True):
        lengths.append(len(part))
    findings.prompts.add(TokenizedPair.of(pair.prompt_ids, (), ()).id)
    findings.turned += TokenizedPair.of(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids).id in findings.ids
    findings.ids.add(pair.id)
    for name in _NUMBERS:
        if (value := getattr(pair, name)) is not None:
            findings.numbers.setdefault(name, []).append(value)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    findings.bos_first += pair.prompt_ids[0] == bos
    # Where BOS and EOS are one token, as GPT-2's are, only the first place tells of BOS.
    findings.bos_repeated += bos not in (None, eos) and any((*parts[0], *part).count(bos) > 1 for part in parts[1:])
    for response, scored in zip(parts[1:], (pair.chosen_scored, pair.rejected_scored), strict=True):
        findings.eos_last += response[-1] == eos
        # Where several turns are scored, what others say follows upon each EOS.
        goes_on = (scored or (True,) * len(response))[1:]
        findings.eos_inside += any(token == eos and on for token, on in zip(response, goes_on, strict=False))
        if response[-1] == eos:
            # ChatML's marker has a newline behind it.
            findings.before_eos.update(set(response[-4:-1]))


def _overlap(train: Findings, evaluation: Findings) -> dict[str, int]:
    return {
        "prompts": len(train.prompts & evaluation.prompts),
        "pairs": len(train.ids & evaluation.ids),
    }


def _object(train: Findings, evaluation: Findings | None, tokenizer: Tokenizer, decoder: Decoder) -> dict[str, Any]:
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return {
        **_counts(train, tokenizer, decoder),
        "eval": _counts(evaluation, tokenizer, decoder) if evaluation else None,
        "overlap": _overlap(train, evaluation) if evaluation else None,
        "tokenizer": {
            "name": tokenizer.name,
            **{name: None if token is None else decoder.special.get(token, token) for name, token in special.items()},
            "chat_template": tokenizer.has_chat_template,
            "specimen": _specimen(tokenizer),
        },
    }


def _counts(findings: Findings, tokenizer: Tokenizer, decoder: Decoder) -> dict[str, Any]:
    return {
        "rows": findings.rows_read,
        "expanded": findings.expanded,
        "pairs": findings.pairs,
        "dropped": dict(findings.dropped),
        "dropped_rows": {
            reason: [{"source": findings.sources[source], "row": row} for source, row in rows]
            for reason, rows in findings.dropped_rows.items()
        },
        "sources": [
            {"path": path, "rows": rows, "pairs": pairs}
            for path, rows, pairs in zip(findings.sources, findings.rows_of, findings.pairs_of, strict=True)
        ],
        "lengths": {name: _spread(lengths) for name, lengths in zip(_PARTS, findings.lengths, strict=True)},
        "chosen_longer": _chosen_longer(findings),
        "duplicates": {
            "pairs": findings.pairs - len(findings.ids),
            "prompts": findings.pairs - len(findings.prompts),
            "exchanged": findings.turned,
        },
        "boundary_merges": findings.merges,
        "bos": {"first": findings.bos_first, "repeated": findings.bos_repeated},
        "eos": {"last": findings.eos_last, "inside": findings.eos_inside},
        "doubts": _doubts(findings, tokenizer, decoder),
        "labels": {
            name: {"pairs": len(values), "least": min(values), "mean": fmean(values), "largest": max(values)}
            for name, values in findings.numbers.items()
        },
        "samples": [
            {"row": name, **{part: _shown(getattr(pair, f"{part}_ids"), decoder) for part in _PARTS}}
            for name, pair in findings.samples
        ],
    }


def _spread(lengths: Sequence[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    median, late = np.percentile(lengths, (50, 95))
    return {"median": float(median), "p95": float(late), "longest": max(lengths)}


def _chosen_longer(findings: Findings) -> float | None:
    _, chosen, rejected = map(np.array, findings.lengths)
    return float((chosen > rejected).mean()) if findings.pairs else None


def _specimen(tokenizer: Tokenizer) -> str | None:
    """Returns how the chat template writes a prompt of one turn: a turn or a thought that it adds shows there."""
    if not tokenizer.has_chat_template:
        return None
    return tokenizer.render_chat([Message("user", "...")], add_generation_prompt=True)


def _doubts(findings: Findings, tokenizer: Tokenizer, decoder: Decoder) -> list[str]:
    """Returns what is probably wrong with template, BOS and EOS, each in a line."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    doubts = []
    if bos is not None and tokenizer.encode_prompt("a")[0] == bos and findings.bos_first < findings.pairs:
        doubts.append(
            f"{findings.pairs - findings.bos_first} prompts do not begin with BOS, which the tokenizer puts before "
            "plain text: the chat template should write it"
        )
    # ChatML's first token may be BOS, and begins each turn.
    begins_turns = bos is not None and tokenizer.encode_rendered(_specimen(tokenizer) or "", begins=True).count(bos) > 1
    if findings.bos_repeated and not begins_turns:
        doubts.append(
            f"{findings.bos_repeated} pairs hold several BOS: take it out of the texts or of the chat template"
        )
    if cut := 2 * findings.pairs - findings.eos_last:
        doubts.append(f"{cut} responses do not end with EOS: data.truncation cut them, so they do not learn to end")
    if findings.eos_inside:
        doubts.append(
            f"{findings.eos_inside} responses go on behind an EOS, where generation ends: take it out of them"
        )
    for token, count in findings.before_eos.items():
        if token in decoder.special and token not in (bos, eos):
            doubts.append(
                f"{count} responses end with {decoder.special[token]} and then EOS {decoder.special.get(eos, eos)}: if "
                "the chat template ends turns with the first, it should be the tokenizer's eos_token"
            )
    return doubts


def _shown(ids: Sequence[int], decoder: Decoder) -> str:
    return "".join(text for text, _ in decoder.spans(ids))


def _is_coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _text(
    train: Findings,
    evaluation: Findings | None,
    tokenizer: Tokenizer,
    decoder: Decoder,
    *,
    max_dropped: float,
    coloured: bool,
) -> str:
    lines = [*_described("train", train, max_dropped)]
    if evaluation:
        lines += _described("eval", evaluation, max_dropped)
        overlap = _overlap(train, evaluation)
        lines.append(
            ("overlap", f"{overlap['prompts']} prompts and {overlap['pairs']} pairs of eval are in train, too")
        )
    lines += _tokenizer_lines(train, tokenizer, decoder)
    doubts = _doubts(train, tokenizer, decoder)
    doubts += [f"eval: {doubt}" for doubt in _doubts(evaluation, tokenizer, decoder)] if evaluation else []
    if train.pairs:
        lines += [("doubt", doubt) for doubt in doubts] or [("", "template, BOS and EOS are as they should be")]
    for name, pair in train.samples:
        lines.append(("", ""))
        lines.append(("pair", name))
        prompt = _painted(pair.prompt_ids, decoder, colour="" if coloured else None, keep_end=True)
        lines.append(("prompt", prompt))
        for part, ids, scored, colour in (
            ("chosen", pair.chosen_ids, pair.chosen_scored, _GREEN),
            ("rejected", pair.rejected_ids, pair.rejected_scored, _RED),
        ):
            painted = _painted(ids, decoder, colour=colour if coloured else None, keep_end=False, scored=scored)
            lines.append((part, painted))
    return "\n".join(f"{name:>11}  {text}".rstrip() for name, text in lines)


def _described(name: str, findings: Findings, max_dropped: float) -> Iterator[tuple[str, str]]:
    expanded = f" that name {findings.rows_read + findings.expanded} pairs" if findings.expanded else ""
    yield name, f"{findings.rows_read} rows{expanded}, {findings.pairs} pairs"
    for path, rows, pairs in zip(findings.sources, findings.rows_of, findings.pairs_of, strict=True):
        yield "", f"{path}: {rows} rows, {pairs} pairs"
    total = findings.dropped.total()
    share = total / max(1, findings.rows_read + findings.expanded)
    yield "dropped", f"{total} ({share:.1%}; data.max_dropped allows {max_dropped:.1%})"
    for reason, count in findings.dropped.most_common():
        yield "", f"{count} {reason}: {_rows_named(findings, reason)}"
    if not findings.pairs:
        return
    yield "tokens", f"{'':<10}{'median':>8}{'95 %':>8}{'longest':>9}"
    for part, lengths in zip(_PARTS, findings.lengths, strict=True):
        spread = _spread(lengths) or {}
        yield "", f"{part:<10}{spread['median']:>8.0f}{spread['p95']:>8.0f}{spread['longest']:>9}"
    yield "longer", f"chosen is longer than rejected in {_chosen_longer(findings):.1%} of the pairs"
    doubles = findings.pairs - len(findings.ids)
    yield (
        "doubles",
        f"{doubles} pairs occur again, {findings.turned} with chosen and rejected exchanged; "
        f"{len(findings.prompts)} different prompts",
    )
    for name, values in findings.numbers.items():
        yield name, f"{min(values):g} to {max(values):g}, {fmean(values):.3g} on average, of {len(values)} pairs"
    yield "boundary", f"{findings.merges} pairs have tokens that one encoding of prompt and response would merge"


def _rows_named(findings: Findings, reason: str) -> str:
    """Returns the first rows of a reason, neighbours drawn together, as ``rows 3, 7-9``."""
    rows = findings.dropped_rows[reason]
    runs: list[list[int]] = []
    for source, row in rows:
        if runs and runs[-1][0] == source and runs[-1][2] == row - 1:
            runs[-1][2] = row
        else:
            runs.append([source, row, row])
    shown = runs[: _ROWS_NAMED // 10]
    names = []
    for place, (source, first, last) in enumerate(shown):
        is_new = place == 0 or shown[place - 1][0] != source
        file = f"{Path(findings.sources[source]).name} " if is_new and len(findings.sources) > 1 else ""
        names.append(f"{file}{'rows ' if is_new else ''}{first}{f'-{last}' if last > first else ''}")
    more = findings.dropped[reason] - sum(last - first + 1 for _, first, last in shown)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _tokenizer_lines(findings: Findings, tokenizer: Tokenizer, decoder: Decoder) -> Iterator[tuple[str, str]]:
    yield "tokenizer", tokenizer.name
    specimen = _specimen(tokenizer)
    yield "template", "none: messages cannot be used" if specimen is None else _escaped(specimen)
    if tokenizer.bos_id is None:
        yield "BOS", "none"
    else:
        name = decoder.special.get(tokenizer.bos_id, str(tokenizer.bos_id))
        yield (
            "BOS",
            f"{name} begins {findings.bos_first} of {findings.pairs} prompts, {findings.bos_repeated} hold several",
        )
    name = decoder.special.get(tokenizer.eos_id, str(tokenizer.eos_id))
    yield (
        "EOS",
        f"{name} ends {findings.eos_last} of {2 * findings.pairs} responses, {findings.eos_inside} hold another",
    )


def _painted(
    ids: Sequence[int], decoder: Decoder, *, colour: str | None, keep_end: bool, scored: Mask | None = None
) -> str:
    """Returns tokens as text, scored ones coloured, special ones by name and inverse; plain without a colour."""
    runs = groupby(zip(ids, scored or (True,) * len(ids), strict=True), key=itemgetter(1))
    spans = [
        (_escaped(text), ((colour or "") if is_scored else "") + (_INVERSE if special else ""))
        for is_scored, run in runs
        for text, special in decoder.spans([token for token, _ in run])
    ]
    spans = _shortened(spans, keep_end=keep_end)
    return "".join(text if colour is None else f"{style}{text}{_PLAIN}" for text, style in spans)


def _shortened(spans: list[tuple[str, str]], *, keep_end: bool) -> list[tuple[str, str]]:
    """Returns the spans with a long middle left out: a prompt's end and a response's beginning matter most."""
    before = _SHOWN_CHARACTERS // 4 if keep_end else _SHOWN_CHARACTERS * 3 // 4
    characters = [(character, style) for text, style in spans for character in text]
    if len(characters) > _SHOWN_CHARACTERS:
        rest = len(characters) - (_SHOWN_CHARACTERS - before)
        characters = [*characters[:before], (" ... ", ""), *characters[rest:]]
    shortened: list[tuple[str, str]] = []
    for character, style in characters:
        if shortened and shortened[-1][1] == style:
            shortened[-1] = (shortened[-1][0] + character, style)
        else:
            shortened.append((character, style))
    return shortened


def _escaped(text: str) -> str:
    # A terminal must not obey what a data set says.
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
