"""Capturing and editing: against independent readings of the same model, and loud when nothing happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, HIDDEN, ids, tiny
from torch import nn

from lm import EMBEDDING, Edit, LanguageModel, Site, UserError, capture, patch

RESID, MLP, ATTN = Site("resid", 1), Site("mlp", 1), Site("attn", 1)


@pytest.fixture
def model() -> LanguageModel:
    return tiny("llama")


def run(model: LanguageModel, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.model(ids() if tokens is None else tokens).logits


def hooks_left(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


# --- capture ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_agrees_with_output_hidden_states(family: str) -> None:
    model = tiny(family)
    sites = [EMBEDDING, *model.anatomy.sites("resid")]
    with capture(model, sites) as seen, torch.no_grad():
        states = model.model(ids(), output_hidden_states=True).hidden_states
    for site, state in zip(sites[:-1], states[:-1], strict=True):
        assert torch.equal(seen[site], state), site
    last = model.model.get_submodule(model.anatomy.norm)(seen[sites[-1]])  # transformers shows it after the final norm
    torch.testing.assert_close(last.detach(), states[-1])


def test_capture_keeps_rows_and_positions(model: LanguageModel) -> None:
    tokens = ids(batch=3)
    with capture(model, [MLP]) as whole:
        run(model, tokens)
    for rows, positions in (([2, 0], [1, -1]), (slice(1, None), slice(0, 4)), (None, [3]), ([0], None)):
        with capture(model, [MLP], rows=rows, positions=positions) as part:
            run(model, tokens)
        expected = whole[MLP][slice(None) if rows is None else rows]
        assert torch.equal(part[MLP], expected[:, slice(None) if positions is None else positions])


def test_capture_keeps_the_last_forward(model: LanguageModel) -> None:
    with capture(model, [MLP]) as seen:
        run(model, ids(seed=1))
        first = seen[MLP]
        run(model, ids(seed=2))
        second = seen[MLP]
    with capture(model, [MLP]) as again:
        run(model, ids(seed=2))
    assert not torch.equal(first, second)
    assert torch.equal(seen[MLP], second)
    assert torch.equal(again[MLP], second)


@pytest.mark.parametrize("detach", [True, False])
def test_what_was_captured_stays_when_the_model_adds_to_it_in_place(detach: bool) -> None:
    """Falcon adds attention to the MLP's output in its own memory."""
    model = tiny("falcon")
    site, said = Site("mlp", 1), []
    module = model.model.get_submodule("transformer.h.1.mlp")
    hook = module.register_forward_hook(lambda module, inputs, output: said.append(output.detach().clone()))
    with capture(model, [site], detach=detach) as seen:
        model.model(ids())
    hook.remove()
    assert torch.equal(seen[site].detach(), said[0])
    with capture(model, [site], rows=[0]) as part:
        model.model(ids())
    assert torch.equal(part[site], said[0][:1])


def test_capture_keeps_the_graph_only_when_asked(model: LanguageModel) -> None:
    with capture(model, [MLP]) as seen:
        model.model(ids())
    assert not seen[MLP].requires_grad
    with capture(model, [MLP, RESID], detach=False) as seen:
        model.model(ids())
    (gradient,) = torch.autograd.grad(seen[RESID].sum(), seen[MLP])
    assert torch.equal(gradient, torch.ones_like(gradient))  # resid = before + attn + mlp


def test_a_site_named_twice_is_captured_once(model: LanguageModel) -> None:
    with capture(model, [MLP, MLP]) as seen:
        assert hooks_left(model) == 1
        run(model)
    assert seen.sites == (MLP,)


def test_capture_is_loud(model: LanguageModel) -> None:
    says = "no forward pass reached mlp at layer 1, the embedding, so nothing was captured there"
    with pytest.raises(UserError, match=says), capture(model, [MLP, EMBEDDING]):
        pass
    with capture(model, [MLP]) as seen:
        assert MLP not in seen
        with pytest.raises(UserError, match="mlp at layer 1 was not reached"):
            seen[MLP]
        run(model)
        with pytest.raises(UserError, match="attn at layer 1 was not captured"):
            seen[ATTN]
    with pytest.raises(UserError, match="layer 7 does not exist"), capture(model, [MLP, Site("mlp", 7)]):
        pass
    assert hooks_left(model) == 0


