"""The autoencoder against a dense forward written out here: start, both modes, gradients, one step, its file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lm import UserError
from sae import (
    Choice,
    InputNorm,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    aux_k_loss,
    calibrate_features,
    calibrate_mutual,
    geometric_median,
    input_variance,
    reconstruction_loss,
)

CHOICES: tuple[Choice, ...] = ("token", "feature", "mutual")
HIDDEN, FEATURES, K = 6, 24, 3


def sample(seed: int = 0, tokens: int = 32) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def autoencoder(choice: Choice, seed: int = 0) -> SparseAutoencoder:
    """With an encoder that is no longer the decoder's transpose, and biases that matter."""
    model = SparseAutoencoder(SparseAutoencoderConfig(hidden=HIDDEN, features=FEATURES, k=K, choice=choice, seed=seed))
    model.start_from(sample())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        model.w_enc += 0.2 * torch.randn(model.w_enc.shape, generator=generator)
        model.b_enc += 0.2 * torch.randn(model.b_enc.shape, generator=generator) - 0.3
    return model


def calibrate(model: SparseAutoencoder) -> None:
    affinity = model.affinity(sample(1, 800))
    if model.config.choice == "mutual":
        model.set_threshold(calibrate_mutual(affinity, k=K))
    elif model.config.choice == "feature":
        model.set_threshold(calibrate_features(affinity, K * 800 // FEATURES))


def test_its_repr_is_a_line_that_says_what_it_is() -> None:
    model = autoencoder("feature")
    assert repr(model) == "SparseAutoencoder(feature choice, 24 features, hidden 6, k 3)"
    model.metadata = {"hook_name": "blocks.3.hook_resid_post"}
    assert repr(model).endswith("k 3, at blocks.3.hook_resid_post)")
    fixed = SparseAutoencoder(SparseAutoencoderConfig(hidden=HIDDEN, features=FEATURES, k=0, choice="threshold"))
    assert repr(fixed) == "SparseAutoencoder(thresholds, 24 features, hidden 6)"


def test_it_starts_as_the_recipe_says_and_from_its_seed_alone() -> None:
    config = SparseAutoencoderConfig(hidden=HIDDEN, features=FEATURES, k=K)
    state = torch.random.get_rng_state()
    model, again = SparseAutoencoder(config), SparseAutoencoder(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model.w_enc, model.w_dec)
    assert model.w_enc.data_ptr() != model.w_dec.data_ptr()
    torch.testing.assert_close(model.w_dec.norm(dim=1), torch.ones(FEATURES))
    assert torch.equal(model.w_dec, again.w_dec)
    other = SparseAutoencoder(SparseAutoencoderConfig(hidden=HIDDEN, features=FEATURES, k=K, seed=1))
    assert not torch.equal(model.w_dec, other.w_dec)
    model.start_from(sample())
    torch.testing.assert_close(model.b_dec.data, geometric_median(sample()).float())
    assert float(model.variance) == input_variance(sample())


@pytest.mark.parametrize("choice", CHOICES)
def test_encode_and_decode_are_the_dense_forward_with_its_gradients(choice: Choice) -> None:
    model, x = autoencoder(choice), sample(2)
    z = (x - model.b_dec) @ model.w_enc.T + model.b_enc
    torch.testing.assert_close(model.affinity(x), z)
    if choice == "token":
        kept = z >= z.topk(K, dim=1).values[:, -1:]
    elif choice == "feature":
        kept = z >= z.topk(K * len(x) // FEATURES, dim=0).values[-1]
    else:
        kept = z >= z.flatten().topk(K * len(x)).values[-1]
    dense = z * kept * (z > 0)
    code = model.encode(x)
    torch.testing.assert_close(code.to_dense(), dense)
    x_hat = model(x)
    oracle = dense @ model.w_dec + model.b_dec
    torch.testing.assert_close(x_hat, oracle)
    parameters = list(model.parameters())
    got = torch.autograd.grad(reconstruction_loss(x, x_hat, variance=3.0), parameters)
    want = torch.autograd.grad((oracle - x).square().mean() / 3, parameters)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("choice", CHOICES)
def test_in_evaluation_a_token_has_the_same_code_in_any_company(choice: Choice) -> None:
    model, x = autoencoder(choice), sample(3)
    calibrate(model)
    model.eval()
    whole = model.encode(x).to_dense()
    alone = torch.cat([model.encode(x[j : j + 1]).to_dense() for j in range(len(x))])
    torch.testing.assert_close(alone, whole)
    held_out = sample(4, 3000)
    l0 = sum(model.encode(token.unsqueeze(0)).matches for token in held_out[:1000]) / 1000
    assert l0 == pytest.approx(model.encode(held_out[:1000]).matches / 1000)
    if choice != "token":
        assert model.encode(held_out).matches / 3000 == pytest.approx(K, rel=0.03)


def test_feature_budgets_are_obeyed_and_are_for_training_only() -> None:
    model, x = autoencoder("feature"), sample(2)
    with torch.no_grad():
        model.b_enc += 100
    budgets = torch.arange(FEATURES) % 7
    assert torch.equal(model.encode(x, budgets=budgets).feature_counts(), budgets)
    assert model.affinity(x).T.is_contiguous()
    with pytest.raises(UserError, match="call train"):
        model.eval().encode(x, budgets=budgets)
    with pytest.raises(UserError, match="feature choice"):
        autoencoder("mutual").encode(x, budgets=budgets)


def test_a_step_keeps_the_decoder_at_unit_norm_and_training_lowers_the_loss() -> None:
    for choice in CHOICES:
        model, x = autoencoder(choice), sample(5, 256)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02, eps=6.25e-10)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            code = model.encode(x)
            x_hat = model.decode(code)
            loss = reconstruction_loss(x, x_hat, variance=float(model.variance))
            dead = code.feature_counts() == 0
            (loss + aux_k_loss(x - x_hat, model.affinity(x), dead, model.w_dec, k_aux=4) / 32).backward()
            model.project_gradient()
            assert model.w_dec.grad is not None
            along = (model.w_dec.grad * model.w_dec).sum(1)
            assert float(along.detach().abs().max()) < 1e-6
            optimizer.step()
            model.normalize_decoder()
            torch.testing.assert_close(model.w_dec.norm(dim=1), torch.ones(FEATURES))
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("norm", ["layer_norm", "token_norm"])
def test_a_normalization_of_each_token_is_undone_after_decoding(norm: InputNorm) -> None:
    model, x = (
        SparseAutoencoder(SparseAutoencoderConfig(hidden=HIDDEN, features=FEATURES, k=K, input_norm=norm)),
        sample(2),
    )
    if norm == "layer_norm":
        shift, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        inner = (x - shift) / (scale + 1e-5)
    else:
        shift, scale = torch.zeros(1), x.norm(dim=1, keepdim=True) / HIDDEN**0.5
        inner = x / scale
        torch.testing.assert_close(inner.norm(dim=1), torch.full((len(x),), HIDDEN**0.5))
    model.start_from(x)
    torch.testing.assert_close(model.b_dec.data, geometric_median(inner).float())
    z = (inner - model.b_dec) @ model.w_enc.T
    torch.testing.assert_close(model.affinity(x), z)
    code = model.encode(x)
    oracle = (code.to_dense() @ model.w_dec + model.b_dec) * scale + shift
    torch.testing.assert_close(model(x), oracle)
    with pytest.raises(UserError, match=r"decode\(code, x\)"):
        model.decode(code)


def test_fixed_thresholds_are_a_rule_of_their_own_in_training_too() -> None:
    model = SparseAutoencoder(SparseAutoencoderConfig(hidden=HIDDEN, features=FEATURES, k=0, choice="threshold"))
    with pytest.raises(UserError, match="set_threshold"):
        model.encode(sample())
    model.set_threshold(0.5)
    z = model.affinity(sample())
    torch.testing.assert_close(model.train().encode(sample()).to_dense(), z * (z > 0.5))
    assert torch.equal(model.eval().encode(sample()).indices, model.train().encode(sample()).indices)


def test_affinities_are_float32_under_autocast_and_for_bf16_input() -> None:
    model, x = autoencoder("token"), sample(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            model.affinity(x), (x - model.b_dec).double().matmul(model.w_enc.double().T).float() + model.b_enc
        )
    assert model.affinity(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("choice", CHOICES)
def test_saved_and_read_again_it_gives_the_same_output(choice: Choice, tmp_path: Path) -> None:
    model, x = autoencoder(choice), sample(6)
    calibrate(model)
    with torch.no_grad():
        model.threshold.copy_(model.threshold.float())
    model.save_pretrained(tmp_path, metadata={"hook_name": "blocks.3.hook_resid_post"})
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert not again.training
    assert again.config == model.config
    assert torch.equal(again(x), model.eval()(x))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_file_is_a_jumprelu_or_topk_of_the_common_layout(choice: Choice, tmp_path: Path) -> None:
    """The output worked out from the file alone, as a reader of that layout does."""
    model, x = autoencoder(choice), sample(6)
    calibrate(model)
    model.eval().save_pretrained(tmp_path, metadata={"prepend_bos": True})
    cfg, w = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (HIDDEN, FEATURES, "float32")
    assert cfg["apply_b_dec_to_input"] is True
    assert cfg["metadata"]["prepend_bos"] is True
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if cfg["architecture"] == "topk":
        top = z.topk(cfg["k"], dim=1)
        acts = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
    else:
        assert cfg["architecture"] == "jumprelu"
        acts = z.relu() * (z > w["threshold"])
        assert (w["threshold"].unique().numel() == 1) == (choice == "mutual")
    torch.testing.assert_close(acts @ w["W_dec"] + w["b_dec"], model(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused_with_the_remedy(tmp_path: Path) -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"k": 0},
        {"k": 25},
        {"k": 2.5},
        {"k": True},
        {"k": -1, "choice": "threshold"},
        {"hidden": 0},
        {"choice": "topk"},
        {"input_norm": "batch"},
    )
    for bad in refused:
        with pytest.raises(UserError):
            SparseAutoencoderConfig(**{"hidden": HIDDEN, "features": FEATURES, "k": K, **bad})
    model = autoencoder("mutual")
    for act in (lambda: model.eval().encode(sample()), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(UserError, match="set_threshold"):
            act()
    with pytest.raises(UserError, match="one for each feature"):
        model.set_threshold(torch.ones(3))
    with pytest.raises(UserError, match="needs no threshold"):
        autoencoder("token").set_threshold(1.0)
    with pytest.raises(UserError, match=r"give \(tokens, 6\)"):
        model.encode(torch.ones(2, 5))
    with pytest.raises(UserError, match="own"):
        autoencoder("token").save_pretrained(tmp_path, metadata={"autoencoder": 1})
    with pytest.raises(UserError, match="JSON"):
        autoencoder("token").save_pretrained(tmp_path, metadata={"path": Path()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("choice", ["token", "mutual", "feature"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_that_was_made_narrower_still_encodes(choice: Choice, dtype: torch.dtype) -> None:
    """In float32, from the rounded weights: as a float32 module with these weights does."""
    made = SparseAutoencoder(SparseAutoencoderConfig(hidden=8, features=24, k=3, choice=choice)).eval()
    if choice != "token":
        made.set_threshold(0.5)
    narrow, x = copy.deepcopy(made).to(dtype), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    rounded = copy.deepcopy(narrow).float()
    torch.testing.assert_close(narrow(x.to(dtype)), rounded(x.to(dtype)))
    assert narrow.encode(x).matches > 0
