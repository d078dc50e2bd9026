"""The demo's preference: a brief answer is better. One rule, checkable by eye; it reads text and nothing else."""

import re

MIN_WORDS = 4
MAX_WORDS = 40
MAX_SENTENCES = 2

# Where a full stop ends no sentence although a space follows it. Decimals (3.5) need no entry: no space follows theirs.
_ABBREVIATIONS = re.compile(r"\b(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|approx|[A-Z])\.(?=\s)")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019*]*(?=\s|$)")
_LIST_MARK = re.compile(r"^(?:[-*•#>]|\d+[.)])\s")


def count_words(answer: str) -> int:
    """Returns the number of words in ``answer``, a word being whatever stands between white space."""
    return len(answer.split())


def count_sentences(answer: str) -> int:
    """Returns how often a sentence ends in ``answer``: at ``.``, ``!`` or ``?`` before white space or the end.

    A few abbreviations (``e.g.``, ``Dr.``, initials) end none. That is an approximation: "I met him at 5 p.m. today."
    counts as two sentences.
    """
    return len(_SENTENCE_END.findall(_ABBREVIATIONS.sub("", answer)))


def is_brief(answer: str) -> bool:
    """Says whether ``answer`` satisfies the demo's preference rule.

    It does when it is one paragraph without a line break or list mark, has one or two sentences, the last of which is
    finished (by ``.``, ``!`` or ``?``, perhaps within a closing quote or bracket), and has 4 to 40 words. White space
    around it does not matter. The least number of words keeps a model from satisfying the rule by saying nothing.
    """
    answer = answer.strip()
    if "\n" in answer or _LIST_MARK.match(answer):
        return False
    is_finished = any(end.end() == len(answer) for end in _SENTENCE_END.finditer(answer))
    is_short = MIN_WORDS <= count_words(answer) <= MAX_WORDS
    return is_finished and is_short and count_sentences(answer) <= MAX_SENTENCES
