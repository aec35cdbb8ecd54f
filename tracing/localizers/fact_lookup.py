"""Fact-lookup probes: at which layer does the answer become readable in the stream, and what wrote it there?

Localizing by outputs finds what brings an answer out; the mechanism that looks a fact up is earlier, where attributes are
written onto the subject's last token. A layer's score is the rise of readability across its attention and across its MLP. What
can be read is not always what is used: compare with tracing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lm.anatomy import EMBEDDING, Kind, Site
from lm.errors import UserError
from lm.forward.hooks import capture
from lm.model import LanguageModel
from lm.run_folder import progress as progress_bar
from tracing.arrays import Array
from tracing.bootstrap import mean_over_facts
from tracing.effects.layer_scores import LayerScores
from tracing.effects.table import Skipped
from tracing.known import evaluating, known_facts
from tracing.localizers.base import Localization, Localizer, made_with
from tracing.localizers.readout import folds_of, linear_probe, logit_lens, usable
from tracing.question.encoded_fact import EncodedFact, embed, forward
from tracing.question.metrics import MetricName, metric_of

Readout = Literal["logit_lens", "linear_probe"]
ReadAt = Literal["last_subject", "last"]
Classes = Literal["answer", "first_token"]


@dataclass(frozen=True, kw_only=True)
class FactLookup(Localizer):
    """The rise, layer by layer, of how readable the answer is in the stream.

    Readability is taken in the stream before block 0, after each attention and after each MLP; a module's score is what it
    rises by there (`attn` plus `mlp` make `resid`, the whole block). In blocks with parallel attention and MLP, attention is
    added first. The curves themselves, over blocks, are in `LayerScores.details` as `curve`.

    - `logit_lens`: the metric of the answer, read by the final norm and the head straight from the stream: at `last` from
      the positions that say the answer (teacher forced), at `last_subject` all of its tokens from that one position.
    - `linear_probe`: facts that are asked the same question of different subjects are told apart by their classes with a
      cross-validated ridge regression (`tracing.localizers.readout.linear_probe`), fitted to each question and state alone; whole
      groups are held out. It needs classes that several subjects share: facts without are left out, and a set
      without any is refused. Readability is then the share of the other classes ranked below the right one.

    Badge: *reconstruction* of the fact-lookup localization of Guo et al. (2024, arXiv:2410.12949), which trains the MLPs
    of the layers where probes rise; which probes, and how the rise becomes a score, is ours.

    Cost: a forward pass a fact, and the head once a state (`logit_lens`).
    """

    readout: Readout = "logit_lens"
    """logit_lens: what the model's own head reads; linear_probe: what a trained probe reads."""
    position: ReadAt = "last_subject"
    """Where it is read: last_subject, where facts are looked up; or last, where the answer is said."""
    metric: MetricName = "log_probability"
    """Of the logit lens."""
    classes: Classes = "answer"
    """Of the linear probe: the whole answer, or its first token where answers are not shared."""
    folds: int = 5
    """Of the linear probe's cross-validation."""
    ridge: float = 1.0
    """Of the linear probe: the penalty in units of the mean squared length of a centered state."""
    seed: int = 0
    """Of the folds."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("readout", self.readout, Readout),
            ("position", self.position, ReadAt),
            ("classes", self.classes, Classes),
        ):
            if value not in get_args(known):
                raise UserError(f"the lookup's {name} is {value!r}: use {' or '.join(get_args(known))}")
        if metric_of(self.metric).needs_clean:
            raise UserError(f"the lookup has no clean pass to compare with by {self.metric}: use log_probability")
        if self.folds < 2:
            raise UserError(f"the lookup's folds is {self.folds}: give at least 2 (5 is usual)")
        if not 0 < self.ridge < float("inf"):
            raise UserError(f"the lookup's ridge is {self.ridge}: give a positive number (1 is usual)")

    @property
    def scored(self) -> tuple[Kind, ...]:
        return ("mlp", "attn", "resid")

    def locate(self, task: Localization) -> LayerScores:
        model, progress = task.model, task.progress
        lens = self.readout == "logit_lens"
        with evaluating(model):
            metric = self.metric if lens else "log_probability"
            known, skipped = known_facts(model, task.facts, task.prompt, metric=metric, show=progress)
            read: list[Array] = []
            with progress_bar(len(known), label="fact lookup", unit="facts", enabled=progress) as advance:
                for encoded in known:
                    states = streams(model, encoded, self._places(encoded))
                    read.append(
                        logit_lens(model, encoded, states, self.metric) if lens else states[:, 0].double().cpu().numpy()
                    )
                    advance(1)
        details: dict[str, Any] = {}
        curves = np.stack(read)
        if not lens:
            known, curves, details, more = self._probed(known, curves)
            skipped = [*skipped, *more]
        values: dict[Kind, Array] = {
            "mlp": curves[:, 2::2] - curves[:, 1::2],
            "attn": curves[:, 1::2] - curves[:, :-2:2],
            "resid": curves[:, 2::2] - curves[:, :-2:2],
        }
        where = "the last subject token" if self.position == "last_subject" else "the last token"
        what = self.metric if lens else f"classes of the {self.classes.replace('_', ' ')} told apart"
        return LayerScores(
            source=f"fact lookup ({self.readout.replace('_', ' ')})",
            unit=f"rise of readability ({what}) at {where}",
            facts=tuple(encoded.fact for encoded in known),
            values=values,
            details={
                **details,
                "curve": mean_over_facts(curves)[::2].tolist(),
                "left_out": {skip.fact.label: skip.why for skip in skipped},
            },
            provenance=made_with(model, self, task.prompt),
        )

    def _places(self, encoded: EncodedFact) -> list[int]:
        """The positions whose stream is read."""
        if self.position == "last_subject":
            return [encoded.span[1] - 1]
        last = len(encoded.prompt_ids) - 1
        return [last + step for step in range(len(encoded.answer_ids) if self.readout == "logit_lens" else 1)]

    def _probed(
        self, encoded_facts: Sequence[EncodedFact], states: Array
    ) -> tuple[list[EncodedFact], Array, dict[str, Any], list[Skipped]]:
        """The facts that can be told apart, their readability (facts, states), how often they are, and the facts left out."""
        questions: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, encoded in enumerate(encoded_facts):
            questions[encoded.fact.question].append(index)
        curves = np.full(states.shape[:2], np.nan)
        hits = np.full(states.shape[:2], np.nan)
        for members in questions.values():
            labels = [self._label(encoded_facts[index]) for index in members]
            groups = [encoded_facts[index].fact.group or encoded_facts[index].fact.subject for index in members]
            kept = usable(labels, groups)
            if not kept:
                continue
            labels, groups = [labels[member] for member in kept], [groups[member] for member in kept]
            folds = folds_of(labels, groups, self.folds, self.seed)
            rows = [members[member] for member in kept]
            for state in range(states.shape[1]):
                curves[rows, state], hits[rows, state] = linear_probe(states[rows, state], labels, folds, self.ridge)
        probed = np.flatnonzero(~np.isnan(curves).any(axis=1)).tolist()
        if not probed:
            what = "answers" if self.classes == "answer" else "first tokens"
            way = "classes: first_token, or " if self.classes == "answer" else ""
            raise UserError(
                f"none of the {len(encoded_facts)} facts can be probed: a linear probe needs a question that is asked of several "
                f"subjects and has at least two {what} that two of them share each: use {way}readout: logit_lens"
            )
        reason = f"no other subject with its {self.classes.replace('_', ' ')} is asked this question"
        left = [
            Skipped(fact=encoded_facts[index].fact, reason=reason)
            for index in sorted(set(range(len(encoded_facts))) - set(probed))
        ]
        details = {"accuracy": hits[probed].mean(axis=0)[::2].tolist(), "probed": len(probed)}
        return [encoded_facts[index] for index in probed], curves[probed], details, left

    def _label(self, encoded: EncodedFact) -> str:
        return encoded.fact.answer if self.classes == "answer" else str(encoded.answer_ids[0])


@torch.inference_mode()
def streams(model: LanguageModel, encoded: EncodedFact, places: Sequence[int]) -> Tensor:
    """(1 + 2 layers, places, hidden): the stream at some positions before block 0, then after each attention and each MLP.

    The positions are of the teacher-forced input. After attention the stream is that before the block plus what attention adds.
    """
    layers = range(model.anatomy.layers)
    sites = [EMBEDDING, *model.anatomy.sites("attn", "resid")]
    with capture(model, sites, positions=list(places)) as seen:
        forward(model, embed(model, encoded.input_ids)[None], 1)
    states = [seen[EMBEDDING][0]]
    for layer in layers:
        added = seen[Site("attn", layer)][0]
        states += [states[-1].to(added.device) + added, seen[Site("resid", layer)][0]]
    return torch.stack([state.to(states[0].device) for state in states])
