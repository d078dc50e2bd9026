import io
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock

from dpo_ds.data.preferences import Source
from dpo_ds.data.prepare import prepare
from dpo_ds.data.prepared import open_prepared
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.errors import UserError
from dpo_ds.models.tokenizer import load_tokenizer
from tests.data.small_tokenizer import small_tokenizer

# With an EOS of one token and no merges, tokens are characters: 2 + 3 and 2 + 4 for the first row.
ROWS = [
    {"prompt": "pq", "chosen": "xy", "rejected": "xyz"},
    {"prompt": "pq", "chosen": "xy", "rejected": "xy"},
    {"prompt": "pqr", "chosen": "x", "rejected": "y"},
    {"prompt": "pq", "chosen": "", "rejected": "xy"},
    {"prompt": "pqrstuvw", "chosen": "x", "rejected": "y"},
    {"prompt": "pq", "chosen": "xy", "rejected": 1},
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def run(sources, tokenizer, folder, *, max_length=9, truncation=None, max_dropped=1.0, **more):
    return prepare(
        sources, tokenizer, max_length=max_length, truncation=truncation, max_dropped=max_dropped, folder=folder, **more
    )


@pytest.fixture
def tokenizer(tmp_path):
    return small_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_every_row_becomes_a_pair_or_is_counted_by_its_reason(tokenizer, source, tmp_path):
    prepared = run([source], tokenizer, tmp_path / "data")
    assert prepared.manifest.rows_read == len(ROWS) == len(prepared) + sum(prepared.dropped.values())
    assert prepared.dropped == {"identical responses": 1, "empty response": 1, "too long": 1, "not text": 1}
    assert prepared.manifest.first_dropped["too long"] == f"{source.path} row 5"
    assert prepared.table["row"].to_pylist() == [1, 3]
    encode, end = tokenizer.encode, [tokenizer.eos_id]
    assert [prepared.pair(0), prepared.pair(1)] == [
        TokenizedPair.of(encode("pq"), encode("xy") + end, encode("xyz") + end),
        TokenizedPair.of(encode("pqr"), encode("x") + end, encode("y") + end),
    ]


def test_lengths_are_tokens_with_eos(tokenizer, source, tmp_path):
    prepared = run([source], tokenizer, tmp_path / "data")
    assert [part.tolist() for part in prepared.lengths] == [[2, 3], [3, 2], [4, 2]]
    assert prepared.lengths.longer.tolist() == [6, 5]
    assert prepared.lengths.longer.dtype == np.int64


def test_several_sources_follow_each_other_and_are_told_apart(tokenizer, tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.jsonl", ROWS[2:3])
    prepared = run([first, second], tokenizer, tmp_path / "data")
    assert prepared.table["source"].to_pylist() == [0, 1]
    assert prepared.manifest.sources == [first.path, second.path]
    assert (prepared.part.tolist(), prepared.pairs_of_parts) == ([0, 1], [1, 1])


def test_files_that_one_source_names_are_one_part(tokenizer, tmp_path):
    for name in "ab":
        write(tmp_path / "rows" / f"{name}.jsonl", ROWS[:3])
    folder, useless = Source(str(tmp_path / "rows")), write(tmp_path / "useless.jsonl", ROWS[1:2])
    single = write(tmp_path / "single.jsonl", ROWS[:1])
    prepared = run([single, folder, useless], tokenizer, tmp_path / "data")
    assert prepared.part.tolist() == [0, 1, 1, 1, 1]
    assert prepared.pairs_of_parts == [1, 4, 0]
    assert prepared.where(3) == f"{tmp_path}/rows/b.jsonl row 1"
    # The same rows, divided in another way.
    apart = [Source(str(tmp_path / "rows" / f"{name}.jsonl")) for name in "ab"]
    assert run([single, *apart, useless], tokenizer, tmp_path / "data").pairs_of_parts == [1, 2, 2, 0]


def test_what_was_prepared_is_opened_again_and_not_written_again(tokenizer, source, tmp_path):
    prepared = run([source], tokenizer, tmp_path / "data")
    before = (prepared.path / "pairs-00000.arrow").stat().st_mtime_ns
    again = run([source], tokenizer, tmp_path / "data")
    assert (again.path, again.manifest.key) == (prepared.path, prepared.path.name)
    assert (again.path / "pairs-00000.arrow").stat().st_mtime_ns == before
    assert files(tmp_path / "data") == {
        again.manifest.key,
        f"{again.manifest.key}/pairs-00000.arrow",
        f"{again.manifest.key}/manifest.json",
    }
    assert open_prepared(prepared.path).pair(1) == prepared.pair(1)


def test_the_key_follows_content_columns_tokenizer_and_settings_but_not_the_place(tokenizer, source, tmp_path):
    folder = tmp_path / "data"
    copy = write(tmp_path / "elsewhere" / "copy.jsonl", ROWS)
    assert run([source], tokenizer, folder).manifest.key == run([copy], tokenizer, folder).manifest.key
    swapped = Source(source.path, columns={"chosen": "rejected", "rejected": "chosen"})
    other = small_tokenizer(tmp_path / "other", bos="<bos>")
    tools = write(tmp_path / "tools.jsonl", [{**row, "tools": ""} for row in ROWS])
    changed = write(tmp_path / "changed.jsonl", [*ROWS[:-1], {"prompt": "pq", "chosen": "xy", "rejected": 2}])
    keys = [
        run([source], tokenizer, folder).manifest.key,
        run([changed], tokenizer, folder).manifest.key,
        run([swapped], tokenizer, folder).manifest.key,
        run([Source(tools.path)], tokenizer, folder).manifest.key,
        run([Source(tools.path, columns={"tools": "tools"})], tokenizer, folder).manifest.key,
        run([source], other, folder).manifest.key,
        run([source], tokenizer, folder, max_length=10).manifest.key,
        run([source], tokenizer, folder, truncation="prompt_start").manifest.key,
        run([source, source], tokenizer, folder).manifest.key,
    ]
    assert len(set(keys)) == len(keys)


def test_what_is_scored_of_several_turns_is_kept_with_the_pair_and_is_part_of_the_key(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    tokenizer = small_tokenizer(tmp_path / "tokenizer", template=template)
    user, *answers = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "x"), ("assistant", "y")))
    rows = [
        {"chosen": [user, answers[0], user, answers[1]], "rejected": [user, answers[1]]},
        {"chosen": [user, answers[0]], "rejected": [user, answers[1]]},
    ]
    source, folder = write(tmp_path / "rows.jsonl", rows), tmp_path / "data"
    whole = run([source], tokenizer, folder, max_length=20, scored="all_assistant_turns")
    ids = tokenizer.encode
    assert [whole.pair(0), whole.pair(1)] == [
        TokenizedPair.of(ids("uqa"), ids("xuqay<eos>"), ids("y<eos>"), (True, *[False] * 3, True, True), None),
        TokenizedPair.of(ids("uqa"), ids("x<eos>"), ids("y<eos>")),
    ]
    last = run([source], tokenizer, folder, max_length=20)
    assert (last.dropped, last.pair(0)) == ({"prompts differ": 1}, whole.pair(1))
    assert last.manifest.key != whole.manifest.key


