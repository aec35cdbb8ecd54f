"""Watch and edit activations: two context managers that fail loudly.

`capture` keeps what the last forward pass produced at some sites; `patch` replaces values at some sites while it
is open. A site that no forward pass reached, a position that does not exist, and an edit that changed nothing all
raise: a hook that silently does nothing is the usual way to publish a wrong figure. Nothing here runs a model.

Hooks fire in the order in which they were opened. `with patch(...), capture(...)` captures edited values at an
edited site, `with capture(...), patch(...)` the values before the edit; sites further down see the edit either way.
Neither is meant for generation with a cache (positions then count from the newest token only) nor for activation
checkpointing that recomputes after the context has closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lm.anatomy import EMBEDDING, Kind, Site, module_at
from lm.errors import UserError
from lm.model import LanguageModel

Selection = slice | Sequence[int] | None
"""Which rows or positions: a slice, indices (negative ones count from the end), or None for all."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Set `hidden[rows, positions]` at a site, every row with every position.

    `value` broadcasts to `(rows, positions, hidden)` and is cast to the model's type and device. As a function it is
    given a copy of the current values in that shape and returns the new ones.
    """

    site: Site
    value: Tensor | Callable[[Tensor], Tensor]
    rows: Selection = None
    positions: Selection = None


class Captured:
    """What `capture` saw: `captured[site]` is `(rows, positions, hidden)` of the last forward pass that reached it."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(dict.fromkeys(sites))
        self._values: dict[Site, Tensor] = {}

    def __getitem__(self, site: Site) -> Tensor:
        _require_site(site)
        if site not in self.sites:
            raise UserError(f"{site} was not captured: add it to the sites that capture() is given")
        if site not in self._values:
            raise UserError(f"{site} was not reached: run the model inside the capture() context before reading it")
        return self._values[site]

    def __contains__(self, site: Site) -> bool:
        _require_site(site)
        return site in self._values

    def _keep(self, site: Site, value: Tensor) -> None:
        self._values[site] = value


@contextmanager
def capture(
    model: LanguageModel,
    sites: Sequence[Site],
    *,
    rows: Selection = None,
    positions: Selection = None,
    detach: bool = True,
) -> Iterator[Captured]:
    """Keep the values at `sites`, each `(rows, positions, hidden)`, of the last forward pass inside the context.

    They are what stood there when the model came by, also where it adds to the same memory later (Falcon). `detach=False` keeps
    the autograd graph. Raises UserError for a layer, row or position that does not exist, and
    on leaving the context (unless an exception is already on its way) for a site that was never reached.
    """
    captured = Captured(sites)

    def keeper(site: Site) -> Callable[[Tensor], Tensor | None]:
        def keep(hidden: Tensor) -> Tensor | None:
            if rows is None and positions is None:
                captured._keep(site, hidden.detach().clone() if detach else hidden)
                return None if detach else hidden.clone()  # the model goes on with a copy, to which it may add
            value = hidden[_grid(hidden, site, rows, positions)]  # a copy
            captured._keep(site, value.detach() if detach else value)
            return None

        return keep

    with ExitStack() as hooks:
        for site in captured.sites:
            hooks.enter_context(intercept(model, site, keeper(site)))
        yield captured
    _require_reached([site for site in captured.sites if site not in captured], "captured")


@contextmanager
def patch(model: LanguageModel, edits: Sequence[Edit], *, allow_unchanged: bool = False) -> Iterator[None]:
    """Apply `edits`, in order, to every forward pass inside the context; the model's own tensors are never written to.

    Gradients flow through what was not replaced, and into `value`. Raises UserError for a layer, row or position that
    does not exist or is named twice, for a value of the wrong shape, and on leaving the context (unless an exception is
    already on its way) for an edit that was never reached or, without `allow_unchanged`, never changed a value.
    """
    reached: set[int] = set()
    changed: set[int] = set()

    def editor(index: int, edit: Edit) -> Callable[[Tensor], Tensor]:
        def apply(hidden: Tensor) -> Tensor:
            grid = _grid(hidden, edit.site, edit.rows, edit.positions, unique=True)
            old = hidden[grid]
            new = _new_value(edit, old)
            reached.add(index)
            if not allow_unchanged and index not in changed and not torch.equal(new, old):
                changed.add(index)
            return hidden.index_put(grid, new)

        return apply

    with ExitStack() as hooks:
        for index, edit in enumerate(edits):
            hooks.enter_context(intercept(model, edit.site, editor(index, edit)))
        yield
    _require_reached([edit.site for index, edit in enumerate(edits) if index not in reached], "edited")
    for index, edit in enumerate(edits):
        if not allow_unchanged and index not in changed:
            raise UserError(f"the edit of {edit.site} changed nothing: check its value, or pass allow_unchanged=True")


