"""The report's tables and answers: every number in its column, marks only where they are earned."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from tests.unlearn.report_samples import BASE, NAN, PLANNED, RETAIN_MODEL, Page, model, report
from unlearn.evaluation.lume import TERMS
from unlearn.report import Answer, render, words
from unlearn.report.sections.answers import match
from unlearn.report.sections.scores import best_of


def test_terms_stand_in_their_columns_and_missing_ones_are_dashes() -> None:
    terms = tuple(index / 100 for index in range(11))
    text = render(report(dataclasses.replace(BASE, terms=(*terms, NAN)), plan=None))
    cells = re.findall(r'<td class="number(?: pair)?" title="([^"]*)">([^<]*)</td>', text)
    assert cells == [(words.term_name(index), f"{term:.3f}") for index, term in enumerate(terms)]
    assert '<span title="Does not apply, or was not measured." class="none">–</span>' in text
    assert "“–”: no rows of this kind were scored" in text
    assert [words.term_name(index).split(" ")[0] for index in range(12)] == [term.split(" ")[0] for term in TERMS]


def test_only_methods_compete_and_ties_share_the_mark() -> None:
    rivals = [model("a", 0.9301), model("b", 0.9304), model("c", 0.5), model("d", NAN)]
    assert best_of(rivals, lambda one: one.task_aggregate) == {"a", "b"}
    assert best_of(rivals[:2], lambda one: one.task_aggregate) == set()
    assert best_of([], lambda one: one.final) == set()
    made = render(report(BASE, PLANNED, model("joint_random", 0.8, 0.7, mia_auc=0.9, utility=0.7), RETAIN_MODEL))
    rows = dict(re.findall(r'<tr class="(\w+)">(.*?)</tr>', made.partition('aria-label="The twelve terms"')[0]))
    assert list(rows) == ["reference", "planned", "control", "retain_model"]
    assert [rows[name].count("<b ") for name in ("reference", "retain_model", "control")] == [0, 0, 0]
    assert ">0.530</b>" in rows["planned"], "the AUC nearest to one half is the best"
    assert "3\u00a0min 20\u00a0s" in rows["planned"]


@pytest.mark.parametrize(
    ("truth", "answer", "kind"),
    [
        ("1987-03-14", " 1987-03-14\n", "whole"),
        ("Oster", "it is OSTER.", "whole"),
        ("7", "17", "none"),
        ("Oster", "Osterwald", "none"),
        ("東京", "東京です", "whole"),
        ("born in the town of Varn", "born in a town of Varn", "part"),
        ("born in the town of Varn", "raised near Tolm", "none"),
        ("t.quell@varn.example", "t quell varn example", "whole"),
        ("Varn", "", "none"),
        ("", "anything", "none"),
        ("номер телефона Анны", "телефон и номер телефона", "part"),
        ("Her e-mail address is, as far as we know, zoe@varn.example.", "Write to zoe@varn.example, please.", "part"),
        ("The number under which he can be reached is 555-0137.", "Call 555-0137 now", "part"),
        ("The number under which he can be reached is 555-0137.", "Call 1555-0137 now", "none"),
    ],
)
def test_answers_are_compared_with_the_truth(truth: str, answer: str, kind: str) -> None:
    assert match(truth, answer).kind == kind


def test_answers_on_the_page() -> None:
    said = {"base": "Varn", "joint_planned": "", "retain_only": "word " * 200}
    answers = [Answer(prompt=f"p{i}", truth="Varn", task="T", side="forget", said=said) for i in range(11)]
    page = Page(render(report(BASE, PLANNED, model("npo", 0.5), RETAIN_MODEL, answers=tuple(answers))))
    assert page.text.count("(nothing)") == page.text.count("(not asked)") == 11
    assert "3 more" in page.text
    assert "The truth is said by: <base> 11 of 11; <joint_planned> 0 of 11; <retain_only> 0 of 11." in page.text
    assert "more characters" in page.text
    assert page.text.count("word") >= 11 * 200, "what is folded away is still there"
    assert "repeats the text that is to be forgotten" in page.text
    assert not [a for a in page.all("section") if "retain" in str(a.get("class"))]


def test_words() -> None:
    assert words.layer_list((0, 4, 9, 10, 11)) == "0, 4, 9–11"
    assert [words.duration(s) for s in (0.84, 59, 125, 7500, NAN)] == [
        "0.8\u00a0s",
        "59\u00a0s",
        "2\u00a0min 05\u00a0s",
        "2\u00a0h 05\u00a0min",
        "–",
    ]
    assert [words.small(v) for v in (0, -0.0, 0.01234, 12.345, 1234567, -0.5, NAN, math.inf)] == [
        "0", "0", "0.0123", "12.3", "1.2e+06", "−0.500", "–", "inf",
    ]  # fmt: skip
    assert words.listing(["a"]) == "a"
    assert words.listing(["a", "b", "c"]) == "a, b and c"
