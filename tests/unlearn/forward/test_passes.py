"""What a pass gives, against the plain way: the whole batch's logits, and a copy of the model as the reference."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from lm.anatomy import Site
from lm.devices import accelerator
from lm.forward.hooks import capture
from lm.model import LanguageModel
from lm.prompts import Encoded
from tests.unlearn.helpers import Casts
from unlearn.forward import chunked_head
from unlearn.forward.passes import Inputs, Passes, collate
from unlearn.forward.recomputing import recompute_activations
from unlearn.forward.reference_model import reference
from unlearn.objectives import HiddenNeed, Needs, Statistic, TokenStats
from unlearn.objectives.retain import DIVERGENCE
from unlearn.scope import lora
from unlearn.scope.scope import Lora, Scope

CPU = torch.device("cpu")
ROWS = [Encoded([5, 9, 31, 7, 8, 40], 2), Encoded([11, 12, 13], 1), Encoded([99, 98, 97, 96], 3)]
OTHERS = [Encoded([5, 9, 60, 61], 2), Encoded([11, 70, 71, 72, 73], 1), Encoded([99, 98, 97, 80], 3)]
ENTROPY = Statistic("entropy", lambda logits, *_: -(log_softmax(logits, -1).exp() * log_softmax(logits, -1)).sum(-1))
ALL = Needs(
    reference_logprob=True, statistics=(DIVERGENCE, ENTROPY), hidden=HiddenNeed(1, reference=True), alternate=True
)


@pytest.fixture(autouse=True)
def _three_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn.forward.passes.chunk_tokens", lambda *_, **__: 3)


def plain(model: LanguageModel, other: LanguageModel, rows: list[Encoded]) -> TokenStats:
    """Everything in `ALL`, of rows alone, from whole logits and a second model."""
    inputs = collate(rows, 0, CPU)

    def run(one: LanguageModel) -> tuple[Tensor, Tensor]:
        with capture(one, [Site("resid", 1)], detach=False) as seen:
            logits = one.model(input_ids=inputs.ids, attention_mask=inputs.attention, use_cache=False).logits
        return logits[:, :-1][inputs.mask].float(), seen[Site("resid", 1)]

    def placed(values: Tensor) -> Tensor:
        return torch.zeros(inputs.mask.shape).masked_scatter(inputs.mask, values)

    ours, hidden = run(model)
    with torch.no_grad():
        theirs, reference_hidden = run(other)
    targets = inputs.targets[inputs.mask]
    return TokenStats(
        logprob=placed(-cross_entropy(ours, targets, reduction="none")),
        mask=inputs.mask,
        reference_logprob=placed(-cross_entropy(theirs, targets, reduction="none")),
        values={one.name: placed(one.function(ours, targets, theirs)) for one in (DIVERGENCE, ENTROPY)},
        hidden=hidden,
        reference_hidden=reference_hidden,
        hidden_mask=inputs.attention.bool(),
    )


def number(stats: TokenStats) -> Tensor:
    """One number that depends, not linearly, on everything a pass gave."""
    assert stats.reference_logprob is not None
    assert stats.hidden is not None
    assert stats.reference_hidden is not None
    assert stats.hidden_mask is not None
    margin = stats.row_logprob() - (stats.reference_logprob * stats.mask).sum(dim=1)
    apart = (stats.hidden.float() - stats.reference_hidden.float()).square().mean(-1).where(stats.hidden_mask, 0.0)
    total = torch.tanh(0.1 * margin).sum() + apart.sum()
    total = total + stats.total(stats.values["divergence"]).square() + stats.total(stats.values["entropy"])
    return total if stats.alternate is None else total + 0.5 * number(stats.alternate)


def disturb(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.03)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: LanguageModel, *, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """Disturb what is trainable, then a pass against the plain way: number and gradient."""
    original = copy.deepcopy(model)
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=reference(model.model))
    disturb(model.model)
    stats = passes.stats([*ROWS, *OTHERS], ALL, alternates=3)
    dense = replace(plain(model, original, ROWS), alternate=plain(model, original, OTHERS))
    torch.testing.assert_close(number(stats), number(dense), rtol=rtol, atol=atol)
    assert float(number(dense).detach()) > 0.01, "the disturbance shows"
    got, wanted = gradients(model.model, number(stats)), gradients(model.model, number(dense))
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        if scale < 1e-5:  # rounding alone: softmax does not see a bias of the keys (OPT)
            assert float(got[name].abs().max()) < 1e-5, name
            continue
        torch.testing.assert_close(
            got[name] / scale, gradient / scale, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scope", [Scope(layers=(0, 1)), Scope(layers="model")], ids=["frozen-head", "head-learns"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_is_the_plain_way_in_every_family(family: str, scope: Scope) -> None:
    model = tiny(family)
    scope.resolve(model.anatomy).apply(model.model, model.anatomy)
    compare(model)


@pytest.mark.parametrize("scope", [Scope(layers=(0, 1)), Scope(layers="model")], ids=["blocks", "and-head"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_switched_off_for_the_original(family: str, scope: Scope) -> None:
    model = tiny(family)
    lora.inject(model.model, model.anatomy, scope.resolve(model.anatomy), Lora(rank=2), seed=0)
    compare(model)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
@pytest.mark.parametrize("scope", [Scope(layers=(1,)), Scope(layers="model")], ids=["frozen-head", "head-learns"])
def test_gradient_checkpointing_changes_nothing(family: str, scope: Scope) -> None:
    model = tiny(family)
    scope.resolve(model.anatomy).apply(model.model, model.anatomy)
    recompute_activations(model.model)
    compare(model)


@pytest.mark.parametrize("scope", [Scope(layers=(0, 1)), Scope(layers="model")], ids=["frozen-head", "head-learns"])
def test_low_precision_gives_float32_numbers(scope: Scope) -> None:
    model = tiny("olmo2", dtype=torch.bfloat16)
    scope.resolve(model.anatomy).apply(model.model, model.anatomy)
    compare(model, rtol=0.1, atol=0.1)
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=reference(model.model))
    stats = passes.stats([*ROWS, *OTHERS], ALL, alternates=3)
    assert {t.dtype for t in (stats.logprob, stats.reference_logprob, *stats.values.values())} == {torch.float32}


def test_no_more_than_a_chunk_of_logits_ever_exists() -> None:
    model = tiny("olmo")
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.ndim and found.shape[-1] == model.anatomy.vocabulary:
                largest = max(largest, found.numel() // model.anatomy.vocabulary)
            return found

    passes = Passes(Accelerator(cpu=True), model.model, model, reference=reference(model.model))
    with Watch():
        number(passes.stats([*ROWS, *OTHERS], ALL, alternates=3)).backward()
    assert largest == 3


@pytest.mark.parametrize("scope", [Scope(layers=(0, 1)), Scope(layers="model")], ids=["frozen-head", "head-learns"])
@pytest.mark.parametrize("family", ["olmo", "gpt_neox", "gemma2"])
def test_a_frozen_head_is_made_small_once_a_pass(family: str, scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every number is the one that autocast gives by itself, chunk after chunk. A head that learns is left alone."""
    needs = Needs(reference_logprob=True, statistics=(DIVERGENCE,))

    def step() -> tuple[int, list[Tensor]]:
        model = tiny(family)
        scope.resolve(model.anatomy).apply(model.model, model.anatomy)
        acc = accelerator(mixed_precision="bf16", cpu=True)
        passes = Passes(acc, model.model, model, reference=reference(model.model))
        disturb(model.model)
        shape = model.model.get_submodule(model.anatomy.head).get_parameter("weight").shape
        with Casts(shape) as casts:
            stats = passes.stats([*ROWS, *OTHERS], needs)
            found = gradients(model.model, stats.logprob.sum() + stats.values["divergence"].sum())
        assert stats.reference_logprob is not None
        return casts.count, [stats.logprob, stats.reference_logprob, *stats.values.values(), *found.values()]

    try:
        once, mine = step()
        monkeypatch.setattr("unlearn.forward.passes._autocast_weights", lambda _: {})
        each, plainly = step()
    finally:
        accelerator(cpu=True)  # else the tests to come would be under autocast too
    assert each > 10
    assert once == 2 if scope.layers != "model" else once < each, ("a pass of the original, and one", once, each)
    assert len(mine) == len(plainly) > 5
    assert all(torch.equal(one, two) for one, two in zip(mine, plainly, strict=True))


