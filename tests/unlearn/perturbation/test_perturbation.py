"""Perturbations beside formulas by hand: which weights move, how far, towards what; and what the trainer then sees."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lm.config import dump_yaml, parse_config
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, small_config
from unlearn.config import UnlearnConfig
from unlearn.objectives import GradientAscent, KLMinimization
from unlearn.perturbation import (
    Noise,
    NoPerturbation,
    Part,
    Perturbation,
    Reinitialize,
    TowardsCheckpoint,
    check_perturbation,
    perturb,
)
from unlearn.scope.scope import Lora, Scope, WeightMask
from unlearn.stage import run_unlearn
from unlearn.training.side import encode_rows


@pytest.fixture
def model(tiny: Path) -> LanguageModel:
    return load(str(tiny / "model"), device="cpu")


def values(model: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}


def drawn(seed: int, name: str, shape: torch.Size) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))


def test_noise_is_the_formula_in_the_first_part_that_holds_a_weight(model: LanguageModel) -> None:
    before = values(model)
    parts = (Part(share=0.9, layers=(1,), modules=("mlp",)), Part(share=0.25, layers=(1, 2), modules=("all",)))
    moved = perturb(model, Noise(scale=0.05, parts=parts), seed=7)
    for name, now in values(model).items():
        share = 0.9 if ".1.mlp." in name else 0.25 if ".layers.1." in name or ".layers.2." in name else 0.0
        wanted = (1 - share) * before[name] + share * 0.05 * drawn(7, name, now.shape) if share else before[name]
        torch.testing.assert_close(now, wanted, rtol=1e-5, atol=1e-7)
        assert share or torch.equal(now, before[name])
    assert [each.place for each in moved] == ["layer 1", "layer 2"]
    names = [name for name in before if ".layers.2." in name]
    old, new = (torch.cat([which[name].flatten() for name in names]).double() for which in (before, values(model)))
    assert moved[1].weights == len(old)
    assert moved[1].share == pytest.approx(0.25)
    assert moved[1].kept == pytest.approx(float(old @ new / (old @ old)), rel=1e-6)
    assert moved[1].norm == pytest.approx(float(new.norm() / old.norm()), rel=1e-6)


def test_rows_of_tokens_that_healing_never_shows(model: LanguageModel) -> None:
    before = values(model)
    parts = (Part(share=1.0, also=("embeddings",), unhealed=True), Part(share=0.25, also=("embeddings",)))
    moved = perturb(model, Noise(scale=0.05, parts=parts), seed=7, healed={3, 5, 8})
    name = "model.embed_tokens.weight"
    share = torch.ones(len(before[name]), 1)
    share[[3, 5, 8]] = 0.25
    wanted = (1 - share) * before[name] + share * 0.05 * drawn(7, name, before[name].shape)
    torch.testing.assert_close(values(model)[name], wanted, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(now, before[other]) for other, now in values(model).items() if other != name)
    assert moved[0].share == pytest.approx(float(share.mean()))
    model.model.load_state_dict(before, strict=False)
    alone = perturb(model, Noise(parts=parts[:1]), seed=7, healed={3, 5, 8})
    assert alone[0].weights == before[name].numel() - 3 * before[name].shape[1]
    assert torch.equal(values(model)[name][[3, 5, 8]], before[name][[3, 5, 8]])


def test_the_noise_of_a_weight_depends_on_seed_and_name_alone(model: LanguageModel) -> None:
    other = replace(model, model=copy.deepcopy(model.model))
    perturb(model, Noise(seed=3), seed=0)
    perturb(other, Noise(seed=3, parts=(Part(layers=(2,)),)), seed=99)
    alike = {name: torch.equal(one, values(other)[name]) for name, one in values(model).items()}
    assert alike == {name: ".2.mlp." in name for name in alike}


def test_the_scale_is_the_initializers_unless_given(model: LanguageModel) -> None:
    before = values(model)
    perturb(model, Noise(parts=(Part(share=1.0),)), seed=0)
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(values(model)[name], 0.02 * drawn(0, name, before[name].shape))
    perturb(model, Noise(scale=0.0, parts=(Part(share=1.0),)), seed=0)
    assert all(not value.any() for value in values(model).values())


def test_towards_a_checkpoint(model: LanguageModel, tmp_path: Path) -> None:
    before = values(model)
    earlier = copy.deepcopy(model.model)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.add_(torch.ones_like(parameter))
    earlier.save_pretrained(tmp_path / "earlier")
    model.tokenizer.save_pretrained(tmp_path / "earlier")
    perturb(model, TowardsCheckpoint(path=str(tmp_path / "earlier"), parts=(Part(share=0.3, layers="all"),)), seed=0)
    for name, now in values(model).items():
        torch.testing.assert_close(now, before[name] + (0.3 if ".mlp." in name else 0.0))
    with pytest.raises(UserError, match="has one of shape"):
        perturb(model, TowardsCheckpoint(path="builtin"), seed=0)


def test_reinitialized_as_the_architecture_does_and_nothing_else_is_drawn(model: LanguageModel) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    perturb(model, Reinitialize(), seed=5)
    torch.testing.assert_close(torch.rand(3), expected)
    torch.manual_seed(5)
    fresh = dict(type(model.model)(model.model.config).named_parameters())
    assert all(torch.equal(value, fresh[name]) for name, value in values(model).items())


@pytest.mark.parametrize(
    ("part", "moves"),
    [
        (Part(), lambda name: "norm" not in name),
        (Part(layers="model", also=("norms",)), lambda name: True),
        (Part(also=("embeddings",)), lambda name: "embed_tokens" in name),
        (Part(also=("head", "norms")), lambda name: "lm_head" in name or "norm" in name),
        (Part(layers="all", modules=("attn",)), lambda name: "self_attn" in name),
        (Part(layers=(1,), modules=("all",)), lambda name: ".1." in name and "norm" not in name),
        (Part(modules=("mlp",)), lambda name: ".mlp." in name),
        (Part(modules=("attn",), also=("embeddings",)), lambda name: "self_attn" in name or "embed_tokens" in name),
        (Part(layers=(0,), also=("embeddings",)), lambda name: ".0.mlp." in name or "embed_tokens" in name),
    ],
)
def test_which_weights_a_part_holds(part: Part, moves: object) -> None:
    model = families.tiny("llama", tie_word_embeddings=False)
    before = values(model)
    perturb(model, Noise(parts=(part,)), seed=0)
    for name, now in values(model).items():
        assert torch.equal(now, before[name]) != moves(name), name  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Part(share=0.0), "share is 0.0"),
        (lambda: Part(share=1.5), "share is 1.5"),
        (lambda: Part(layers=(1,), plan="plan.json"), "both name layers"),
        (lambda: Part(also=("norms", "norms")), "name each once"),
        (lambda: Part(use="random"), "use 'random' and no plan"),
        (lambda: Part(unhealed=True), "rows of embeddings and head"),
        (lambda: Part(unhealed=True, also=("embeddings",), modules=("mlp",)), "rows of embeddings and head"),
        (lambda: Noise(parts=()), "parts is empty"),
        (lambda: Noise(scale=-1.0), "scale is -1.0"),
        (lambda: Noise(scale=math.nan), "scale is nan"),
        (lambda: Noise(seed=-1), "seed is -1"),
    ],
)
def test_refused_when_made(make: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()  # type: ignore[operator]


def test_what_would_stay_broken_is_refused(tiny: Path, tmp_path: Path, model: LanguageModel) -> None:
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="nothing would heal them"):
        check_perturbation(model, Noise())
    with pytest.raises(UserError, match=r"scope\.lora leaves"):
        small_config(tiny, tmp_path, perturbation=Noise(), scope=Scope(lora=Lora()))
    with pytest.raises(UserError, match=r"scope\.mask freezes"):
        small_config(tiny, tmp_path, perturbation=Noise(), scope=Scope(mask=WeightMask()))
    every = range(model.anatomy.vocabulary)
    with pytest.raises(UserError, match="has no weight there that would be moved"):
        check_perturbation(model, Noise(parts=(Part(also=("embeddings",), unhealed=True),)), every)
    with pytest.raises(UserError, match="that would be perturbed may not change"):
        run_unlearn(small_config(tiny, tmp_path / "run", perturbation=Noise(), scope=Scope(layers=(1,))))
    with pytest.raises(UserError, match="has layers 0 to 2"):
        run_unlearn(small_config(tiny, tmp_path / "other", perturbation=Noise(parts=(Part(layers=(9,)),))))


def test_the_teacher_is_the_model_before_the_perturbation(tiny: Path, tmp_path: Path, model: LanguageModel) -> None:
    """The first step's retain loss is KL(untouched || perturbed), and the log says what was left."""
    trainer = replace(SMALL, steps=1, batch=24, learning_rate=1e-9)
    config = small_config(
        tiny,
        tmp_path / "run",
        perturbation=Noise(scale=0.3),
        scope=Scope(layers="model"),
        objective=KLMinimization(),
        trainer=trainer,
    )
    run_unlearn(config)
    run = RunFolder(config.out)
    perturbed = replace(model, model=copy.deepcopy(model.model))
    perturb(perturbed, config.perturbation, seed=trainer.seed)
    from lm.row_files import load_rows

    total, count = 0.0, 0
    for text in encode_rows(model, load_rows(config.retain), config.prompt):
        with torch.no_grad():
            ours, theirs = (
                log_softmax(each.model(torch.tensor([text.ids])).logits[0, text.answer_start - 1 : -1].double(), dim=-1)
                for each in (perturbed, model)
            )
        total, count = total + float((theirs.exp() * (theirs - ours)).sum()), count + len(ours)
    (first,) = run.metrics()
    assert first["retain_loss"] == pytest.approx(total / count, rel=1e-4)
    assert total / count > 0.01
    left = run.manifest["perturbed"]
    assert [each["place"] for each in left] == ["embeddings", "layer 0", "layer 1", "layer 2"]
    assert all(each["share"] == 0.6 and 0.2 < each["kept"] < 0.6 for each in left)


@pytest.mark.parametrize(
    "perturbation",
    [
        NoPerturbation(),
        Noise(
            scale=0.1,
            seed=4,
            parts=(Part(share=0.9, layers=(0, 1), modules=("mlp", "attn")), Part(share=0.2, also=("embeddings",))),
        ),
        TowardsCheckpoint(path="somewhere", parts=(Part(plan="plan.json", use="random"),)),
    ],
)
def test_a_config_comes_back_from_its_file(tiny: Path, tmp_path: Path, perturbation: Perturbation) -> None:
    config = small_config(tiny, tmp_path / "run", objective=GradientAscent(), perturbation=perturbation)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert parse_config(UnlearnConfig, ["--config", str(tmp_path / "config.yaml")]) == config


def test_a_kind_that_is_named_alone_has_its_own_defaults() -> None:
    assert parse_config(UnlearnConfig, ["--perturbation", "Noise"]).perturbation == Noise()
    assert parse_config(UnlearnConfig, ["--perturbation", "Reinitialize"]).perturbation == Reinitialize()
    assert parse_config(UnlearnConfig, ["--perturbation", "Noise", "--perturbation.seed", "3"]).perturbation == Noise(
        seed=3
    )
