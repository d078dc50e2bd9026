"""What a model says to the demo's held-out questions, greedily, and how often that satisfies the preference rule.

Generation in batches lives here, for sampling too; which questions are asked and what is preferred do not.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rule import is_brief

if TYPE_CHECKING:  # argv is read before torch is imported
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = Path(__file__).with_name("heldout.jsonl")
MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Generated:
    """A model's reply: its text (stripped), its length in tokens, and whether the model ended it by itself."""

    text: str
    tokens: int
    has_ended: bool


@dataclass(frozen=True)
class Answer:
    """A question, the model's greedy answer and whether that is finished and satisfies the rule."""

    prompt: str
    answer: str
    is_brief: bool


def load(folder: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Returns the model in ``folder`` (in bf16, ready to generate) and its tokenizer (padding on the left)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    **sampling: Any,
) -> list[Generated]:
    """Returns the model's reply to each question, each asked alone in a new conversation.

    Args:
        model: a causal LM whose generation config knows the EOS token.
        tokenizer: its tokenizer, with a chat template, padding on the left.
        questions: the user turns.
        max_new_tokens: a reply that is not finished by then is cut off there.
        batch_size: questions a batch.
        **sampling: passed to ``model.generate``; greedy when empty.
    """
    import torch

    replies = []
    for start in range(0, len(questions), batch_size):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions[start : start + batch_size]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, **(sampling or {"do_sample": False}))
        for row in ids[:, batch["input_ids"].shape[1] :].tolist():
            # The pad token is the EOS token, so the first of them is the end and the rest padding.
            has_ended = tokenizer.eos_token_id in row
            tokens = row.index(tokenizer.eos_token_id) if has_ended else len(row)
            text = tokenizer.decode(row[:tokens], skip_special_tokens=True).strip()
            replies.append(Generated(text=text, tokens=tokens, has_ended=has_ended))
    return replies


def read_questions(path: Path, *, limit: int | None = None) -> list[str]:
    """Returns the distinct user turns of a file of pairs, in file order, at most ``limit`` of them.

    A limit takes them at equal distances, so that every form of question stays represented.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    questions = list(dict.fromkeys(row["prompt"][-1]["content"] for row in rows))
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def answer_questions(folder: Path, questions: Sequence[str], *, batch_size: int = 64) -> list[Answer]:
    """Returns the greedy answers of the model in ``folder``; one that was cut off does not count as brief."""
    model, tokenizer = load(folder)
    replies = generate(model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size)
    return [
        Answer(prompt=question, answer=reply.text, is_brief=reply.has_ended and is_brief(reply.text))
        for question, reply in zip(questions, replies, strict=True)
    ]


def brief_share(answers: Sequence[Answer]) -> float:
    """Returns the share of ``answers`` that satisfy the rule, from 0 to 1."""
    return sum(answer.is_brief for answer in answers) / len(answers)


def main() -> None:
    """Answers the held-out questions with one model and prints the share of brief answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--prompts", type=Path, default=HELD_OUT, help="pairs whose questions are asked")
    parser.add_argument("--limit", type=int, default=60, help="how many of them")
    parser.add_argument("--out", type=Path, help="JSON lines to write: prompt, answer, is_brief")
    args = parser.parse_args()
    started = time.monotonic()
    answers = answer_questions(args.model, read_questions(args.prompts, limit=args.limit))
    if args.out is not None:
        lines = [json.dumps(asdict(answer), ensure_ascii=False) for answer in answers]
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    seconds = time.monotonic() - started
    print(f"{brief_share(answers):.0%} of {len(answers)} answers are brief ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