def test_what_changes_a_pairs_loss_is_kept_beside_its_tokens_and_not_in_its_name(tokenizer, tmp_path):
    rows = [
        {**ROWS[0], "p": 0.9, "m": 0.5, "w": 2},
        {**ROWS[2], "p": 0.1, "m": -1, "w": 0},
        {**ROWS[2], "p": 0.5, "m": 0},
    ]
    source, folder = write(tmp_path / "rows.jsonl", rows), tmp_path / "data"
    plain = run([source], tokenizer, folder)
    named = run([Source(source.path, columns={"probability": "p", "margin": "m"})], tokenizer, folder)
    weighted = run([Source(source.path, columns={"weight": "w"})], tokenizer, folder)
    assert [plain.pair(index) for index in range(2)] == [
        replace(named.pair(index), probability=None, margin=None) for index in range(2)
    ]
    assert [(pair.probability, pair.margin, pair.weight) for pair in map(named.pair, range(2))] == [
        (0.9, 0.5, None),
        (0.1, -1.0, None),
    ]
    assert (named.dropped, weighted.dropped) == ({"tie": 1}, {"weight not above 0": 2})
    assert weighted.pair(0) == replace(plain.pair(0), weight=2.0)
    mixed = run(
        [write(tmp_path / "other.jsonl", ROWS[:1]), Source(source.path, columns={"weight": "w"})], tokenizer, folder
    )
    assert [mixed.pair(0).weight, mixed.pair(1).weight] == [None, 2.0]
    assert len({found.manifest.key for found in (plain, named, weighted)}) == 3


