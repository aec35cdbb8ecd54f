"""Every restored cell of every fact as arrays, their means over token roles with intervals, and the file that holds them.

An *indirect effect* is what restoring one activation brings back: the score with it restored minus the corrupted
score. What the numbers say in words, and as scores of layers, is `tracing.effects.effects`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from lm.anatomy import Kind
from lm.errors import UserError
from lm.run_folder import write_atomic
from tracing.arrays import Array, pack
from tracing.bootstrap import bootstrap, check_confidence, mean_over_facts, share_of, shares
from tracing.effects.roles import ROLES, Aggregation, check_roles, token_roles
from tracing.effects.table import EffectTable, Skipped
from tracing.question.facts import Fact

_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Cells:
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
    also: Mapping[str, Cells] = field(default_factory=dict)

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

    def some(self, places: Sequence[int]) -> Self:
        """The effects of some of the facts, by their places. Raises UserError for none."""
        chosen = list(places)
        if not chosen:
            raise UserError("effects of no facts say nothing: name at least one of them")
        return replace(
            self,
            facts=tuple(self.facts[index] for index in chosen),
            clean=self.clean[chosen],
            corrupted=self.corrupted[chosen],
            restored={kind: [cells[index] for index in chosen] for kind, cells in self.restored.items()},
            tokens=tuple(self.tokens[index] for index in chosen),
            subject_spans=tuple(self.subject_spans[index] for index in chosen),
            also={metric: by_metric.some(chosen) for metric, by_metric in self.also.items()},
        )

    def indirect(self, kind: Kind, *, normalized: bool = False) -> list[Array]:
        """Restored minus corrupted: one (prompt tokens, layers) array a fact.

        `normalized`: as a share of the fact's total effect; NaN for a fact of which the corruption took nothing, which has no
        shares. Not to be averaged: a small total makes a large share. The share of averages is in `table` and `summary`.
        """
        indirect = [cells - low for cells, low in zip(self._of(kind), self.corrupted, strict=True)]
        if not normalized:
            return indirect
        return [share_of(cells, total) for cells, total in zip(indirect, self.total, strict=True)]

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

    def _of(self, kind: Kind) -> Sequence[Array]:
        if kind not in self.restored:
            raise UserError(f"{kind!r} was not traced: trace it too, or use one of {', '.join(self.restored)}")
        return self.restored[kind]

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file, atomically: arrays, and a JSON text named `about`; nothing is pickled. `also` is left out."""
        about = {
            "version": _VERSION,
            "facts": [asdict(fact) for fact in self.facts],
            "skipped": [{"fact": asdict(skip.fact), "reason": skip.reason} for skip in self.skipped],
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
        write_atomic(Path(path), pack(arrays), private=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises UserError for a missing or broken file, or one of another version."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                if about["version"] != _VERSION:
                    raise UserError(
                        f"{path} has effects of version {about['version']}, this program reads {_VERSION}: trace again"
                    )
                facts = tuple(Fact(**one) for one in about["facts"])
                read = cls(
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
                _check_shapes(read)
                return read
        except FileNotFoundError as error:
            raise UserError(f"there is no effects file {path}: give the effects.npz that tracing wrote") from error
        except UserError:
            raise
        except Exception as error:  # zip, npy, JSON and key errors have no common base
            raise UserError(f"{path} is not a readable effects file ({error}): trace again") from error


def _check_shapes(read: Cells) -> None:
    """Raise ValueError for arrays that are not what `Cells` says of them: something else would be averaged."""
    count = len(read.facts)
    lengths = {"tokens": len(read.tokens), "subject_spans": len(read.subject_spans)}
    lengths |= {name: each.shape[0] if each.ndim == 1 else -1 for name, each in _per_fact(read).items()}
    if not count or not read.restored or set(lengths.values()) != {count}:
        raise ValueError(f"{count} facts with {', '.join(f'{length} {name}' for name, length in lengths.items())}")
    for kind, cells in read.restored.items():
        for tokens, each, (start, end) in zip(read.tokens, cells, read.subject_spans, strict=True):
            if each.shape != (len(tokens), read.layers) or not 0 <= start < end <= len(tokens):
                raise ValueError(f"{kind} of {len(tokens)} tokens and {read.layers} layers has the shape {each.shape}")
    numbers = [*_per_fact(read).values(), *(each for cells in read.restored.values() for each in cells)]
    if any(each.dtype.kind != "f" for each in numbers):
        raise ValueError("its scores are no numbers")


def _per_fact(read: Cells) -> dict[str, Array]:
    return {"clean": read.clean, "corrupted": read.corrupted}