@pytest.mark.parametrize("learns", [True, False])
def test_chunks_of_any_size_give_the_same(learns: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 6, generator=draw, dtype=torch.float64).requires_grad_(learns)
    hidden = torch.randn(10, 6, generator=draw, dtype=torch.float64).requires_grad_()

    def measure(part: Tensor, span: slice) -> tuple[Tensor, ...]:
        logits = part @ weight.T
        return logits.logsumexp(-1), logits[:, 3] ** 2, (logits[:, 0] > 0).double()

    results = []
    for size in (1, 4, 100):
        values = chunked_head.in_chunks(measure, hidden, size=size, head_learns=learns)
        hidden.grad = weight.grad = None
        (values[0].exp().sum() + (values[1] * values[2]).sum()).backward()
        results.append((values[0].detach(), hidden.grad, weight.grad if learns else torch.zeros(())))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two)


def count_blocks(model: LanguageModel) -> list[int]:
    ran: list[int] = []
    blocks = model.model.get_submodule(model.anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
    return ran


@pytest.mark.parametrize("tokens", ["all", "answer"])
@pytest.mark.parametrize("family", ["olmo", "gpt2", "gemma3_text"])
def test_hidden_states_alone_run_no_block_above_their_layer_and_no_head(family: str, tokens: str) -> None:
    model = tiny(family)
    needs = Needs(logprob=False, hidden=HiddenNeed(1, tokens=tokens, reference=True))  # type: ignore[arg-type]
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=reference(model.model))
    whole = plain(model, model, ROWS)
    ran = count_blocks(model)
    heads: list[int] = []
    model.model.get_submodule(model.anatomy.norm).register_forward_pre_hook(lambda *_: heads.append(1))
    stats = passes.stats(ROWS, needs)
    assert (ran, heads) == ([0, 1, 0, 1], []), "the original's pass, then the model's own"
    assert stats.hidden is not None
    assert stats.hidden_mask is not None
    assert whole.hidden_mask is not None
    torch.testing.assert_close(stats.hidden, whole.hidden)
    torch.testing.assert_close(stats.reference_hidden, whole.reference_hidden)
    wanted = [len(row.ids) - (row.answer_start if tokens == "answer" else 0) for row in ROWS]
    assert stats.hidden_mask.sum(1).tolist() == wanted
    assert torch.equal(stats.hidden_mask, stats.hidden_mask & whole.hidden_mask)
    assert float(stats.logprob.abs().sum()) == 0.0