def test_a_name_in_the_place_of_a_site_is_answered_with_the_site(model: LanguageModel) -> None:
    says = r"'resid.4' is a str and no site: use Site\('resid', 4\)"
    with capture(model, [RESID]) as seen:
        run(model)
    for wrong in (lambda: seen["resid.4"], lambda: "resid.4" in seen):  # type: ignore[index, operator]
        with pytest.raises(UserError, match=says):
            wrong()
    with pytest.raises(UserError, match=says), capture(model, ["resid.4"]):  # type: ignore[list-item]
        run(model)
    with pytest.raises(UserError, match=r"7 is a int and no site: use one such as"):
        seen[7]  # type: ignore[index]


def test_part_of_the_model_reached_is_not_enough(model: LanguageModel) -> None:
    """Only the blocks that ran were reached: here the first one, called on its own."""
    block = model.model.get_submodule("model.layers.0")
    position = model.model.get_submodule("model.rotary_emb")(torch.zeros(1, 7, HIDDEN), torch.arange(7)[None])
    with pytest.raises(UserError, match="reached attn at layer 1, so"), capture(model, [Site("attn", 0), ATTN]):
        block(torch.zeros(1, 7, HIDDEN), position_embeddings=position)


@pytest.mark.parametrize(
    "context",
    [
        lambda model: capture(model, [MLP]),
        lambda model: patch(model, [Edit(site=MLP, value=torch.zeros(()))]),
    ],
    ids=["capture", "patch"],
)
def test_an_exception_passes_through_unmasked(model: LanguageModel, context: Callable[[LanguageModel], Any]) -> None:
    with pytest.raises(ZeroDivisionError), context(model):
        raise ZeroDivisionError
    assert hooks_left(model) == 0


# --- patch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", [MLP, ATTN, RESID, EMBEDDING], ids=str)
def test_an_edit_changes_what_it_names_and_nothing_else(family: str, site: Site) -> None:
    model = tiny(family)
    with capture(model, [site]) as before:
        clean = run(model)
    value = torch.randn(1, 2, HIDDEN, generator=torch.Generator().manual_seed(5))
    with patch(model, [Edit(site=site, value=value, rows=[1], positions=[2, -1])]), capture(model, [site]) as after:
        edited = run(model)
    torch.testing.assert_close(
        after[site][1, [2, -1]], value[0], rtol=1e-6, atol=0
    )  # Granite's is divided, and multiplied
    kept = torch.ones(2, 7, dtype=torch.bool)
    kept[1, [2, -1]] = False
    assert torch.equal(after[site][kept], before[site][kept])
    # Experts may add up in another order once a token is routed elsewhere, so these are equal to rounding only.
    torch.testing.assert_close(edited[0], clean[0])  # the other row
    torch.testing.assert_close(edited[1, :2], clean[1, :2])  # causal: what stands before is untouched
    assert not torch.allclose(edited[1, 2], clean[1, 2], atol=1e-3)
    assert hooks_left(model) == 0
    assert torch.equal(run(model), clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_a_stream_restores_what_follows(family: str) -> None:
    """Causal tracing's two ends: restore everything and the run is clean, restore nothing and it stays corrupted."""
    model = tiny(family)
    noise = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(3))
    corrupt = Edit(site=EMBEDDING, value=lambda clean: clean + noise, positions=[1, 2, 3])
    stream = model.anatomy.sites("resid")
    with capture(model, stream) as seen:
        clean = run(model)
    with patch(model, [corrupt]):
        corrupted = run(model)
    assert not torch.allclose(corrupted, clean, atol=1e-2)
    for site in stream:
        with patch(model, [corrupt, Edit(site=site, value=seen[site])]):
            torch.testing.assert_close(run(model), clean, rtol=1e-6, atol=1e-6)
        with patch(model, [corrupt, Edit(site=site, value=seen[site][:, :1], positions=[0])], allow_unchanged=True):
            torch.testing.assert_close(run(model), corrupted, rtol=1e-6, atol=1e-6)


def test_editing_the_embedding_is_editing_the_input(model: LanguageModel) -> None:
    embeddings = model.model.get_input_embeddings()(ids()).detach()
    embeddings[:, 3] += 1.5
    with torch.no_grad():
        expected = model.model(inputs_embeds=embeddings).logits
    with patch(model, [Edit(site=EMBEDDING, value=lambda old: old + 1.5, positions=[3])]):
        assert torch.equal(run(model), expected)


