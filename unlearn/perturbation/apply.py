"""Moves the weights of a model, whole or in shards, and says what is left of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lm.devices import sum_over_processes
from lm.errors import UserError
from lm.model import LanguageModel
from lm.shards import first_row, is_sharded, local_part, reshard, scatter_into
from unlearn.perturbation.base import NoPerturbation, Perturbation, place_of


@dataclass(frozen=True)
class Moved:
    """What a perturbation did in one place: a layer, the embeddings, the head.

    Attributes:
        weights: how many were moved.
        share: how far, a mean over them.
        kept: `<after, before> / <before, before>`: how much of what was there is there still.
        norm: `|after| / |before|`.
    """

    place: str
    weights: int
    share: float
    kept: float
    norm: float


def check_perturbation(model: LanguageModel, perturbation: Perturbation, healed: Collection[int] = ()) -> None:
    """Raise UserError for a perturbation that moves nothing, or weights that nothing would heal. The scope is applied already.

    Args:
        healed: the ids of the tokens that rows to keep have, for `Part.unhealed`.
    """
    if isinstance(perturbation, NoPerturbation):
        return
    shares = shares_of(model, perturbation, healed)
    if not shares:
        raise UserError(
            f"perturbation.parts is {list(perturbation.parts)} and {model.name} has no weight there that would be moved: name "
            "layers or embeddings that it has, or take NoPerturbation"
        )
    learns = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    frozen = [name for name in shares if name not in learns]
    if frozen:
        raise UserError(
            f"{len(frozen)} of the weights that would be perturbed may not change ({frozen[0]}), so nothing would heal them: "
            "widen the scope, or narrow perturbation.parts"
        )


def shares_of(
    model: LanguageModel, perturbation: Perturbation, healed: Collection[int] = ()
) -> dict[str, float | Tensor]:
    """Name of each parameter that is moved -> how far: all of it alike, or (rows,) each of its rows."""
    parts = [part.resolve(model) for part in perturbation.parts]
    unhealed = torch.ones(model.anatomy.vocabulary, dtype=torch.bool)
    unhealed[sorted(healed)] = False
    shares: dict[str, float | Tensor] = {}
    for name, parameter in model.model.named_parameters():
        holding = [each.part for each in parts if each.contains(model.anatomy, name)]
        by_row = torch.zeros(len(parameter)) if parameter.ndim and len(parameter) == len(unhealed) else None
        for part in reversed(holding):  # the first that holds a weight comes last
            if not part.unhealed:
                shares[name] = part.share
                by_row = None if by_row is None else torch.full_like(by_row, part.share)
            elif by_row is not None and unhealed.any():  # positions, say, have no tokens
                by_row[unhealed] = part.share
                shares[name] = by_row
    return shares


@torch.no_grad()
def perturb(
    model: LanguageModel, perturbation: Perturbation, *, seed: int, healed: Collection[int] = ()
) -> tuple[Moved, ...]:
    """Move the weights in place; every process must call it. The same for any number of processes, sharded or not.

    Args:
        seed: taken where the perturbation has none of its own.
        healed: the ids of the tokens that rows to keep have, for `Part.unhealed`.
    """
    if isinstance(perturbation, NoPerturbation):
        return ()
    reshard(model.model)
    shares = shares_of(model, perturbation, healed)
    other = perturbation.other(model, seed if perturbation.seed is None else perturbation.seed)
    sums: dict[str, Tensor] = {}
    for name, parameter in model.model.named_parameters():
        if name not in shares:
            continue
        target = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
        scatter_into(target, other(name, parameter.shape))
        local = local_part(parameter)
        before = local.float()
        share = _share_here(shares[name], parameter)
        after = torch.lerp(before, local_part(target), share).to(local.dtype)
        place = place_of(model.anatomy, name)
        measured = _sums(before, after.float(), share)  # before the weights change: `before` may be they themselves
        local.copy_(after)
        sums[place] = sums.get(place, torch.zeros_like(measured)) + measured
    return tuple(_moved(place, _total(values, model)) for place, values in sums.items())


def _share_here(share: float | Tensor, parameter: Tensor) -> Tensor:
    """How far the weights that this process holds are moved, to stand beside them."""
    local = local_part(parameter)
    if isinstance(share, float):
        return torch.tensor(share, device=local.device)
    first = first_row(parameter)
    return share[first : first + len(local)].to(local.device).view(-1, *[1] * (local.ndim - 1))


def _sums(before: Tensor, after: Tensor, share: Tensor) -> Tensor:
    """(5,) how many, their share, `<after, before>`, `<before, before>`, `<after, after>`."""
    moved = share.expand_as(before)
    count = float((moved != 0).sum())
    products = [(a.double() * b.double()).sum() for a, b in ((after, before), (before, before), (after, after))]
    return torch.stack([products[0].new_tensor(count), moved.double().sum(), *products])


def _total(values: Tensor, model: LanguageModel) -> Sequence[float]:
    found: list[float] = (sum_over_processes(values) if is_sharded(model.model) else values).tolist()
    return found


def _moved(place: str, sums: Sequence[float]) -> Moved:
    count, share, across, before, after = sums
    kept, norm = (across / before, (after / before) ** 0.5) if before else (float("nan"), float("nan"))
    return Moved(place, round(count), share / max(count, 1.0), kept, norm)


def described(moved: Sequence[Moved]) -> list[dict[str, object]]:
    """For the manifest."""
    return [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(each).items()}
        for each in moved
    ]


def sentence(moved: Sequence[Moved]) -> str:
    """For a person."""
    parts = ", ".join(f"{each.place} {each.kept:.2f}" for each in moved)
    return f"perturbed {sum(each.weights for each in moved):,} weights; share of what was there that is left: {parts}"