def test_a_file_that_changed_is_read_again(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert len(run([write(path, ROWS[:1])], tokenizer, tmp_path / "data")) == 1
    assert len(run([write(path, ROWS[:3])], tokenizer, tmp_path / "data")) == 2


def test_too_many_dropped_rows_are_refused_with_counts_and_remedy(tokenizer, source, tmp_path):
    message = (
        r"4 of 6 rows of .*rows.jsonl cannot be used: .*too long 1 \(first: .*row 5\).*data.max_dropped allows a share "
        r"of 0.5.*raise data.max_length \(9\), set data.truncation, or raise data.max_dropped"
    )
    with pytest.raises(UserError, match=message):
        run([source], tokenizer, tmp_path / "runs" / "data", max_dropped=0.5)
    assert not (tmp_path / "runs").exists()


def test_the_bound_on_dropped_rows_is_inclusive_and_holds_for_prepared_data_too(tokenizer, source, tmp_path):
    run([source], tokenizer, tmp_path / "data", max_dropped=4 / 6)
    with pytest.raises(UserError, match="4 of 6 rows"):
        run([source], tokenizer, tmp_path / "data", max_dropped=0.6)
    assert len(run([source], tokenizer, tmp_path / "data")) == 2


def test_data_without_any_usable_row_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"1 of 1 rows .* cannot be used: identical responses 1"):
        run([write(tmp_path / "rows.jsonl", ROWS[1:2])], tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {"prompt": "pq", "bad": "x"}], "1 of 2 rows .*not text 1.*text is a string, or a list"),
        ([{"prompt": "pq", "chosen": "x"}], "row 1 has no column 'rejected'"),
    ],
)
def test_a_failure_leaves_nothing_behind_but_what_was_there(tokenizer, tmp_path, rows, message):
    path = write(tmp_path / "rows.jsonl", rows).path
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    with pytest.raises(UserError, match=message):
        run([Source(path)], tokenizer, tmp_path / "data", max_dropped=0.0)
    assert files(tmp_path / "data") == {"mine"}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pairs_of_many_rows_lie_in_several_files_in_order(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS * 250)
    prepared = run([source], tokenizer, tmp_path / "data", rows_per_shard=1000)
    whole = run([source], tokenizer, tmp_path / "whole")
    assert [*prepared.manifest.shards] == ["pairs-00000.arrow", "pairs-00001.arrow"]
    assert prepared.table.to_pylist() == whole.table.to_pylist()
    assert [prepared.pair(index) for index in (0, 499)] == [whole.pair(index) for index in (0, 499)]
    assert (prepared.dropped, prepared.manifest.first_dropped) == (whole.dropped, whole.manifest.first_dropped)


def _prepare_slowly(tokenizer: str, path: str, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have had it ignored
    open_file = pa.ipc.new_file
    pa.ipc.new_file = lambda *arguments, **options: time.sleep(0.2) or open_file(*arguments, **options)  # a slow disk
    run([Source(path)], load_tokenizer(tokenizer), Path(folder), rows_per_shard=2000)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)])
