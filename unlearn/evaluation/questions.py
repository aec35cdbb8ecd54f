"""How a multiple-choice question is worded, once, for this project's scorer and for lm-eval alike. No model here."""

from __future__ import annotations

from lm.data.rows import Question
from lm.errors import UserError

SENTENCE_PROMPT = "Question: {question}\nAnswer:"
LETTERS = "ABCDEFGHIJ"


def sentence_prompt(question: Question) -> str:
    """The text before the answers in sentence style; each answer follows with a space."""
    return SENTENCE_PROMPT.replace("{question}", question.question)


def letter_prompt(question: Question) -> str:
    """The text before the letters, in the layout of the original MMLU code, with its two spaces before the subject.

    Raises:
        UserError: more answers than letters.
    """
    if len(question.choices) > len(LETTERS):
        raise UserError(f'"{question.question[:40]}" has {len(question.choices)} choices: give {len(LETTERS)} at most')
    name = question.subject.replace("_", " ")
    answers = "".join(f"\n{LETTERS[index]}. {text}" for index, text in enumerate(question.choices))
    head = f"The following are multiple choice questions (with answers) about  {name}.\n\n"
    return f"{head}{question.question}{answers}\nAnswer:"
