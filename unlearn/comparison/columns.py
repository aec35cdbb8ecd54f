"""The columns of the table: what each is called, what it says, and how its numbers are written. Nothing is read here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of each model.

    Attributes:
        name: its key in comparison.json.
        head: its heading.
        meaning: what it is and which way is better, a sentence.
        digits: after the point.
        smallest: a number below it is written `<smallest`, as p-values are.
    """

    name: str
    head: str
    meaning: str
    digits: int = 3
    smallest: float | None = None

    def text(self, values: Sequence[float | None]) -> str:
        """Of one value each seed: the mean, with the smallest and the largest where there are several; empty without any."""
        known = [value for value in values if value is not None and not math.isnan(value)]
        if not known:
            return ""
        mean = self._number(statistics.fmean(known))
        shown = mean if len(known) == 1 else f"{mean} ({self._number(min(known))} to {self._number(max(known))})"
        seeds = "seed" if len(known) == 1 else "seeds"
        return shown if len(known) == len(values) else f"{shown}, {len(known)} {seeds}"

    def _number(self, value: float) -> str:
        if self.smallest is not None and value < self.smallest:
            return f"<{self.smallest:g}"
        return f"{round(value, self.digits) + 0.0:,.{self.digits}f}"  # + 0.0: never -0.000


COLUMNS = (
    Column(
        name="task_aggregate",
        head="task aggregate",
        meaning="Harmonic mean of what is forgotten and what is kept, completions and answers of every task. 1 is best.",
    ),
    Column(
        name="lowest_retain_term",
        head="lowest retain term",
        meaning="The worst of the retain terms in that mean: of which kind of retain rows most was lost. 1 is best.",
    ),
    Column(
        name="mia_auc",
        head="MIA AUC",
        meaning="How well losses tell forgotten documents from never-seen ones: 1 always, 0.5 not at all, 0 by their high loss.",
    ),
    Column(
        name="mia_auc_gap",
        head="from the retain model's",
        meaning="Distance of that area from the retain model's on the same documents. 0 is best.",
    ),
    Column(
        name="mia_ks_p",
        head="KS p",
        meaning="p-value of a test whether losses of forgotten documents are spread as the retain model's. Small: they are not.",
        smallest=0.001,
    ),
    Column(
        name="mia_tpr_at_5_fpr",
        head="TPR at 5 % FPR",
        meaning="Share of forgotten documents that losses give away where 5 % of others are accused too. About 0.05 is best.",
    ),
    Column(
        name="utility",
        head="utility",
        meaning="Accuracy on questions that have nothing to do with either side. 1 is best.",
    ),
    Column(
        name="utility_share",
        head="of the base's",
        meaning="The same as a share of that of the model before unlearning.",
    ),
    Column(
        name="general_perplexity",
        head="perplexity",
        meaning="Perplexity on general text. Lower is better; the base model's is what was there.",
        digits=2,
    ),
    Column(
        name="final",
        head="final",
        meaning="The official score: mean of task aggregate, 1 - 2 |AUC - 0.5|, and utility. 1 is best.",
    ),
    Column(
        name="worst_gap",
        head="worst relearning gap",
        meaning="What an attack brings back beyond what it teaches the retain model, share of the answers, in the worst cell of "
        "its grid. 0 is best; the largest of many cells lies a little above 0 by chance.",
    ),
    Column(
        name="residue_before",
        head="residue before",
        meaning="How much likelier forgotten answers are than those of people never seen, in nats a token, less the same of the "
        "retain model, before the attack. 0 is best; below 0 they are conspicuously unlikely.",
        digits=2,
    ),
    Column(
        name="residue_after",
        head="residue after",
        meaning="The same after the attack that leaves most. 0 is best.",
        digits=2,
    ),
    Column(
        name="garbled",
        head="garbled",
        meaning="Share of the answers to forgotten rows that are empty, repeated or scrambled. As the retain model's is best.",
    ),
    Column(name="seconds", head="seconds", meaning="Training time, without scoring and attacks.", digits=0),
    Column(name="memory", head="memory, GiB", meaning="Peak resident memory of the process that trained.", digits=2),
    Column(name="gpu_memory", head="GPU memory, GiB", meaning="Peak memory on the accelerator.", digits=2),
    Column(
        name="tokens", head="tokens", meaning="Tokens that training put through the model, prompts included.", digits=0
    ),
)
"""In the order in which they are shown."""


def further(name: str) -> Column:
    """The column of a score that only `also` names."""
    return Column(name=name, head=name.replace("_", " "), meaning=f"The score {name} of the evaluation.")