def test_a_process_that_is_killed_in_the_middle_is_gone_on_from(tokenizer, tmp_path, number, code):
    source, folder = write(tmp_path / "many.jsonl", ROWS * 5000), tmp_path / "data"
    arguments = (tokenizer.name, source.path, str(folder))
    process = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=arguments)
    process.start()
    while len(list(folder.glob(".*/pairs-*.arrow.json"))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    (aside,) = folder.glob(".*[!k]")
    assert not (folder / aside.name[1:]).exists()
    whole = {path.name: path.stat().st_ino for path in aside.glob("pairs-*.arrow") if Path(f"{path}.json").exists()}
    last = sorted(whole)[-1]
    (aside / ".half").write_bytes(b"half")
    (aside / last).write_bytes((aside / last).read_bytes()[:-100])
    prepared = run([source], tokenizer, folder, rows_per_shard=2000)
    # Neither written again, but for the damaged one.
    kept = {name for name, inode in whole.items() if (prepared.path / name).stat().st_ino == inode}
    assert kept == whole.keys() - {last}
    run([source], tokenizer, tmp_path / "undisturbed", rows_per_shard=2000)
    assert contents(folder) == contents(tmp_path / "undisturbed")
    assert (len(prepared), prepared.manifest.rows_read) == (10_000, 30_000)


def test_a_process_that_is_killed_before_its_last_act_costs_nothing(tokenizer, source, tmp_path):
    folder = tmp_path / "data"
    path = run([source], tokenizer, folder).path
    path.rename(folder / f".{path.name}")
    (folder / f".{path.name}" / "pairs-00000.arrow.json").touch()
    (folder / f".{path.name}.lock").touch()
    assert len(run([source], tokenizer, folder)) == 2
    assert files(folder) == {path.name, f"{path.name}/pairs-00000.arrow", f"{path.name}/manifest.json"}


def test_what_other_settings_left_aside_is_removed_after_a_week(tokenizer, source, tmp_path):
    folder = tmp_path / "data"
    recent, old = folder / f".{'0' * 32}", folder / f".{'1' * 32}"
    for aside in (recent, old):
        aside.mkdir(parents=True)
        (aside / "pairs-00000.arrow").touch()
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    run([source], tokenizer, folder)
    assert (recent.exists(), old.exists()) == (True, False)


def _prepare_on_a_full_disk(tokenizer: str, path: str, folder: str, results) -> None:
    loaded = load_tokenizer(tokenizer)
    # A file that may not grow fails as on a full disk: the write says so, in its middle.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        run([Source(path)], loaded, Path(folder))
    except UserError as error:
        results.put(str(error))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS[:1] * 2000)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    arguments = (tokenizer.name, source.path, str(tmp_path / "runs" / "data"), results)
    process = spawn.Process(target=_prepare_on_a_full_disk, args=arguments)
    process.start()
    said = results.get(timeout=60)
    process.join()
    assert said.startswith(f"the prepared pairs cannot be written to {tmp_path / 'runs' / 'data'}: ")
    assert said.endswith("free some space there, or name another output_dir")
    assert "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_cut_in_the_middle_of_a_row_leaves_nothing_behind(tokenizer, source, tmp_path):
    cut = tmp_path / "cut.jsonl"
    cut.write_text(Path(source.path).read_text()[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl is not valid JSON: line 6, column \d+"):
        run([Source(str(cut))], tokenizer, tmp_path / "runs" / "data")
    assert not (tmp_path / "runs").exists()


def test_every_bad_row_is_counted_and_none_is_lost(tokenizer, tmp_path):
    good = {"prompt": "pq", "chosen": "x", "rejected": "y"}
    expected = {
        "not text": [{**good, "chosen": value} for value in (None, True, 3, 2.5, {}, [], ["x"], "x\udc00")],
        "too long": [{**good, "prompt": "p" * 1_000_000}],
        "empty response": [{**good, "rejected": " \n"}, {**good, "chosen": "<eos>"}],
        "identical responses": [{**good, "chosen": "y"}, {**good, "chosen": "y<eos>"}],
        "empty prompt": [{**good, "prompt": ""}],
    }
    bad = [row for rows in expected.values() for row in rows]
    prepared = run([write(tmp_path / "rows.jsonl", [good, *bad, good])], tokenizer, tmp_path / "data")
    assert prepared.dropped == {reason: len(rows) for reason, rows in expected.items()}
    assert (len(prepared), prepared.manifest.rows_read) == (2, 2 + len(bad))
    assert prepared.table["row"].to_pylist() == [1, len(bad) + 2]


def test_files_of_one_folder_may_have_other_shapes(tokenizer, tmp_path):
    write(tmp_path / "rows" / "a.jsonl", [ROWS[0]])
    write(tmp_path / "rows" / "b.jsonl", [{"prompt": "pq", "answers": ["x", "y"], "note": 3}])
    write(
        tmp_path / "rows" / "c.jsonl", [{"prompt": "r", "output_1": "x", "output_2": "z", "label": n} for n in (2, 0)]
    )
    prepared = run([Source(str(tmp_path / "rows"))], tokenizer, tmp_path / "data")
    assert [prepared.where(index) for index in range(len(prepared))] == [
        f"{tmp_path}/rows/{name}.jsonl row 1" for name in "abc"
    ]
    assert (prepared.manifest.rows_read, prepared.dropped) == (4, {"tie": 1})


def test_ranked_answers_add_up_and_keep_the_number_of_their_row(tokenizer, tmp_path):
    rows = [ROWS[0], {"prompt": "pq", "answers": ["x", "y", "z", "z"]}, {"prompt": "pq", "answers": ["x"]}]
    write(tmp_path / "rows" / "a.jsonl", rows[:1])
    write(tmp_path / "rows" / "b.jsonl", rows[1:])
    prepared = run([Source(str(tmp_path / "rows" / "*.jsonl"))], tokenizer, tmp_path / "data")
    manifest = prepared.manifest
    assert (manifest.rows_read, manifest.expanded, manifest.pairs) == (3, 5, 6)
    assert manifest.dropped == {"identical responses": 1, "fewer than two answers": 1}
    assert manifest.rows_read + manifest.expanded == manifest.pairs + sum(manifest.dropped.values())
    assert prepared.table["row"].to_pylist() == [1, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match=r"2 of 8 pairs of .*a.jsonl, .*b.jsonl cannot be used"):
        run([Source(str(tmp_path / "rows" / "*.jsonl"))], tokenizer, tmp_path / "data", max_dropped=0.2)


def _prepare_there(tokenizer: str, path: str, folder: str, barrier, results) -> None:
    loaded = load_tokenizer(tokenizer)
    barrier.wait()
    results.put(run([Source(path)], loaded, Path(folder)).manifest.key)


def test_processes_that_prepare_at_once_share_one_result(tokenizer, source, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    arguments = (tokenizer.name, source.path, str(tmp_path / "data"), barrier, results)
    processes = [spawn.Process(target=_prepare_there, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    keys = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert keys[0] == keys[1]
    assert files(tmp_path / "data") == {keys[0], f"{keys[0]}/pairs-00000.arrow", f"{keys[0]}/manifest.json"}


def test_a_process_that_waits_for_another_says_so(tokenizer, source, tmp_path, capfd):
    folder = tmp_path / "data"
    key = run([source], tokenizer, folder).manifest.key
    is_held = threading.Event()

    def hold() -> None:
        with FileLock(folder / f".{key}.lock"):
            is_held.set()
            time.sleep(1.3)

    other = threading.Thread(target=hold)
    other.start()
    is_held.wait()
    capfd.readouterr()
    assert len(run([source], tokenizer, folder)) == 2
    assert capfd.readouterr().err == f"another process prepares this data in {folder}; waiting for its end\n"
    other.join()


def test_the_files_are_the_same_bytes_whatever_the_number_of_processes(tokenizer, tmp_path):
    write(tmp_path / "rows" / "a.jsonl", ROWS * 200)
    write(tmp_path / "rows" / "b.jsonl", [{"prompt": "pq", "answers": ["x", "y", "z"]}] * 7)
    source = Source(str(tmp_path / "rows"))
    alone = run([source], tokenizer, tmp_path / "alone", processes=1)
    shared = run([source], tokenizer, tmp_path / "shared", processes=2)
    assert (len(alone), alone.manifest.expanded) == (400 + 21, 14)
    assert shared.manifest == alone.manifest
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    for name in files(alone.path):
        assert (shared.path / name).read_bytes() == (alone.path / name).read_bytes()


def test_a_broken_row_ends_all_processes_with_its_line(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + "{\n" * 1500)
    with pytest.raises(UserError, match=r"rows.jsonl is not valid JSON: line 2, column"):
        run([Source(str(path))], tokenizer, tmp_path / "runs" / "data", processes=2)
    assert not (tmp_path / "runs").exists()
    lacking = write(tmp_path / "lacking.jsonl", [*ROWS[:1] * 1200, {"prompt": "pq"}])
    with pytest.raises(UserError, match=r"lacking.jsonl") as raised:
        run([lacking], tokenizer, tmp_path / "runs" / "data", processes=2, max_dropped=0.0)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_at_once_on_a_terminal_and_late_elsewhere(tokenizer, tmp_path, monkeypatch):
    source = write(tmp_path / "rows.jsonl", ROWS[:1] * 8000)
    for stderr in (io.StringIO(), Terminal()):
        with monkeypatch.context() as patched:
            patched.setattr("sys.stderr", stderr)
            run([source], tokenizer, tmp_path / type(stderr).__name__)
        assert ("tokenizing: 100%" in stderr.getvalue()) == stderr.isatty()


def test_a_damaged_folder_is_refused(tokenizer, source, tmp_path):
    path = run([source], tokenizer, tmp_path / "data").path
    (path / "pairs-00000.arrow").write_bytes((path / "pairs-00000.arrow").read_bytes()[:200])
    with pytest.raises(UserError, match="no complete folder of prepared pairs; delete it"):
        open_prepared(path)
    with pytest.raises(UserError, match="no complete folder of prepared pairs"):
        open_prepared(tmp_path / "nowhere")


def test_prepared_pairs_of_another_format_are_refused(tokenizer, source, tmp_path):
    path = run([source], tokenizer, tmp_path / "data").path
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(UserError, match="of another version; delete the folder"):
        open_prepared(path)


def test_real_rows_that_fit_are_counted_as_sentencepiece_itself_counts(material, tmp_path):
    import sentencepiece

    path = material / "prefs" / "pandalm_dpo.jsonl"
    model = material / "models" / "stories260K-hf"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model")).encode
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    longest = [len(pieces(r["prompt"])) + max(len(pieces(r["chosen"])), len(pieces(r["rejected"]))) for r in rows]
    # Of 836 rows 700 fit as bare text, 695 with BOS and EOS.
    fitting = [length + 2 for length in longest if length + 2 <= 512]
    assert (sum(length <= 512 for length in longest), len(fitting)) == (700, 695)
    prepared = run([Source(str(path))], load_tokenizer(str(model)), tmp_path / "data", max_length=512, max_dropped=0.2)
    assert prepared.lengths.longer.tolist() == fitting
    assert prepared.dropped == {"too long": 141}


def test_real_conversations_are_prepared(material, tmp_path):
    tokenizer = load_tokenizer(str(material / "tokenizers" / "minimind-6400"))
    prepared = run(
        [
            Source(str(material / "prefs" / "llmbar_natural_conversational.jsonl")),
            Source(
                str(material / "prefs" / "llamafactory_v1_dpo_demo.jsonl"),
                columns={"chosen": "chosen_messages", "rejected": "rejected_messages"},
            ),
        ],
        tokenizer,
        tmp_path / "data",
        max_length=2048,
    )
    assert (len(prepared), prepared.dropped) == (110, {})