def test_a_zeroed_contribution_is_a_removed_module(model: LanguageModel) -> None:
    for site, weight in ((MLP, "mlp.down_proj"), (ATTN, "self_attn.o_proj")):
        with patch(model, [Edit(site=site, value=torch.zeros(()))]):
            edited = run(model)
        without = tiny("llama")
        with torch.no_grad():
            without.model.get_submodule(f"model.layers.1.{weight}").weight.zero_()
        assert torch.equal(edited, run(without))


def test_several_edits_at_once_and_in_order(model: LanguageModel) -> None:
    edits = [
        Edit(site=MLP, value=torch.zeros(()), positions=slice(0, 3)),
        Edit(site=ATTN, value=torch.full((HIDDEN,), 2.0), rows=slice(0, 1)),
        Edit(site=MLP, value=lambda old: old + 1.0, positions=[2]),
    ]
    with patch(model, edits), capture(model, [MLP, ATTN]) as seen:
        run(model)
    assert (seen[MLP][:, :2] == 0).all()
    assert (seen[MLP][:, 2] == 1).all()
    assert (seen[ATTN][0] == 2).all()
    assert not (seen[ATTN][1] == 2).any()


def test_capture_inside_patch_sees_the_edit_and_outside_it_does_not(model: LanguageModel) -> None:
    with capture(model, [EMBEDDING, MLP, RESID]) as plain:
        run(model)
    for site in (EMBEDDING, MLP):
        edit = Edit(site=site, value=torch.zeros(()))
        with patch(model, [edit]), capture(model, [site, RESID]) as inside:
            run(model)
        with capture(model, [site, RESID]) as outside, patch(model, [edit]):
            run(model)
        assert (inside[site] == 0).all()
        assert torch.equal(outside[site], plain[site])  # and was not written to in place
        assert torch.equal(inside[RESID], outside[RESID])
        assert not torch.equal(inside[RESID], plain[RESID])


def test_a_function_gets_a_copy_of_what_it_replaces(model: LanguageModel) -> None:
    shapes = []

    def in_place(values: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(values.shape))
        return values.zero_()

    with patch(model, [Edit(site=MLP, value=in_place, rows=[1], positions=[0, 4])]), capture(model, [MLP]) as seen:
        run(model)
    assert shapes == [(1, 2, HIDDEN)]
    assert (seen[MLP][1, [0, 4]] == 0).all()
    assert (seen[MLP][0] != 0).any()


def test_gradients_reach_the_value(model: LanguageModel) -> None:
    value = torch.zeros(HIDDEN, requires_grad=True)
    with patch(model, [Edit(site=MLP, value=value, positions=[2])]), capture(model, [RESID], detach=False) as seen:
        model.model(ids())
    seen[RESID].sum().backward()
    assert torch.equal(value.grad, torch.full((HIDDEN,), 2.0))  # two rows


def test_values_are_cast_to_the_model() -> None:
    model = tiny("olmo2", dtype=torch.bfloat16)
    with patch(model, [Edit(site=MLP, value=torch.full((HIDDEN,), 0.1))]), capture(model, [MLP]) as seen:
        run(model)
    assert seen[MLP].dtype == torch.bfloat16
    assert (seen[MLP] == torch.tensor(0.1, dtype=torch.bfloat16)).all()


def test_an_edit_that_changes_nothing_raises(model: LanguageModel) -> None:
    with capture(model, [MLP]) as seen:
        clean = run(model)
    same = Edit(site=MLP, value=seen[MLP])
    with pytest.raises(UserError, match="the edit of mlp at layer 1 changed nothing"), patch(model, [same]):
        run(model)
    other = Edit(site=RESID, value=torch.zeros(()))
    with pytest.raises(UserError, match="the edit of mlp at layer 1 changed nothing"), patch(model, [same, other]):
        run(model)
    with patch(model, [same], allow_unchanged=True):
        assert torch.equal(run(model), clean)
    with patch(model, [same]):  # it does change the second run
        run(model)
        run(model, ids(seed=9))
    assert hooks_left(model) == 0


