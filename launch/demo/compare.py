"""The demo's last words: the model before and after training, in one table, with answers of its own.

It reads what training wrote (``metrics.jsonl``, ``export/``) and asks both models the held-out questions.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap

from answers import HELD_OUT, Answer, answer_questions, brief_share, read_questions
from rule import count_words

SHOWN_ANSWERS = 3


@dataclass(frozen=True)
class Side:
    """One model's figures on the held-out pairs and questions; shares and accuracy from 0 to 1, the margin in nats."""

    loss: float
    accuracy: float
    margin: float
    brief_share: float
    words_per_answer: float


def read_evaluations(path: Path) -> list[dict[str, float]]:
    """Returns the evaluation lines of a ``metrics.jsonl`` in the order of their steps."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((line for line in lines if line["split"] == "eval"), key=lambda line: line["step"])


def measure(evaluation: dict[str, float], answers: Sequence[Answer]) -> Side:
    """Returns one side of the comparison from an evaluation line and the same model's answers."""
    return Side(
        loss=evaluation["loss"],
        accuracy=evaluation["rewards/accuracies"],
        margin=evaluation["rewards/margins"],
        brief_share=brief_share(answers),
        words_per_answer=sum(count_words(answer.answer) for answer in answers) / len(answers),
    )


def format_table(before: Side, after: Side) -> str:
    """Returns the two sides as a table of plain text."""
    rows = [
        ("held-out loss", f"{before.loss:.4f}", f"{after.loss:.4f}"),
        ("held-out reward accuracy", f"{before.accuracy:.0%}", f"{after.accuracy:.0%}"),
        ("held-out reward margin", f"{before.margin:.3f}", f"{after.margin:.3f}"),
        ("brief answers", f"{before.brief_share:.0%}", f"{after.brief_share:.0%}"),
        ("words an answer", f"{before.words_per_answer:.1f}", f"{after.words_per_answer:.1f}"),
    ]
    return "\n".join(f"{name:<28}{left:>10}{right:>10}" for name, left, right in [("", "before", "after"), *rows])


def format_answers(before: Sequence[Answer], after: Sequence[Answer], *, width: int) -> str:
    """Returns a few questions, evenly spread, with the answers before and after, cropped to a few lines each."""
    count = min(SHOWN_ANSWERS, len(before))
    lines = []
    for index in (position * len(before) // count for position in range(count)):
        lines += ["", before[index].prompt]
        for when, answer in (("before", before[index]), ("after", after[index])):
            verdict = "brief" if answer.is_brief else "not brief"
            text = f"{when} ({verdict}): {answer.answer}"
            lines += wrap(text, width, initial_indent="  ", subsequent_indent="    ", max_lines=3, placeholder=" …")
    return "\n".join(lines)


def main() -> None:
    """Compares a model folder with a run's exported model, prints the table and writes ``comparison.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="the model that training started from")
    parser.add_argument("run", type=Path, help="the run's output folder")
    parser.add_argument("--prompts", type=Path, default=HELD_OUT, help="pairs whose questions are asked")
    parser.add_argument("--limit", type=int, default=60, help="how many of them")
    args = parser.parse_args()
    metrics = args.run / "metrics.jsonl"
    evaluations = read_evaluations(metrics) if metrics.is_file() else []
    if len(evaluations) < 2:
        print(f"error: {metrics} has {len(evaluations)} evaluation lines, expected 2 or more: "
              "one before and one after training; set data.eval and train again", file=sys.stderr)  # fmt: skip
        sys.exit(2)

    questions = read_questions(args.prompts, limit=args.limit)
    answers_before = answer_questions(args.before, questions)
    answers_after = answer_questions(args.run / "export", questions)
    before, after = measure(evaluations[0], answers_before), measure(evaluations[-1], answers_after)

    print(f"\n{format_table(before, after)}")
    print(f"\nWhat the model answers to held-out questions (greedy; {len(questions)} asked):")
    print(format_answers(answers_before, answers_after, width=shutil.get_terminal_size((110, 24)).columns))
    print(f"\ncurves          {args.run / 'curves.png'}")
    print(f"trained model   {args.run / 'export'}")
    comparison = {
        "before": asdict(before),
        "after": asdict(after),
        "answers": [
            {"prompt": old.prompt, "before": old.answer, "after": new.answer}
            for old, new in zip(answers_before, answers_after, strict=True)
        ],
    }
    text = json.dumps(comparison, ensure_ascii=False, indent=2)
    (args.run / "comparison.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
