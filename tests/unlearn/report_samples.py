"""Small invented reports, and a strict reader of the page, for the tests of the report."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser

import numpy as np

from tracing import Fact, difference
from tracing.effects.effects import Effects
from tracing.effects.roles import ROLES
from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import LayerPlan
from unlearn.report import Answer, Attacked, AttackTrial, Audited, Depth, Report, ReportModel, Retraced
from unlearn.report.records import Part

NAN = math.nan
VOID = {"meta", "br", "col"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; keeps tags with attributes, ids, and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(text for place, text in self.texts if place not in ("style", "title"))


def table(kind: str = "mlp", layers: int = 8, peak: int = 3) -> EffectTable:
    mean = np.full((len(ROLES), layers), NAN)
    mean[[1, 3, 6]] = 0.01
    mean[3, peak], mean[6, 0] = 0.4, -0.02
    facts = np.array([0, 5, 0, 6, 0, 0, 6])
    return EffectTable(
        kind=kind,  # type: ignore[arg-type]
        roles=ROLES,
        mean=mean,
        low=mean - 0.005,
        high=mean + 0.005,
        share=mean / 0.8,
        share_low=(mean - 0.005) / 0.8,
        share_high=(mean + 0.005) / 0.8,
        facts=facts,
        confidence=0.95,
        metric="probability",
        window=1,
        sigma=0.1,
        total_facts=6,
        total_effect=0.8,
    )


def plan(*, singled: bool = True, layers: int = 8, chosen: tuple[int, ...] = (2, 3, 4)) -> LayerPlan:
    scores = [0.4 if layer in chosen else 0.01 for layer in range(layers)]
    return LayerPlan(
        layers=chosen,
        rule="the best band",
        singled_out=singled,
        verdict="The evidence singles out layers." if singled else "The evidence does not single out layers: noise.",
        evidence={"kind": "mlp", "layer_scores": scores, "layer_low": scores, "layer_high": scores, "confidence": 0.95},
        controls={"random": (0, 5, 7)},
        provenance={"model_layers": layers, "facts_used": ["a", "b"], "facts_left_out": {"c": "not known"}},
    )


PARTS: dict[str, Part] = {
    "base": "reference",
    "retain_only": "retain_model",
    "joint_planned": "planned",
    "joint_random": "control",
    "joint_all": "all_layers",
}
"""The parts of the models of these tests, by their keys; any other is another method."""


def model(key: str, aggregate: float, final: float = NAN, **other: object) -> ReportModel:
    made = ReportModel(
        key=key,
        label=f"<{key}>",
        part=PARTS.get(key, "other"),
        terms=(aggregate,) * 12,
        task_aggregate=aggregate,
        final=final,
    )
    return dataclasses.replace(made, **other)  # type: ignore[arg-type]


BASE = model("base", 0.0, 0.3, mia_auc=1.0, mia_score=0.0, utility=0.8)
RETAIN_MODEL = model("retain_only", 0.96, 0.9, mia_auc=0.51, mia_score=0.98, utility=0.8)
PLANNED = model("joint_planned", 0.93, 0.88, mia_auc=0.53, mia_score=0.94, utility=0.76, layers=(2, 3, 4), seconds=200)


def report(*models: ReportModel, **other: object) -> Report:
    made = Report(title="T", model_name="m", question="Q?", models=models or (BASE, PLANNED, RETAIN_MODEL), plan=plan())
    return dataclasses.replace(made, **other)  # type: ignore[arg-type]


def traced(peak: float, clean: float) -> Effects:
    """Four facts with an effect at one layer."""
    cells = np.zeros((6, 8))
    cells[1:4, 3] = peak
    return Effects(
        facts=tuple(Fact("who is ada", "ada", "w", id=str(place)) for place in range(4)),
        clean=np.full(4, clean),
        corrupted=np.full(4, 0.1),
        restored={"mlp": [cells + 0.1 + 0.01 * place for place in range(4)]},
        tokens=(tuple("abcdef"),) * 4,
        subject_spans=((1, 4),) * 4,
        sigma=0.1,
        metric="probability",
        window=1,
    )


def retraced(label: str = "Facts to forget", after: float = 0.05) -> Retraced:
    """Four facts whose effect at one layer falls to `after`."""
    return Retraced(label=label, found=difference(traced(0.4, 0.9), traced(after, 0.2)))


def attacked(label: str = "<joint>") -> Attacked:
    """An attack that was asked about three times; the last difference has no interval."""
    trial = AttackTrial(
        name="other_people",
        verdict="as much",
        sentence="other_people: the unlearned model relearns as fast.",
        levels=(0, 10, 20),
        unlearned=(0.0, 0.1, 0.2),
        retain_model=(0.0, 0.15, 0.25),
        low=(-0.1, -0.1, NAN),
        high=(0.1, 0.05, NAN),
    )
    known, alone = (-1.5, -2.0, -1.0), (-0.5, NAN, NAN)
    ends = ((known, alone), (known, (NAN, NAN, NAN)), (known, known))
    measured = {"log_probability": ends, "score": ends}
    audit = Audited(
        sentence="The forgotten answers are likelier.",
        groups=(("forgotten", 20), ("retained", 20), ("never seen", 8)),
        unlearned=measured,
        retain_model=measured,
    )
    return Attacked(
        label=label,
        attack="Relearning",
        unit="steps",
        trials=(trial,),
        worst=(0, 1),
        worst_sentence="At worst -0.05.",
        audit=audit,
    )


def full() -> Report:
    log = [{"step": step, "forget_ce": 0.1 * step, "retain_ce": 0.02, "alpha": 1.5} for step in range(1, 31)]
    methods = (dataclasses.replace(PLANNED, log=log), model("joint_random", 0.8, 0.7, layers=(0, 5, 7)))
    said = {"base": "1987", "joint_planned": "1962", "joint_random": "", "retain_only": "1971"}
    return report(
        BASE,
        *methods,
        model("gradient_difference", 0.6, 0.5),
        RETAIN_MODEL,
        tables={kind: table(kind) for kind in ("resid", "mlp", "attn")},
        answers=(
            Answer(prompt="When?", truth="1987", task="Task2", side="forget", said=said),
            Answer(prompt="Where?", truth="Varn", task="Task3", side="retain", said={"base": "Varn"}),
        ),
        again=(retraced(), retraced("Facts to keep", 0.4)),
        attacks=(attacked(),),
        depths=(Depth(label="<joint>", sentence="Deep.", unlearned=(0.1, 0.4, NAN), retain_model=(0.2, 0.5, 1.0)),),
        caveats=("One seed.",),
        commands=("make demo",),
        facts={"Seed": "0"},
    )
