"""Makes the demo's preference data: the model's own answers, labelled by the rule. Its output is in the repository.

A 135M model hardly ever answers briefly, so for some of the samples an instruction such as "Answer in one short
sentence." follows the question. It serves the sampling only: what is stored is the bare question, so that training
teaches the model to be brief without being told.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from answers import generate, load
from fetch_model import DEFAULT_FOLDER
from prompts import all_prompts, split_prompts
from rule import count_words, is_brief

# One sample a question and round.
ROUNDS = (
    "",
    " Answer in one short sentence.",
    " Answer in one short paragraph.",
    " Answer in one or two short sentences.",
    "",
    " Answer in one short sentence.",
)
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 1.0}
MAX_NEW_TOKENS = 128
BATCH_SIZE = 128
MAX_REJECTED_TOKENS = 120
MIN_CHOSEN_WORDS = 6
# Below this length a word of the question (is, used, what) says little about the answer.
CONTENT_LETTERS = 4
FORM_WORDS = {"what", "does", "used", "difference", "between", "word", "mean", "work", "where", "when", "should"}
# The model talking about itself instead of answering.
SELF_TALK = re.compile(r"\b(?:sorry|AI|SmolLM|assistant)\b")


@dataclass(frozen=True)
class Sample:
    """One sampled answer, with the instruction that followed the question and its length in tokens."""

    prompt: str
    instruction: str
    answer: str
    tokens: int
    has_ended: bool


def sample_answers(folder: Path, out: Path, *, seed: int) -> None:
    """Samples ``len(ROUNDS)`` answers to every question and writes them to ``out`` as JSON lines, round by round."""
    import torch

    model, tokenizer = load(folder)
    torch.manual_seed(seed)
    prompts = all_prompts()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for instruction in ROUNDS:
            questions = [prompt + instruction for prompt in prompts]
            replies = generate(
                model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE, **SAMPLING
            )
            for prompt, reply in zip(prompts, replies, strict=True):
                sample = Sample(prompt, instruction, reply.text, reply.tokens, reply.has_ended)
                file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
            file.flush()
            print(f"{len(prompts)} answers with the instruction {instruction!r}", flush=True)


def choose_pair(samples: Sequence[Sample]) -> tuple[str, str] | None:
    """Returns (chosen, rejected) from the samples of one question, or None when a side is missing.

    Only answers that the model ended by itself count. Chosen satisfies the rule and looks like an answer; rejected
    does not satisfy it, is longer and has at most 120 tokens. Of several candidates, the one of middle length.
    """
    # U+FFFD stands for bytes that are no text: such an answer is not what the model meant to say.
    ended = [sample for sample in samples if sample.has_ended and "\ufffd" not in sample.answer]
    ended.sort(key=lambda sample: (sample.tokens, sample.answer))
    good = [sample for sample in ended if is_brief(sample.answer) and _looks_like_an_answer(sample)]
    if not good:
        return None
    chosen = good[len(good) // 2]
    bad = [
        sample
        for sample in ended
        if not is_brief(sample.answer) and chosen.tokens < sample.tokens <= MAX_REJECTED_TOKENS
    ]
    return (chosen.answer, bad[len(bad) // 2].answer) if bad else None


def _looks_like_an_answer(sample: Sample) -> bool:
    answer = sample.answer
    words = [word.strip("?\",'").lower() for word in sample.prompt.split()]
    content = [word for word in words if len(word) >= CONTENT_LETTERS and word not in FORM_WORDS]
    # The first letters suffice, so that "whistle" is found in "whistling".
    is_on_topic = not content or any(word[:CONTENT_LETTERS] in answer.lower() for word in content)
    is_plain = answer[0].isupper() and "?" not in answer and not SELF_TALK.search(answer)
    return is_on_topic and is_plain and count_words(answer) >= MIN_CHOSEN_WORDS


def write_pairs(samples: Sequence[Sample], prompts: Sequence[str], out: Path) -> int:
    """Writes one pair for every question of ``prompts`` that has one, as conversations; returns how many."""
    lines = []
    for prompt in prompts:
        pair = choose_pair([sample for sample in samples if sample.prompt == prompt])
        if pair is not None:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": pair[0]}],
                "rejected": [{"role": "assistant", "content": pair[1]}],
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    out.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main() -> None:
    """Samples (unless the samples exist) and writes train.jsonl and heldout.jsonl beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER, help="folder written by fetch_model.py")
    parser.add_argument("--samples", type=Path, default=Path(".cache/demo-samples.jsonl"), help="kept; used if there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.samples.is_file():
        aside = args.samples.with_suffix(".part")
        sample_answers(args.model, aside, seed=args.seed)
        aside.rename(args.samples)
    samples = [Sample(**json.loads(line)) for line in args.samples.read_text(encoding="utf-8").splitlines()]
    for name, prompts in zip(("train.jsonl", "heldout.jsonl"), split_prompts(), strict=True):
        count = write_pairs(samples, prompts, args.out / name)
        print(f"{count} pairs from {len(prompts)} questions in {args.out / name}")


if __name__ == "__main__":
    main()
