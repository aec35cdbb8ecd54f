"""Residual contributions: for every family, what the sites hold must add up to the stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import CONFIGS, FAMILIES, HIDDEN, LAYERS, POST_NORM, RECURRENT, ids, one_layer, tiny
from torch import nn
from transformers import CONFIG_MAPPING, BertConfig, BertModel, LlamaModel

from lm import EMBEDDING, KNOWN, LanguageModel, Site, UserError, anatomy_of, capture, check_anatomy
from lm.anatomy import Module
from lm.checks import check_positions


def identity_error(model: LanguageModel) -> float:
    """The largest |after - (before + attn + mlp)| over all layers, relative to the largest |after| of its layer."""
    with capture(model, [EMBEDDING, *model.anatomy.sites()]) as seen, torch.no_grad():
        model.model(ids())
    errors = []
    for layer in range(model.anatomy.layers):
        after = seen[Site("resid", layer)]
        total = seen[Site("resid", layer - 1)] + seen[Site("attn", layer)] + seen[Site("mlp", layer)]
        errors.append(float((after - total).abs().max() / after.abs().max()))
    return max(errors)


def with_module_outputs(model: LanguageModel) -> LanguageModel:
    """The naive reading: a contribution is whatever the attention or MLP module returns."""
    parts = tuple(replace(each, attn_out=each.attn[0], mlp_out=each.mlp[0]) for each in model.anatomy.parts)
    wrong = replace(model.anatomy, parts=parts)
    return replace(model, anatomy=wrong)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_stream_is_the_sum_of_its_contributions(family: str) -> None:
    model = tiny(family)
    assert identity_error(model) < 5e-7
    check_anatomy(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_contribution_matters(family: str) -> None:
    """The identity above would be vacuous if a contribution were zero: none is."""
    model = tiny(family)
    with capture(model, [EMBEDDING, *model.anatomy.sites()]) as seen, torch.no_grad():
        model.model(ids())
    for site in model.anatomy.sites():
        assert seen[site].shape == (2, 7, HIDDEN)
        assert float(seen[site].abs().mean()) > 1e-3, site


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", POST_NORM)
def test_module_outputs_are_not_contributions_where_a_norm_follows(family: str, dtype: torch.dtype) -> None:
    model = with_module_outputs(tiny(family, dtype=dtype))
    assert identity_error(model) > 0.1
    with pytest.raises(UserError, match=r"layer 0 of this .* is not resid_before"):
        check_anatomy(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_allows_for_half_precision(family: str) -> None:
    check_anatomy(tiny(family, dtype=torch.bfloat16))
    check_anatomy(one_layer(family))


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("phi3", {"resid_pdrop": 0.3}),
        ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3}),
        ("gpt_neox", {"hidden_dropout": 0.3}),
        ("gpt_neox_sequential", {"hidden_dropout": 0.3}),
        ("stablelm", {"hidden_dropout": 0.3}),
        ("gptj", {"resid_pdrop": 0.3}),
        ("gpt_neo", {"resid_dropout": 0.3}),
    ],
)
def test_contributions_are_read_after_dropout(family: str, dropout: dict[str, float]) -> None:
    model = tiny(family, **dropout)
    model.model.train()
    assert identity_error(model) < 5e-7
    if family in ("phi3", "gpt_neox"):
        assert identity_error(with_module_outputs(model)) > 0.01


def test_the_check_leaves_the_mode_as_it_was() -> None:
    model = tiny("llama")
    model.model.train()
    check_anatomy(model)
    assert model.model.training


def test_the_check_tells_an_overflow_from_a_wrong_anatomy() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1e6)
    model.model.half()
    with pytest.raises(UserError, match="layer 1 overflows in float16"):
        check_anatomy(model)


def read_by_block_0(family: str) -> tuple[torch.Tensor, nn.Module]:
    model = tiny(family)
    with capture(model, [EMBEDDING]) as seen, torch.no_grad():
        model.model(ids())
    return seen[EMBEDDING], model.model


def test_the_embedding_includes_positions_in_gpt2() -> None:
    seen, model = read_by_block_0("gpt2")
    tokens = model.get_submodule("transformer.wte").weight[ids()]
    positions = model.get_submodule("transformer.wpe").weight[: ids().shape[1]]
    torch.testing.assert_close(seen, (tokens + positions).detach())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_the_embedding_is_scaled_in_gemma(family: str) -> None:
    seen, model = read_by_block_0(family)
    tokens = model.get_submodule("model.embed_tokens").weight[ids()]
    torch.testing.assert_close(seen, (tokens * HIDDEN**0.5).detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_prefixes_split_a_block(family: str) -> None:
    model = tiny(family)
    anatomy = model.anatomy
    names = [name for name, _ in model.model.named_parameters()]

    def under(layer: int, module: Module) -> set[str]:
        return {name for name in names if name.startswith(anatomy.weight_prefix(layer, module))}

    whole, attn, mlp = under(1, "all"), under(1, "attn"), under(1, "mlp")
    assert attn
    assert mlp
    assert not attn & mlp
    assert all("norm" in name or "ln_" in name for name in whole - attn - mlp)
    assert attn | mlp < whole or family in ("olmo", "nanochat")  # whose norms have no weights
    assert not whole & under(2, "all")
    assert sum(len(under(layer, "all")) for layer in range(LAYERS)) < len(names)  # embedding and head are in no block


PARALLEL = (*("gpt_neox", "gptj", "cohere", "cohere2", "phi", "stablelm_parallel", "falcon", "falcon_multi_query"),)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_named_parts_are_there(family: str) -> None:
    model = tiny(family)
    anatomy = model.anatomy
    weights = dict(model.model.named_parameters())
    assert weights[f"{anatomy.embedding}.weight"].shape[1] == HIDDEN
    assert model.model.get_submodule(anatomy.head) is model.model.get_output_embeddings()
    assert "Norm" in type(model.model.get_submodule(anatomy.norm)).__name__
    assert (anatomy.layers, anatomy.hidden) == (LAYERS, HIDDEN)
    assert anatomy.parallel == (family in PARALLEL)
    assert anatomy.recurrent == ((0, 2) if family in RECURRENT else ())
    assert anatomy.architecture == model.model.config.model_type


def test_every_known_architecture_has_a_tiny_family() -> None:
    """`qwen3_5` is a model of text and pictures, whose text part, `qwen3_5_text`, is loaded."""
    here = {kind for kind in KNOWN if kind in CONFIG_MAPPING} - {"qwen3_5"}
    assert {config().model_type for config in CONFIGS.values()} == here


def test_without_their_multiplier_granite_s_modules_do_not_add_up() -> None:
    model = tiny("granite")
    parts = tuple(replace(each, multiplier=1.0) for each in model.anatomy.parts)
    plain = replace(model, anatomy=replace(model.anatomy, parts=parts))
    assert identity_error(plain) > 0.1
    layer = model.model.get_submodule("model.layers.1.mlp")
    says: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: says.append(output))
    with capture(model, [Site("mlp", 1)]) as seen, torch.no_grad():
        model.model(ids())
    assert torch.equal(seen[Site("mlp", 1)], says[0] * 0.4)
    with pytest.raises(UserError, match="mlp at layer 0 adds nothing, since this granite model multiplies it by 0"):
        check_anatomy(tiny("granite", residual_multiplier=0.0))


@pytest.mark.parametrize("family", [name for name in ("olmo_hybrid",) if name in CONFIGS])
def test_each_block_of_a_hybrid_is_named_by_what_it_has(family: str) -> None:
    anatomy = tiny(family).anatomy
    assert [anatomy.module_path(Site("attn", layer)).split(".", 3)[3] for layer in range(LAYERS)] == [
        "linear_attn",
        "post_attention_layernorm",
        "linear_attn",
    ]
    assert anatomy.module_path(Site("mlp", 0)).endswith("0.mlp")
    assert anatomy.module_path(Site("mlp", 1)).endswith("1.post_feedforward_layernorm")
    assert anatomy.weight_prefix(0, "attn") == ("model.layers.0.linear_attn.",)
    assert tiny("opt").anatomy.weight_prefix(1, "mlp") == ("model.decoder.layers.1.fc1.", "model.decoder.layers.1.fc2.")


@pytest.mark.parametrize(
    ("family", "setting", "says"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False: its blocks normalize the stream itself"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "its blocks add to the normalized stream"),
        ("bloom", {"slow_but_exact": True}, "slow_but_exact True: it multiplies by slices of its weights"),
    ],
)
def test_blocks_that_cannot_be_expressed_are_refused_with_the_reason(
    family: str, setting: dict[str, bool], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        tiny(family, **setting)


def test_pictures_are_no_part_of_reading_text() -> None:
    model = tiny("gemma3")
    names = [name for name, _ in model.model.named_parameters()]
    assert any("vision_tower" in name for name in names)
    left = {name.split(".")[1] for name in names if not model.anatomy.reads_text(name)}
    assert left == {"vision_tower", "multi_modal_projector"}
    assert all(map(tiny("llama").anatomy.reads_text, dict(tiny("llama").model.named_parameters())))


def test_module_paths() -> None:
    llama, olmo2 = tiny("llama").anatomy, tiny("olmo2").anatomy
    assert llama.module_path(Site("resid", 2)) == "model.layers.2"
    assert llama.module_path(Site("mlp", 0)) == "model.layers.0.mlp"
    assert olmo2.module_path(Site("mlp", 0)) == "model.layers.0.post_feedforward_layernorm"
    assert olmo2.module_path(Site("attn", 1)) == "model.layers.1.post_attention_layernorm"
    assert olmo2.weight_prefix(1, "attn") == ("model.layers.1.self_attn.",)
    assert llama.sites("mlp") == (Site("mlp", 0), Site("mlp", 1), Site("mlp", 2))


@pytest.mark.parametrize("site", [Site("mlp", 3), Site("mlp", -1), Site("resid", -2), EMBEDDING])
def test_a_layer_that_does_not_exist_is_refused(site: Site) -> None:
    with pytest.raises(UserError, match=r"layer -?\d does not exist: this llama model has layers 0 to 2"):
        tiny("llama").anatomy.module_path(site)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="site kind 'mpl' is unknown: use one of resid, mlp, attn"):
        Site("mpl", 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="module 'ffn' is unknown: use one of mlp, attn, all"):
        tiny("llama").anatomy.weight_prefix(0, "ffn")  # type: ignore[arg-type]


def test_an_unknown_family_is_tried_with_the_standard_names_and_judged_by_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for family in ("llama", "gemma2", "gpt2"):
        monkeypatch.delitem(KNOWN, family)
    model = tiny("llama")
    assert not model.anatomy.known
    assert identity_error(model) < 5e-7
    check_anatomy(model)
    with pytest.raises(UserError, match=r"layer 0 of this gemma2 model .*are not built as those of the known ones"):
        check_anatomy(tiny("gemma2"))
    with pytest.raises(UserError, match="'gpt2' is not among the known ones, and the usual names do not fit it"):
        tiny("gpt2")


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(
        UserError,
        match=r"'bert' is not among the known ones.*use one of .*gemma2, .*qwen3, .*or add its",
    ):
        anatomy_of(bert)


def test_a_model_that_is_not_a_causal_language_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"LlamaModel has no module model\.layers"):
        anatomy_of(LlamaModel(CONFIGS["llama"]()))
    with pytest.raises(UserError, match="Linear holds no transformers model"):
        anatomy_of(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no transformer blocks"):
        anatomy_of(tiny_empty())


def tiny_empty() -> nn.Module:
    model = tiny("llama").model
    model.model.layers = nn.ModuleList()
    return model


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.module(tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_wrapped_model_is_named_with_its_prefix(family: str) -> None:
    model = tiny(family)
    wrapped = Wrapper(model.model)
    outside = anatomy_of(wrapped)
    assert outside.blocks == f"module.{model.anatomy.blocks}"
    assert outside.head == f"module.{model.anatomy.head}"
    assert [n for n, _ in wrapped.named_parameters() if n.startswith(outside.weight_prefix(0, "mlp"))]
    for anatomy in (outside, model.anatomy):  # the names from before the wrapping still find the module
        inside = replace(model, model=wrapped, anatomy=anatomy)  # type: ignore[arg-type]
        assert identity_error(inside) < 5e-7


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_peft_model_is_named_with_its_prefix(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny(family)
    target = {"llama": ["down_proj", "q_proj"], "gpt2": ["c_proj"]}[family]
    wrapped = get_peft_model(model.model, LoraConfig(target_modules=target, init_lora_weights=False))
    outside = anatomy_of(wrapped)
    assert outside.blocks == f"base_model.model.{model.anatomy.blocks}"
    names = [n for n, _ in wrapped.named_parameters() if n.startswith(outside.weight_prefix(0, "mlp"))]
    assert any("lora_A" in name for name in names)
    for anatomy in (outside, model.anatomy):
        check_anatomy(replace(model, model=wrapped, anatomy=anatomy))  # type: ignore[arg-type]


YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
    "beta_fast": 32,
    "beta_slow": 1,
}


def test_positions_that_are_rescaled_in_every_layer_are_refused() -> None:
    """As OLMo-3 is in transformers 5.0. The published model rescales where attention is full, and so do 4.57 and today's."""
    model = tiny("olmo3", rope_scaling=YARN, rope_theta=500_000)
    check_positions(model)
    check_positions(tiny("olmo3"))  # nothing is rescaled
    inner: Any = model.model.model
    if hasattr(inner, "rotary_embs"):  # transformers 4
        inner.rotary_embs["sliding_attention"] = inner.rotary_embs["full_attention"]
    else:
        for name in ("inv_freq", "attention_scaling"):
            setattr(inner.rotary_emb, f"sliding_attention_{name}", getattr(inner.rotary_emb, f"full_attention_{name}"))
    with pytest.raises(UserError, match=r"rescales positions \(YaRN\) in all layers of olmo3"):
        check_positions(model)
