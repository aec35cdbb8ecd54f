"""What tracing found, as arrays: every restored cell of every fact, and their means over token roles with intervals.

An *indirect effect* is what restoring one activation brings back: the score with it restored minus the corrupted
score. Nothing is chosen here (`tracing.plan.layer_plan`) and nothing is drawn (`tracing.plots.heatmaps`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lm.anatomy import Kind
from lm.errors import UserError
from lm.run_folder import write_atomic
from tracing.arrays import Array, pack
from tracing.bootstrap import bootstrap, check_confidence, mean_over_facts, share_of, shares
from tracing.effects.layer_scores import LayerScores
from tracing.question.facts import Fact
from tracing.question.sweep import layers_restored

if TYPE_CHECKING:
    import pandas

    from tracing.plan.layer_plan import LayerPlan
    from tracing.plots.heatmaps import Picture

Aggregation = Literal["fixed", "authors"]
ROLES = ("before", "first_subject", "middle_subject", "last_subject", "first_after", "further", "last")
SUBJECT_ROLES = ("first_subject", "middle_subject", "last_subject")
_VERSION = 1


def token_roles(tokens: int, span: tuple[int, int], aggregation: Aggregation = "fixed") -> dict[str, list[int]]:
    """The prompt positions of each role; with `fixed`, every position has exactly one.

    A one-token subject is `last_subject` (it ends there, and that row carries the claim about subjects). The last
    prompt token is `last` unless it belongs to the subject; `first_after` is the token after the subject unless it
    is the last one.

    Args:
        tokens: how many tokens the prompt has.
        span: `[start, end)` of the subject.
        aggregation: `authors` gives the positions that the authors of the joint method drew, to compare with their
            pictures: their last subject token is the first one again, their first token after the subject is the one
            after that, and `further` begins with it.
    """
    start, end = span
    if not 0 <= start < end <= tokens:
        raise UserError(f"a subject span of {start}:{end} does not lie in a prompt of {tokens} tokens.")
    last = [tokens - 1] if end < tokens else []
    if aggregation == "authors":
        return {
            "before": list(range(start)),
            "first_subject": [start],
            "middle_subject": list(range(start + 1, end - 1)),
            "last_subject": [start],
            "first_after": [end + 1] if end + 1 < tokens else [],
            "further": list(range(end + 1, tokens - 1)),
            "last": [tokens - 1],
        }
    return {
        "before": list(range(start)),
        "first_subject": [start] if end - start > 1 else [],
        "middle_subject": list(range(start + 1, end - 1)),
        "last_subject": [end - 1],
        "first_after": [end] if end < tokens - 1 else [],
        "further": list(range(end + 1, tokens - 1)),
        "last": last,
    }


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A fact that was left out, and why."""

    fact: Fact
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class EffectTable:
    """Mean indirect effects by token role and layer.

    Attributes:
        mean, low, high: (roles, layers); NaN where no fact has such a token (intervals also where only one group of facts has).
        share, share_low, share_high: (roles, layers), the mean over the mean total effect of the same facts, with its interval
            (`tracing.bootstrap.shares`); NaN where the corruption took nothing on average.
        facts: (roles,), how many facts each row is the mean of.
        total_effect: what the corruption took, the mean over all facts.
    """

    kind: Kind
    roles: tuple[str, ...]
    mean: Array
    low: Array
    high: Array
    share: Array
    share_low: Array
    share_high: Array
    facts: npt.NDArray[np.int64]
    confidence: float
    metric: str
    window: int
    sigma: float | None
    total_facts: int
    total_effect: float

    @property
    def layers_restored(self) -> npt.NDArray[np.int64]:
        """(layers,): how many layers were restored together; fewer than `window` where an end of the model cuts it short."""
        return np.array(layers_restored(self.window, self.mean.shape[1], self.kind), dtype=np.int64)

    @property
    def per_layer(self) -> Array:
        """(roles, layers): the mean per layer restored, which is comparable at the ends of the model too."""
        return np.asarray(self.mean / self.layers_restored)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Effects:
    """Scores of all facts: clean, corrupted, and with each activation restored.

    Attributes:
        facts: the facts the model knows, in order; everything below is aligned with them.
        skipped: the facts left out, with reasons.
        clean, corrupted: (facts,), the score on the clean prompt and the mean over noise samples without restoring.
        restored: for each kind one (prompt tokens, layers) array a fact: the mean score over noise samples with that
            activation restored. NaN where a position was not asked for. With a window the layer is its center.
        tokens: the text of each prompt token, a tuple a fact.
        subject_spans: `[start, end)` of the subject, a pair a fact.
        sigma: the absolute standard deviation of the noise; None where names were replaced instead.
        window: how many layers were restored together (mlp and attn; resid is always one).
        provenance: model, fingerprint, prompt format, noise, positions, engine.
        also: the same facts and passes by further metrics (`trace(also_metrics=…)`); each is saved to a file of its own.
    """

    facts: tuple[Fact, ...]
    clean: Array
    corrupted: Array
    restored: Mapping[Kind, Sequence[Array]]
    tokens: tuple[tuple[str, ...], ...]
    subject_spans: tuple[tuple[int, int], ...]
    sigma: float | None
    metric: str
    window: int
    skipped: tuple[Skipped, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Effects] = field(default_factory=dict)

    def __repr__(self) -> str:
        from tracing.effects.summary import brought_back

        how = "other names" if self.sigma is None else f"noise σ {self.sigma:.3g}"
        window = f", windows of {self.window}" if self.window > 1 else ""
        left = f", {len(self.skipped)} left out" if self.skipped else ""
        traced = f"{', '.join(self.kinds)} of {self.layers} layers{window}"
        found = "nothing"
        if len(self.facts):
            found = f"mean total effect {self.total.mean():.3g}, {brought_back(self)}"
        also = f"; also {', '.join(self.also)}" if self.also else ""
        return f"Effects({len(self.facts)} facts{left}; {traced}; {self.metric}, {how}; {found}{also})"

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return int(next(iter(self.restored.values()))[0].shape[1])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The traced kinds."""
        return tuple(self.restored)

    @property
    def total(self) -> Array:
        """(facts,): the total effect, clean minus corrupted."""
        return np.asarray(self.clean - self.corrupted)

    def some(self, places: Sequence[int]) -> Effects:
        """The effects of some of the facts, by their places. Raises UserError for none."""
        chosen = list(places)
        if not chosen:
            raise UserError("effects of no facts say nothing; name at least one of them.")
        return replace(
            self,
            facts=tuple(self.facts[place] for place in chosen),
            clean=self.clean[chosen],
            corrupted=self.corrupted[chosen],
            restored={kind: [cells[place] for place in chosen] for kind, cells in self.restored.items()},
            tokens=tuple(self.tokens[place] for place in chosen),
            subject_spans=tuple(self.subject_spans[place] for place in chosen),
            also={metric: one.some(chosen) for metric, one in self.also.items()},
        )

    def indirect(self, kind: Kind, *, normalized: bool = False) -> list[Array]:
        """Restored minus corrupted: one (prompt tokens, layers) array a fact.

        `normalized`: as a share of the fact's total effect; NaN for a fact of which the corruption took nothing, which has no
        shares. Not to be averaged: a small total makes a large share. The share of averages is in `table` and `summary`.
        """
        found = [cells - low for cells, low in zip(self._of(kind), self.corrupted, strict=True)]
        if not normalized:
            return found
        return [share_of(cells, total) for cells, total in zip(found, self.total, strict=True)]

    def by_role(self, kind: Kind, roles: Sequence[str] = ROLES, aggregation: Aggregation = "fixed") -> Array:
        """(facts, roles, layers): the mean indirect effect over each fact's tokens of each role; NaN where it has none."""
        check_roles(roles)
        out = np.full((len(self.facts), len(roles), self.layers), np.nan)
        for index, (cells, span) in enumerate(zip(self.indirect(kind), self.subject_spans, strict=True)):
            positions = token_roles(len(cells), span, aggregation)
            for row, role in enumerate(roles):
                traced = [p for p in positions[role] if not np.isnan(cells[p]).any()]
                if traced:
                    out[index, row] = cells[traced].mean(axis=0)
        return out

    def table(
        self,
        kind: Kind,
        *,
        roles: Sequence[str] = ROLES,
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
        aggregation: Aggregation = "fixed",
    ) -> EffectTable:
        """Means over facts by role and layer with percentile bootstrap intervals; facts of a group are drawn together."""
        check_confidence(confidence)
        values = self.by_role(kind, roles, aggregation)
        groups = [fact.group for fact in self.facts]
        low, high = bootstrap(values, groups, confidence=confidence, resamples=resamples, seed=seed)
        share, share_low, share_high = shares(
            values, self.total, groups, confidence=confidence, resamples=resamples, seed=seed
        )
        facts = (~np.isnan(values).all(axis=2)).sum(axis=0)
        return EffectTable(
            kind=kind,
            roles=tuple(roles),
            mean=mean_over_facts(values),
            low=low,
            high=high,
            share=share,
            share_low=share_low,
            share_high=share_high,
            facts=facts.astype(np.int64),
            confidence=confidence,
            metric=self.metric,
            window=1 if kind == "resid" else self.window,
            sigma=self.sigma,
            total_facts=len(self.facts),
            total_effect=float(self.total.mean()),
        )

    def scores(self, roles: Sequence[str] = SUBJECT_ROLES, aggregation: Aggregation = "fixed") -> LayerScores:
        """For each fact, kind and layer the mean indirect effect over the `roles` that the fact has, each over its tokens.

        Raises UserError for roles that no fact has.
        """
        values: dict[Kind, Array] = {}
        for kind in self.kinds:
            by_role = self.by_role(kind, roles, aggregation)
            values[kind] = np.stack([mean_over_facts(one) for one in by_role])
            if np.isnan(values[kind]).all():
                raise UserError(
                    f"no fact has traced tokens in the roles {', '.join(roles)}; choose other roles or positions."
                )
        corruption = dict(self.provenance.get("corruption", {})).get(
            "kind", "other names" if self.sigma is None else "noise"
        )
        windows = f", windows of {self.window}" if self.window > 1 else ""
        return LayerScores(
            source=f"causal tracing ({corruption}{windows})",
            unit=f"indirect effect ({self.metric}) at the {', '.join(roles)}",
            facts=self.facts,
            values=values,
            total=self.total,
            details={
                "metric": self.metric,
                "window": self.window,
                "sigma": self.sigma,
                "roles": list(roles),
                "aggregation": aggregation,
                "left_out": {one.fact.label: one.reason for one in self.skipped},
            },
            provenance=self.provenance,
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a cell, with every number that belongs to it: see `tracing.effects.dataframe`."""
        from tracing.effects.dataframe import cells

        return cells(self)

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> str:
        """What was found, in a few sentences: what the corruption took, and what brings most back; see
        `tracing.effects.summary`."""
        from tracing.effects.summary import sentences

        return "\n".join(sentences(self, confidence=confidence, seed=seed))

    def plot(
        self,
        fact: int | None = None,
        *,
        kinds: Sequence[Kind] | None = None,
        layers: Sequence[int] = (),
        plan: LayerPlan | None = None,
    ) -> Picture:
        """A picture for a notebook: means over facts by token role; or one fact, token by layer. Outlined are `layers`, or those
        of a plan in the modules that it names, dashed where the evidence does not single them out."""
        from tracing.plots.heatmaps import Picture, fact_figure, figure

        if fact is not None:
            return Picture(fact_figure(self, fact))
        tables = [self.table(kind) for kind in kinds or self.kinds]
        if plan is None:
            return Picture(figure(tables, band=layers))
        planned = ["resid" if module == "all" else module for module in plan.modules]
        return Picture(figure(tables, band=plan.layers, band_kinds=planned, tentative=not plan.singled_out))

    def _of(self, kind: Kind) -> Sequence[Array]:
        if kind not in self.restored:
            raise UserError(f"{kind!r} was not traced; trace it too, or use one of {', '.join(self.restored)}.")
        return self.restored[kind]

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file, atomically: arrays, and a JSON text named `about`; nothing is pickled. `also` is left out."""
        about = {
            "version": _VERSION,
            "facts": [asdict(fact) for fact in self.facts],
            "skipped": [{"fact": asdict(one.fact), "reason": one.reason} for one in self.skipped],
            "tokens": self.tokens,
            "subject_spans": self.subject_spans,
            "sigma": self.sigma,
            "metric": self.metric,
            "window": self.window,
            "kinds": self.kinds,
            "provenance": dict(self.provenance),
        }
        arrays: dict[str, np.ndarray[Any, Any]] = {"clean": self.clean, "corrupted": self.corrupted}
        for kind in self.kinds:
            arrays |= {f"{kind}_{index}": cells for index, cells in enumerate(self.restored[kind])}
        arrays["about"] = np.array(json.dumps(about, ensure_ascii=False))
        write_atomic(Path(path), pack(arrays))

    @classmethod
    def load(cls, path: str | Path) -> Effects:
        """Read what `save` wrote. Raises UserError for a missing or broken file, or one of another version."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                if about["version"] != _VERSION:
                    raise UserError(
                        f"{path} has effects of version {about['version']}, this program reads {_VERSION}; trace again."
                    )
                facts = tuple(Fact(**one) for one in about["facts"])
                return cls(
                    facts=facts,
                    clean=stored["clean"],
                    corrupted=stored["corrupted"],
                    restored={
                        kind: [stored[f"{kind}_{index}"] for index in range(len(facts))] for kind in about["kinds"]
                    },
                    tokens=tuple(tuple(one) for one in about["tokens"]),
                    subject_spans=tuple((int(start), int(end)) for start, end in about["subject_spans"]),
                    sigma=about["sigma"],
                    metric=about["metric"],
                    window=about["window"],
                    skipped=tuple(Skipped(fact=Fact(**one["fact"]), reason=one["reason"]) for one in about["skipped"]),
                    provenance=about["provenance"],
                )
        except FileNotFoundError as error:
            raise UserError(f"there is no effects file {path}; give the effects.npz that tracing wrote.") from error
        except UserError:
            raise
        except Exception as error:  # zip, npy, JSON and key errors have no common base
            raise UserError(f"{path} is not a readable effects file ({error}); trace again.") from error


def check_roles(roles: Sequence[str]) -> None:
    """Raise UserError for no roles or one that does not exist."""
    wrong = [role for role in roles if role not in ROLES]
    if wrong or not roles:
        raise UserError(f"the token roles {tuple(wrong or roles)} are not usable; choose of {', '.join(ROLES)}.")


def check_reached(roles: Sequence[str], positions: str) -> None:
    """Raise UserError for roles that do not exist, or of which none has tokens where these positions are traced."""
    check_roles(roles)
    if positions == "subject_and_last" and not set(roles) & {*SUBJECT_ROLES, "last"}:
        raise UserError(
            f"the roles {', '.join(roles)} are not traced with positions: subject_and_last; use positions: all."
        )
