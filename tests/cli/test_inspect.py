"""``inspect``: what it counts, shows and refuses."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from dpo_ds.cli.commands import main
from tests.cli.test_train import files as files
from tests.data.small_tokenizer import small_tokenizer

# The tokenizer knows bytes, and "\n\n", "ab" and " a" as one token each; EOS adds one to a response.
PAIRS = [
    {"prompt": "tea is", "chosen": " hot", "rejected": " salt."},
    {"prompt": "tea is", "chosen": " hot", "rejected": " salt."},
    {"prompt": "tea is", "chosen": " salt.", "rejected": " hot"},
    {"prompt": "ink\n", "chosen": "\nblue!!!", "rejected": " red"},
    {"prompt": "sky", "chosen": "", "rejected": "x"},
    {"prompt": "sky", "chosen": "x", "rejected": 3},
    {"prompt": "sky", "chosen": "x", "rejected": "y" * 70},
    {"prompt": "sky", "chosen": 3, "rejected": "x"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def inspected(capsys, *arguments, code=0):
    """What the command printed, on stdout and on stderr."""
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as left:
            main(["inspect", "--config", "run.yaml", *arguments])
        assert left.value.code == code
    else:
        main(["inspect", "--config", "run.yaml", *arguments])
    return capsys.readouterr()


def found(capsys, *arguments, code=0):
    return json.loads(inspected(capsys, "--json", *arguments, code=code).out)


def test_rows_lengths_and_doubles_are_counted(files, capsys):
    write(files / "pairs.jsonl", PAIRS)
    said = found(capsys, "--data.max_dropped", "0.5")
    assert (said["rows"], said["expanded"], said["pairs"]) == (8, 0, 4)
    assert said["dropped"] == {"empty response": 1, "not text": 2, "too long": 1}
    assert said["rows"] == said["pairs"] + sum(said["dropped"].values())
    source = str(files / "pairs.jsonl")
    assert said["dropped_rows"]["not text"] == [{"source": source, "row": 6}, {"source": source, "row": 8}]
    assert said["sources"] == [{"path": source, "rows": 8, "pairs": 4}]
    # Prompts of 6, 6, 6 and 4 tokens, chosen of 5, 5, 7 and 9, rejected of 7, 7, 5 and 5.
    assert said["lengths"]["prompt"] == {"median": 6, "p95": 6, "longest": 6}
    assert said["lengths"]["chosen"] == {"median": 6, "p95": pytest.approx(7 + 0.85 * 2), "longest": 9}
    assert said["lengths"]["rejected"] == {"median": 6, "p95": 7, "longest": 7}
    assert said["chosen_longer"] == 0.5
    assert said["duplicates"] == {"pairs": 1, "prompts": 2, "exchanged": 1}
    assert said["boundary_merges"] == 1
    assert said["bos"] == {"first": 0, "repeated": 0}
    assert said["eos"] == {"last": 8, "inside": 0}
    assert (said["eval"], said["overlap"]) == (None, None)
    assert not (files / "out").exists()


def test_pairs_are_shown_from_the_beginning_the_middle_and_the_end(files, capsys):
    write(files / "pairs.jsonl", [{"prompt": str(number), "chosen": "yes", "rejected": "no"} for number in range(9)])
    said = found(capsys)
    assert [sample["row"].split()[-1] for sample in said["samples"]] == ["1", "4", "7"]
    assert said["samples"][1] == {
        "row": f"{files / 'pairs.jsonl'} row 4",
        "prompt": "3",
        "chosen": "yes<eos>",
        "rejected": "no<eos>",
    }


def test_what_train_and_eval_have_in_common_is_counted(files, capsys):
    write(files / "pairs.jsonl", PAIRS[:4])
    write(files / "held_out.jsonl", [PAIRS[0], {**PAIRS[3], "chosen": "green"}, {**PAIRS[3], "prompt": "tar"}])
    said = found(capsys, "--data.eval", "held_out.jsonl")
    assert said["overlap"] == {"prompts": 2, "pairs": 1}
    assert (said["eval"]["rows"], said["eval"]["pairs"]) == (3, 3)
    assert "2 prompts and 1 pairs of eval are in train, too" in inspected(capsys, "--data.eval", "held_out.jsonl").out


def test_too_many_dropped_rows_are_told_and_then_refused(files, capsys):
    write(files / "pairs.jsonl", PAIRS)
    said = inspected(capsys, code=2)
    assert "8 rows, 4 pairs" in said.out
    assert "4 (50.0%; data.max_dropped allows 5.0%)" in said.out
    assert "2 not text: rows 6, 8" in said.out
    assert said.err.startswith("error: 4 of 8 rows of ")
    assert said.err.count("\n") == 1
    assert found(capsys, code=2)["pairs"] == 4
    inspected(capsys, "--data.max_dropped", "0.5")


def test_too_many_dropped_rows_of_eval_are_refused(files, capsys):
    write(files / "held_out.jsonl", PAIRS)
    assert "held_out.jsonl" in inspected(capsys, "--data.eval", "held_out.jsonl", code=2).err


def test_data_without_a_usable_row_is_told_and_refused(files, capsys):
    write(files / "pairs.jsonl", PAIRS[4:6])
    said = found(capsys, code=2)
    assert (said["rows"], said["pairs"], said["chosen_longer"], said["samples"]) == (2, 0, None, [])
    assert said["lengths"] == {"prompt": None, "chosen": None, "rejected": None}
    assert "2 rows, 0 pairs" in inspected(capsys, code=2).out


def test_neighbouring_rows_are_drawn_together_and_named_by_file_where_there_are_several(files, capsys):
    good, bad = PAIRS[0], {"prompt": "a", "chosen": "x", "rejected": "x"}
    write(files / "pairs.jsonl", [bad, good, bad, bad, bad])
    assert "4 identical responses: rows 1, 3-5\n" in inspected(capsys, code=2).out
    write(files / "other.jsonl", [good, bad])
    run = yaml.safe_load((files / "run.yaml").read_text())
    run["data"]["train"] = [{"path": "pairs.jsonl"}, {"path": "other.jsonl"}]
    (files / "run.yaml").write_text(yaml.safe_dump(run))
    said = inspected(capsys, code=2).out
    assert "5 identical responses: pairs.jsonl rows 1, 3-5, other.jsonl rows 2\n" in said
    assert "other.jsonl: 2 rows, 1 pairs" in said
    write(files / "other.jsonl", [good, *[bad, good] * 40])
    assert (
        "pairs.jsonl rows 1, 3-5, other.jsonl rows 2, 4, 6, 8, 10, 12, 14, 16 and 32 more"
        in inspected(capsys, code=2).out
    )


def test_ranked_rows_add_up_too(files, capsys):
    write(files / "pairs.jsonl", [{"prompt": "p", "answers": ["a", "b", "c", ""]}, {"prompt": "p", "answers": ["a"]}])
    said = found(capsys, "--data.max_dropped", "0.9")
    assert (said["rows"], said["expanded"], said["pairs"]) == (2, 5, 3)
    assert said["dropped"] == {"empty response": 3, "fewer than two answers": 1}
    assert "2 rows that name 7 pairs, 3 pairs" in inspected(capsys, "--data.max_dropped", "0.9").out


def test_numbers_that_change_the_loss_are_told(files, capsys):
    write(
        files / "pairs.jsonl", [{**PAIRS[n], "p": p, "w": w} for n, (p, w) in enumerate([(0.9, 1), (0.2, 2), (0.7, 6)])]
    )
    run = yaml.safe_load((files / "run.yaml").read_text())
    run["data"]["train"] = [{"path": "pairs.jsonl", "columns": {"probability": "p", "weight": "w"}}]
    (files / "run.yaml").write_text(yaml.safe_dump(run))
    labels = found(capsys)["labels"]
    assert labels["probability"] == {"pairs": 3, "least": 0.2, "mean": pytest.approx(0.6), "largest": 0.9}
    assert labels["weight"] == {"pairs": 3, "least": 1, "mean": 3, "largest": 6}
    assert "probability  0.2 to 0.9, 0.6 on average, of 3 pairs\n" in inspected(capsys).out


def test_scored_tokens_are_coloured_on_a_terminal_only(files, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in inspected(capsys).out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said = inspected(capsys).out
    assert "  prompt  tea is\x1b[0m" in said
    assert "  chosen  \x1b[32m hot\x1b[0m\x1b[32m\x1b[7m<eos>\x1b[0m\n" in said
    assert "rejected  \x1b[31m salt.\x1b[0m\x1b[31m\x1b[7m<eos>\x1b[0m\n" in said
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in inspected(capsys).out


def test_what_others_say_between_scored_turns_is_not_coloured(files, capsys, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
    template += "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    small_tokenizer(files / "tokens", template=template)
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    write(files / "pairs.jsonl", [{"chosen": turns, "rejected": [turns[0], turns[3]]}])
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said = inspected(capsys, "--model.tokenizer", "tokens", "--data.scored", "all_assistant_turns").out
    end = "\x1b[32m\x1b[7m<eos>\x1b[0m"
    assert f"  chosen  \x1b[32mb\x1b[0m{end}<user>c<assistant>\x1b[0m\x1b[32md\x1b[0m{end}\n" in said


def test_what_a_terminal_would_obey_is_shown_and_not_sent(files, capsys):
    write(files / "pairs.jsonl", [{"prompt": "a\x1b[2J\n", "chosen": "\x07", "rejected": "\u202e"}] * 4)
    said = inspected(capsys).out
    assert "a\\x1b[2J\\n" in said
    assert "\\x07<eos>" in said
    assert "\\u202e<eos>" in said


def test_a_long_prompt_keeps_its_end_and_a_long_response_its_beginning(files, capsys):
    prompt, response = "".join(map(chr, range(0x4E00, 0x4E00 + 400))), "".join(map(chr, range(0x5E00, 0x5E00 + 400)))
    write(files / "pairs.jsonl", [{"prompt": prompt, "chosen": response, "rejected": "x"}] * 4)
    said = inspected(capsys, "--data.max_length", "3000").out
    assert f"{prompt[:60]} ... {prompt[-180:]}" in said
    assert f"{response[:180]} ... {response[-55:]}<eos>" in said


TEMPLATE = (
    "<bos>{% for m in messages %}{% if loop.first and m.role != 'system' %}<system>Be kind.{% endif %}"
    "<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_template_bos_and_eos_are_shown(files, capsys):
    small_tokenizer(files / "tokens", template=TEMPLATE, bos="<bos>", eos="<|end|>", adds="<bos> $A")
    messages = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "So.", "rejected": "No."}
    plain = {"prompt": "Why?", "chosen": "a<|end|>b", "rejected": "<bos>"}
    write(files / "pairs.jsonl", [messages, messages, plain])
    arguments = ("--model.tokenizer", "tokens")
    said = found(capsys, *arguments)
    specimen = "<bos><system>Be kind.<user>...<|end|><assistant>"
    assert said["tokenizer"] == {
        "name": str(files / "tokens"),
        "bos": "<bos>",
        "eos": "<|end|>",
        "chat_template": True,
        "specimen": specimen,
    }
    assert (said["bos"], said["eos"]) == ({"first": 3, "repeated": 1}, {"last": 6, "inside": 1})
    assert said["doubts"] == [
        "1 pairs hold several BOS: take it out of the texts or of the chat template",
        "1 responses go on behind an EOS, where generation ends: take it out of them",
    ]
    assert said["samples"][0]["prompt"] == specimen.replace("...", "Why?")
    assert said["samples"][0]["chosen"] == "So.<|end|>"
    text = inspected(capsys, *arguments).out
    assert f"  template  {specimen}\n" in text
    assert "       BOS  <bos> begins 3 of 3 prompts, 1 hold several\n" in text
    assert "       EOS  <|end|> ends 6 of 6 responses, 1 hold another\n" in text


CHATML = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("settings", "arguments", "doubts"),
    [
        ({"template": CHATML, "eos": "<|end|>", "bos": "<bos>"}, [], []),
        (
            {"template": CHATML.replace("<bos>", ""), "eos": "<eos>", "bos": "<bos>", "adds": "<bos> $A"},
            [],
            [
                "2 prompts do not begin with BOS, which the tokenizer puts before plain text: the chat template should",
                "4 responses end with <|end|> and then EOS <eos>: if the chat template ends turns with the first, it",
            ],
        ),
        (
            {"template": CHATML, "eos": "<|end|>", "bos": "<bos>"},
            ["--data.max_length", "27", "--data.truncation", "response_end"],
            ["3 responses do not end with EOS: data.truncation cut them"],
        ),
    ],
    ids=["right", "forgotten BOS, other EOS", "cut"],
)
def test_what_is_probably_wrong_with_template_bos_and_eos_is_told(files, capsys, settings, arguments, doubts):
    small_tokenizer(files / "tokens", **settings)
    row = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "So.", "rejected": "Not so."}
    write(files / "pairs.jsonl", [row, {**row, "chosen": "Yes."}])
    arguments = ["--model.tokenizer", "tokens", *arguments]
    said = found(capsys, *arguments)
    assert [told.startswith(doubt) for told, doubt in zip(said["doubts"], doubts, strict=True)] == [True] * len(doubts)
    text = inspected(capsys, *arguments).out
    assert text.count("      doubt  ") == len(doubts)
    assert ("template, BOS and EOS are as they should be" in text) == (not doubts)


def test_real_votes_are_inspected_with_a_sentencepiece_tokenizer(material: Path, files, capsys):
    run = yaml.safe_load((files / "run.yaml").read_text())
    columns = {"prompt": ["instruction", "input"], "output_1": "response1", "output_2": "response2"}
    columns["label"] = ["annotator1", "annotator2", "annotator3"]
    run["data"] = {"train": [{"path": str(material / "prefs" / "pandalm_testset_v1.json"), "columns": columns}]}
    run["model"]["tokenizer"] = str(material / "tokenizers" / "mistral-v1-32000")
    (files / "run.yaml").write_text(yaml.safe_dump(run))
    said = found(capsys, code=2)
    assert (said["rows"], said["pairs"]) == (999, 836)
    assert said["dropped"] == {"tie": 105, "empty response": 52, "not text": 6}
    assert said["bos"] == {"first": 836, "repeated": 0}
    assert said["eos"] == {"last": 2 * 836, "inside": 0}
    assert said["samples"][0]["prompt"].startswith("<s>The sentence you are given might be too wordy")
    assert said["samples"][0]["chosen"] == "If you have any questions, please let me know.</s>"


def test_json_belongs_to_inspect_alone(files, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--config", "run.yaml", "--json"])
    assert capsys.readouterr().err.startswith("error: unknown option --json")