def test_log_probabilities_known_beforehand_are_not_asked_for_again() -> None:
    model = tiny("llama")
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=reference(model.model))
    needs = Needs(reference_logprob=True, alternate=True)
    live = passes.stats([*ROWS, *OTHERS], needs, alternates=3)
    known = passes.logprobs([*ROWS, *OTHERS])
    assert [len(one) for one in known] == [len(row.ids) - row.answer_start for row in [*ROWS, *OTHERS]]
    ran = count_blocks(model)
    alone = Passes(Accelerator(cpu=True), model.model, model).stats(
        [*ROWS, *OTHERS], needs, alternates=3, originals=known
    )
    assert ran == [0, 1, 2], "one pass, and no way back to the original"
    for one, two in ((alone, live), (alone.alternate, live.alternate)):
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one.reference_logprob, two.reference_logprob)
        torch.testing.assert_close(one.reference_logprob, one.logprob)


@pytest.mark.parametrize("needs", [ALL, Needs(logprob=False, hidden=HiddenNeed(1))], ids=["all", "hidden"])
@pytest.mark.parametrize("learns", [True, False])
def test_no_rows_give_zero_and_a_gradient_of_zero_everywhere(needs: Needs, learns: bool) -> None:
    """On several processes every one must run a backward pass and hand in the gradient of every parameter."""
    model = tiny("olmo")
    Scope(layers="model" if learns else (0, 1)).resolve(model.anatomy).apply(model.model, model.anatomy)
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=reference(model.model))
    stats = passes.stats([], needs)
    assert stats.tokens == 0
    total = number(stats) if needs is ALL else stats.hidden.where(stats.hidden_mask[..., None], 0.0).sum()  # type: ignore
    assert float(total.detach()) == 0.0
    found = gradients(model.model, total)
    unread = passes.unread(needs)
    for name, parameter in model.model.named_parameters():
        assert (name in found) == (parameter.requires_grad and not any(parameter is one for one in unread)), name
    assert all(float(gradient.abs().max()) == 0.0 for gradient in found.values())


def test_inputs_know_whether_anything_is_supervised() -> None:
    assert isinstance(collate(ROWS, 0, CPU), Inputs)
    assert collate(ROWS, 0, CPU).supervised
    assert not collate([], 0, CPU).supervised
    assert not collate([Encoded([5, 6], 2)], 0, CPU).supervised