@contextmanager
def intercept(model: LanguageModel, site: Site, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Let `see` look at (and, by returning a tensor, replace) the values at one site.

    What the family multiplies before it adds it (Granite) is seen, and given back, multiplied.
    """
    _require_site(site)
    anatomy = model.anatomy
    by = 1.0 if site == EMBEDDING else anatomy.multiplier(site)
    flat = anatomy.names.flat and site.kind == "mlp"
    if not by:
        raise UserError(
            f"{site} adds nothing, since this {anatomy.architecture} model multiplies it by 0: choose another site"
        )
    shape: list[int] = []  # (rows, tokens), where the module's own output does not say

    def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if flat and isinstance(hidden, Tensor) and hidden.ndim == 2:
            hidden = hidden.reshape(*shape, hidden.shape[-1])
        new = see(_checked(hidden, site) * by if by != 1 else _checked(hidden, site))
        if new is None:
            return None
        new = new / by if by != 1 else new
        new = new.flatten(0, 1) if flat else new
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def on_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        shape[:] = hidden.shape[:2]

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        new = see(_checked(hidden, site))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    path = anatomy.block_path(0) if site == EMBEDDING else anatomy.module_path(site)
    module = module_at(model.model, path)
    if site == EMBEDDING:
        handles = [module.register_forward_pre_hook(on_input, with_kwargs=True)]
    else:
        handles = [module.register_forward_hook(on_output)]
    if flat:
        block = module_at(model.model, anatomy.block_path(site.layer))
        handles.append(block.register_forward_pre_hook(on_block, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_site(site: object) -> None:
    """Raise UserError for what is no site, such as a name of one."""
    if isinstance(site, Site):
        return
    kind, _, layer = site.partition(".") if isinstance(site, str) else ("", "", "")
    meant = kind in get_args(Kind) and layer.removeprefix("-").isdecimal()
    instead = f"Site({kind!r}, {int(layer)})" if meant else 'one such as Site("resid", 4)'
    raise UserError(f"{site!r} is a {type(site).__name__} and no site: use {instead}")


def _checked(hidden: Any, site: Site) -> Tensor:
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UserError(f"{site} is {found} and not a (batch, tokens, hidden) tensor: mend KNOWN in lm/anatomy.py")
    return hidden


def _grid(
    hidden: Tensor, site: Site, rows: Selection, positions: Selection, *, unique: bool = False
) -> tuple[Tensor, Tensor]:
    """Indices that select every row with every position from `(batch, tokens, hidden)`."""
    row = _indices(rows, hidden.shape[0], "row", site, unique=unique).to(hidden.device)
    position = _indices(positions, hidden.shape[1], "position", site, unique=unique).to(hidden.device)
    return row[:, None], position[None, :]


def _indices(selection: Selection, size: int, name: str, site: Site, *, unique: bool) -> Tensor:
    holds = f"{site} holds {name}s 0 to {size - 1}"
    if selection is None:
        return torch.arange(size)
    if isinstance(selection, slice):
        for bound, limit in ((selection.start, size - 1), (selection.stop, size)):
            if bound is not None and not -size <= bound <= limit:
                raise UserError(f"{name} slice {selection.start}:{selection.stop} goes past the end: {holds}")
        chosen = list(range(size)[selection])
    else:
        chosen = [int(index) for index in selection]
        for index in chosen:
            if not -size <= index < size:
                raise UserError(f"{name} {index} is not there: {holds}")
        chosen = [index % size for index in chosen]
    if not chosen:
        raise UserError(f"the {name} selection {selection} is empty: {holds}, name at least one")
    if unique and len(set(chosen)) < len(chosen):
        raise UserError(f"the {name} selection {selection} names one twice: {holds}, name each once")
    return torch.tensor(chosen)


def _new_value(edit: Edit, old: Tensor) -> Tensor:
    new = edit.value(old.clone()) if callable(edit.value) else edit.value
    if not isinstance(new, Tensor):
        raise UserError(f"the edit of {edit.site} gave {type(new).__name__}: its value must be, or return, a tensor")
    try:
        return new.to(device=old.device, dtype=old.dtype).expand(old.shape)
    except RuntimeError:
        raise UserError(
            f"the edit of {edit.site} has a value of shape {tuple(new.shape)}: it must broadcast to "
            f"(rows, positions, hidden) = {tuple(old.shape)}"
        ) from None


def _require_reached(missing: Sequence[Site], verb: str) -> None:
    if missing:
        names = ", ".join(str(site) for site in missing)
        raise UserError(
            f"no forward pass reached {names}, so nothing was {verb} there: run the model inside the context"
        )
