"""From text to rows: each row is what the model computes there, unfit tokens are left out and counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from families import byte_level, tiny
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lm import LanguageModel, Site, UserError, capture
from sae.activations import ActivationBatch, ContextSpec, Harvester, HarvestSpec, MaskSpec, Texts, harvest, site_name

SITES = (Site("resid", 1), Site("mlp", 2), Site("attn", 0), Site("resid", -1))
SOURCE = Texts(texts=("Anna Kowalska was born in Gdańsk.", "", "Zoë 🐢", "The quick brown fox jumps. " * 6))
ONCE = ContextSpec(length=24, epochs=1, shuffle=False)


def llama(*, bos: bool = True, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = tiny("llama", dtype=dtype)
    return LanguageModel(model.model, byte_level(bos=bos), model.anatomy, "tiny")


def gather(
    model: LanguageModel, spec: HarvestSpec, sites: tuple[Site, ...] = SITES
) -> tuple[list[ActivationBatch], Counter[str]]:
    harvester = Harvester(model, SOURCE, sites, spec)
    walk, batches, counts = harvester.contexts(), [], Counter[str]()
    while contexts := list(islice(walk, spec.forward_contexts)):
        rows, masked = harvester.rows(contexts)
        batches.append(rows)
        counts += masked
    return batches, counts


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_values_of_a_plain_forward_pass(pack: bool, dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    context = ContextSpec(length=24, epochs=1, shuffle=False, pack=pack)
    spec = HarvestSpec(context=context, masks=MaskSpec(special=False, outliers=None), forward_contexts=3)
    rows = gather(model, spec)[0]
    walk = Harvester(model, SOURCE, SITES, spec).contexts()
    assert all(row[site].dtype == dtype for row in rows for site in SITES)
    flat = {site: torch.cat([row[site] for row in rows]) for site in SITES}
    ids = torch.cat([row.token_ids for row in rows])
    at = 0
    for one in walk:  # alone and unpadded: padding and company change nothing but rounding
        with capture(model, SITES) as seen, torch.no_grad():
            model.model(input_ids=torch.from_numpy(one.ids)[None])
        size = len(one.ids)
        assert torch.equal(ids[at : at + size], torch.from_numpy(one.ids))
        for site in SITES:
            loose = {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(flat[site][at : at + size], seen[site][0], **loose)
        at += size
    assert at == len(ids)


def test_several_sites_from_one_forward_equal_separate_runs() -> None:
    model = llama()
    spec = HarvestSpec(context=ONCE)
    together, _ = gather(model, spec)
    for site in SITES:
        alone, _ = gather(model, spec, (site,))
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one.values, many[site])
            assert torch.equal(one.positions, many.positions)


def test_tokens_that_are_only_flagged_as_special_are_left_out_too() -> None:
    """As `<|im_start|>` is in many chat models: none of the tokenizer's named ones."""
    model = llama()
    letter = model.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    raw = json.loads(model.tokenizer.backend_tokenizer.to_str())
    flagged = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    raw["added_tokens"].append({"id": letter, "content": "q", **flagged})
    model = replace(model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw))))
    assert letter not in model.tokenizer.all_special_ids
    context = ContextSpec(length=24, shuffle=False, epochs=1, pack=False)
    spec = HarvestSpec(context=context, masks=MaskSpec(outliers=None))
    texts = ("a quick one", "quit")
    batches = list(harvest(model, Texts(texts=texts), SITES, spec))
    kept = [token for batch in batches for token in batch.token_ids.tolist()]
    everything = [token for text in texts for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert everything.count(letter) == 2
    assert kept == [token for token in everything if token != letter]


@pytest.mark.parametrize("pack", [True, False])
def test_special_tokens_and_padding_are_left_out_and_counted(pack: bool) -> None:
    model = llama()
    context = ContextSpec(length=24, epochs=1, shuffle=False, pack=pack)
    walk = list(Harvester(model, SOURCE, SITES, HarvestSpec(context=context)).contexts())
    special = set(model.tokenizer.all_special_ids)
    everything = [token for one in walk for token in one.ids.tolist()]
    batches, counts = gather(model, HarvestSpec(context=context, masks=MaskSpec(outliers=None)))
    kept = [token for batch in batches for token in batch.token_ids.tolist()]
    assert kept == [token for token in everything if token not in special]
    assert counts["seen"] == len(everything)
    assert counts["special"] == len(everything) - len(kept)
    assert counts["kept"] == len(kept)
    if not pack:
        assert counts["padding"] > 0
    assert (torch.cat([batch.positions for batch in batches]) >= 0).all()
    batches, counts = gather(model, HarvestSpec(context=context, masks=MaskSpec(special=False, outliers=None)))
    assert [token for batch in batches for token in batch.token_ids.tolist()] == everything
    assert counts["special"] == 0


def test_the_first_tokens_of_each_context_can_be_left_out() -> None:
    model = llama(bos=False)
    batches, counts = gather(model, HarvestSpec(context=ONCE, masks=MaskSpec(special=False, first=2, outliers=None)))
    contexts = list(Harvester(model, SOURCE, SITES, HarvestSpec(context=ONCE)).contexts())
    kept = [token for batch in batches for token in batch.token_ids.tolist()]
    assert kept == [token for one in contexts for token in one.ids.tolist()[2:]]
    assert counts["first"] == 2 * len(contexts)


def test_tokens_with_huge_norms_are_left_out_at_every_site() -> None:
    model = llama()
    sink = model.tokenizer(SOURCE.texts[-1], add_special_tokens=False)["input_ids"][5]
    with torch.no_grad():
        model.model.get_input_embeddings().weight[sink] *= 1000
    everything, _ = gather(model, HarvestSpec(context=ONCE, masks=MaskSpec(outliers=None)))
    sinks = int(sum((batch.token_ids == sink).sum() for batch in everything))
    assert sinks
    batches, counts = gather(model, HarvestSpec(context=ONCE))
    assert not any((batch.token_ids == sink).any() for batch in batches)
    assert counts["outlier resid.1"] == sinks  # the norm before attention brings the sink down at attn.0 and mlp.2
    assert counts["kept"] == sum(map(len, everything)) - sinks
    limit = Harvester(model, SOURCE, SITES, HarvestSpec(context=ONCE)).limits[SITES[0]]
    norms = torch.cat([batch[SITES[0]] for batch in everything]).norm(dim=1)
    assert limit == pytest.approx(10 * float(norms.median()))
    mild, _ = gather(model, HarvestSpec(context=ONCE, masks=MaskSpec(outliers=1e6)))
    assert sum(map(len, mild)) == sum(map(len, everything))


def test_values_that_are_no_numbers_are_an_error_that_names_the_document() -> None:
    model = llama()
    token = model.tokenizer(SOURCE.texts[-1], add_special_tokens=False)["input_ids"][5]
    with torch.no_grad():
        model.model.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(UserError, match=r"resid at layer 1 is NaN or infinite on document \d of the texts given"):
        gather(model, HarvestSpec(context=ONCE), (Site("resid", 1),))


def test_harvest_gives_float32_in_order_once() -> None:
    batches = list(harvest(llama(dtype=torch.bfloat16), SOURCE, SITES, HarvestSpec(context=ONCE)))
    assert all(batch[site].dtype == torch.float32 for batch in batches for site in SITES)
    documents = torch.cat([batch.documents for batch in batches]).tolist()
    assert documents == sorted(documents)
    assert set(documents) == {0, 2, 3}


def test_what_cannot_be_is_refused_at_once() -> None:
    model = llama()
    for sites, spec, says in (
        ((), HarvestSpec(), "sites is empty"),
        ((Site("mlp", 7),), HarvestSpec(), "layer 7"),
        (SITES, HarvestSpec(context=ContextSpec(length=65)), "longer than the model's 64"),
    ):
        with pytest.raises(UserError, match=says):
            Harvester(model, SOURCE, sites, spec)
    with pytest.raises(UserError, match="outliers"):
        MaskSpec(outliers=0.5)
    batch = next(harvest(model, SOURCE, SITES, HarvestSpec(context=ONCE)))
    with pytest.raises(UserError, match="say which"):
        _ = batch.values
    with pytest.raises(UserError, match="is not among"):
        _ = batch[Site("mlp", 0)]
    assert site_name(SITES[-1]) == "resid.-1"