def test_an_edit_that_was_never_reached_raises(model: LanguageModel) -> None:
    edits = [Edit(site=MLP, value=torch.zeros(())), Edit(site=EMBEDDING, value=torch.zeros(()))]
    says = "no forward pass reached mlp at layer 1, the embedding, so nothing was edited there"
    for allow in (False, True):
        with pytest.raises(UserError, match=says), patch(model, edits, allow_unchanged=allow):
            pass


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"positions": [0, 7]}, "position 7 is not there: mlp at layer 1 holds positions 0 to 6"),
        ({"positions": [-8]}, "position -8 is not there"),
        ({"positions": slice(5, 8)}, "position slice 5:8 goes past the end: mlp at layer 1 holds positions 0 to 6"),
        ({"positions": slice(7, None)}, "position slice 7:None goes past the end"),
        ({"positions": slice(3, 3)}, "position selection .* is empty"),
        ({"positions": []}, "position selection .* is empty"),
        ({"positions": [1, -6]}, "position selection .* names one twice"),
        ({"rows": [2]}, "row 2 is not there: mlp at layer 1 holds rows 0 to 1"),
        ({"rows": slice(0, 3)}, "row slice 0:3 goes past the end"),
        ({"value": torch.zeros(3, HIDDEN)}, r"value of shape \(3, 32\): it must broadcast .* = \(2, 7, 32\)"),
        ({"value": torch.zeros(HIDDEN + 1)}, r"value of shape \(33,\)"),
        ({"value": torch.zeros(1, 2, 7, HIDDEN)}, r"value of shape \(1, 2, 7, 32\)"),
        ({"value": lambda _: None}, "gave NoneType: its value must be, or return, a tensor"),
        ({"site": Site("mlp", 3)}, "layer 3 does not exist"),
        ({"site": Site("attn", -1)}, "layer -1 does not exist"),
    ],
)
def test_impossible_edits_are_refused(model: LanguageModel, edit: dict[str, Any], says: str) -> None:
    whole = Edit(**{"site": MLP, "value": torch.zeros(()), **edit})
    with pytest.raises(UserError, match=says), patch(model, [whole]):
        run(model)
    assert hooks_left(model) == 0


def test_capture_refuses_positions_that_do_not_exist(model: LanguageModel) -> None:
    with pytest.raises(UserError, match="position 9 is not there"), capture(model, [MLP], positions=[9]):
        run(model)
    assert hooks_left(model) == 0


# --- what modules may take and give ----------------------------------------------------------------------------------


class OldBlock(nn.Module):
    """A block as transformers 4 wrote them: tuples everywhere, its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Tupled(), Tupled()

    def forward(self, *, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        hidden_states = hidden_states + self.self_attn(hidden_states)[0]
        hidden_states = hidden_states + self.mlp(hidden_states)[0]
        return hidden_states, "cache"


class Tupled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:  # type: ignore[override]
        return super().forward(hidden), "weights"


class OldModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(OldBlock() for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.model.layers:
            hidden, rest = block(hidden_states=hidden)
            assert rest == "cache"
        return hidden


def test_tuples_and_keywords_are_handled(model: LanguageModel) -> None:
    old = replace(model, model=OldModel())  # type: ignore[arg-type]
    hidden = torch.randn(2, 7, HIDDEN)
    with capture(old, [EMBEDDING, *old.anatomy.sites()]) as seen, torch.no_grad():
        end = old.model(hidden)
    assert torch.equal(seen[EMBEDDING], hidden)
    assert torch.equal(seen[Site("resid", 2)], end)
    total = seen[Site("resid", 0)] + seen[ATTN] + seen[MLP]
    torch.testing.assert_close(seen[RESID], total)
    for site in (EMBEDDING, RESID, MLP, ATTN):
        with patch(old, [Edit(site=site, value=torch.ones(()), positions=[3])]), torch.no_grad():
            edited = old.model(hidden)
        assert not torch.equal(edited[:, 3], end[:, 3])
        assert torch.equal(edited[:, :3], end[:, :3])


def test_a_site_that_is_not_a_stream_is_refused(model: LanguageModel) -> None:
    parts = tuple(
        replace(each, mlp_out="self_attn.o_proj", attn_out="self_attn.q_proj") for each in model.anatomy.parts
    )
    odd = replace(model, anatomy=replace(model.anatomy, parts=parts))
    model.model.get_submodule("model.layers.1.self_attn.o_proj").register_forward_hook(lambda *args: args[2][0])
    says = r"mlp at layer 1 is \(7, 32\) and not a \(batch, tokens, hidden\) tensor"
    with pytest.raises(UserError, match=says), capture(odd, [MLP]):
        run(odd)
