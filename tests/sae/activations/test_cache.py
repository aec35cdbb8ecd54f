"""The cache: what is read is what was harvested, in a shuffled order; kills cost little; damage is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import byte_level
from families import tiny as tiny_model
from harvested import SITES, SOURCE, harvested_model
from safetensors.torch import load_file, save_file

from lm import LanguageModel, ModelSpec, Site, UserError
from sae.activations import (
    ActivationBatch,
    ActivationCache,
    ActivationFiles,
    CachedActivations,
    CacheSpec,
    ContextSpec,
    Harvester,
    HarvestSpec,
    ReadSpec,
    TextFiles,
    harvest,
    open_activations,
    open_cache,
    write_cache,
)
from sae.activations.cache import staging
from sae.activations.cache.staging import Shuffle, Staging
from sae.activations.config import HarvestConfig
from sae.activations.stage import describe, run_harvest

HARVEST = HarvestSpec(context=ContextSpec(length=16, epochs=1), forward_contexts=3)
TOKENS = 450


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return harvested_model()


def spec(**more: Any) -> CacheSpec:
    return CacheSpec(**{"tokens": TOKENS, "shard_tokens": 50, "block_shards": 2, "shuffle": "global", **more})


def write(model: LanguageModel, folder: Path, *, harvest_spec: HarvestSpec = HARVEST, **more: Any) -> ActivationCache:
    return write_cache(model, SOURCE, SITES, folder, cache=spec(**more), harvest=harvest_spec, show=False)


@pytest.fixture(scope="module", params=["global", "block"])
def cache(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> ActivationCache:
    return write(model, tmp_path_factory.mktemp("cache") / "c", shuffle=request.param)


def keys(batches: list[ActivationBatch]) -> list[tuple[int, int]]:
    return [key for one in batches for key in zip(one.documents.tolist(), one.positions.tolist(), strict=True)]


def in_order(model: LanguageModel, **more: Any) -> tuple[list[tuple[int, int]], dict[Site, torch.Tensor]]:
    batches = list(harvest(model, SOURCE, SITES, HARVEST, **more))
    return keys(batches)[:TOKENS], {site: torch.cat([one[site] for one in batches])[:TOKENS] for site in SITES}


def read_all(cache: ActivationCache, **more: Any) -> list[ActivationBatch]:
    reading = ReadSpec(**{"epochs": 1, "keep_last": True, "together": 3, **more})
    return list(CachedActivations(cache, batch_tokens=64, reading=reading))


def test_every_harvested_token_is_there_once_with_its_values(model: LanguageModel, cache: ActivationCache) -> None:
    order, values = in_order(model)
    for shuffle in (True, False):
        batches = read_all(cache, shuffle=shuffle)
        got = keys(batches)
        assert Counter(got) == Counter(order)
        assert got != order
        at = {key: place for place, key in enumerate(order)}
        places = torch.tensor([at[key] for key in got])
        for site in SITES:
            assert torch.equal(torch.cat([one[site] for one in batches]), values[site][places])


def test_a_global_shuffle_spreads_every_document_and_a_block_shuffle_stays_in_its_block(
    model: LanguageModel, cache: ActivationCache
) -> None:
    order, _ = in_order(model)
    at = {key: place for place, key in enumerate(order)}
    places = [sorted(at[key] for key in keys([cache.read(index)])) for index in range(len(cache.shards))]
    assert cache.tokens == TOKENS
    if cache.facts["shuffle"] == "block":
        assert all(rows[-1] // 100 == rows[0] // 100 == index // 2 for index, rows in enumerate(places))
    else:
        assert all(rows[0] < TOKENS / 4 and rows[-1] > TOKENS * 3 / 4 for rows in places)


def test_the_manifest_says_what_it_is(model: LanguageModel, cache: ActivationCache) -> None:
    facts = json.loads((cache.folder / "manifest.json").read_text())
    _, values = in_order(model)
    assert facts["finished"]
    assert facts["model"] == "tiny"
    assert facts["settings"]["sites"] == ["resid.1", "mlp.0"]
    assert facts["masked"]["kept"] >= TOKENS
    assert facts["masked"]["special"] > 0
    assert facts["source"] == {"kind": "Texts", "documents": 40}
    assert not (cache.folder / "stage").exists()
    for site, name in zip(SITES, facts["settings"]["sites"], strict=True):
        mean, variance = cache.statistics(site)
        wide = values[site].double()
        torch.testing.assert_close(mean, wide.mean(0))
        torch.testing.assert_close(variance, wide.var(0, unbiased=False))
        assert facts["statistics"][name]["variance"] == pytest.approx(float(variance.mean()))


class Killed(BaseException):
    """As a kill would end the process: nothing catches it."""


@pytest.mark.parametrize("shuffle", ["global", "block"])
@pytest.mark.parametrize("shard_tokens", [50, 8])
def test_a_killed_run_goes_on_to_the_same_files(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: str, shard_tokens: int
) -> None:
    """Killed at every seventh file, over and over; blocks smaller than a forward pass too."""
    whole = write(model, tmp_path / "whole", shuffle=shuffle, shard_tokens=shard_tokens)
    real, budget, passes = staging.write_atomic, [0], [0]

    def failing(path: Path, data: bytes) -> None:
        budget[0] -= 1
        if budget[0] < 0:
            raise Killed
        real(path, data)

    rows = Harvester.rows

    def counted(self: Harvester, contexts: Any) -> Any:
        passes[0] += 1
        return rows(self, contexts)

    monkeypatch.setattr(Harvester, "rows", counted)
    kills = 0
    with monkeypatch.context() as patched:
        patched.setattr(staging, "write_atomic", failing)
        while True:
            budget[0] = 7
            try:
                again = write(model, tmp_path / "killed", shuffle=shuffle, shard_tokens=shard_tokens)
                break
            except Killed:
                kills += 1
                with pytest.raises(UserError, match="not finished"):
                    open_cache(tmp_path / "killed")
    assert kills >= 2
    names = sorted(file.name for file in whole.folder.iterdir())
    assert names == sorted(file.name for file in again.folder.iterdir())
    for name in names:
        if name != "manifest.json":
            assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
    same = ("shards", "masked", "statistics", "settings", "outlier_limits")
    assert {key: whole.facts[key] for key in same} == {key: again.facts[key] for key in same}
    done = passes[0]
    assert write(model, tmp_path / "killed", shuffle=shuffle, shard_tokens=shard_tokens).tokens == TOKENS
    assert passes[0] == done, "a finished cache was harvested again"


def test_finished_blocks_are_not_harvested_again(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, passes, allowed = Harvester.rows, [0], [8]

    def counted(self: Harvester, contexts: Any) -> Any:
        passes[0] += 1
        if passes[0] > allowed[0]:
            raise Killed
        return rows(self, contexts)

    monkeypatch.setattr(Harvester, "rows", counted)
    with pytest.raises(Killed):
        write(model, tmp_path / "c")
    staged = sorted((tmp_path / "c" / "stage").iterdir())
    assert staged
    passes[0], allowed[0] = 0, 10**9
    write(model, tmp_path / "c")
    resumed, passes[0] = passes[0], 0
    write(model, tmp_path / "d")
    assert resumed < passes[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_are_kept_in_the_type_asked_for(model: LanguageModel, tmp_path: Path, dtype: str) -> None:
    made = write(model, tmp_path / "c", dtype=dtype, tokens=100)
    stored = getattr(torch, dtype)
    assert made.read(0)[SITES[0]].dtype == stored
    order, values = in_order(model)
    at = {key: place for place, key in enumerate(order)}
    batches = read_all(made)
    places = torch.tensor([at[key] for key in keys(batches)])
    wanted = values[SITES[0]][places].to(stored).float()
    assert torch.equal(torch.cat([one[SITES[0]] for one in batches]), wanted)


def test_a_bfloat16_model_is_kept_as_it_is(tmp_path: Path) -> None:
    made = tiny_model("llama", dtype=torch.bfloat16)
    stored = write(LanguageModel(made.model, byte_level(), made.anatomy, "tiny"), tmp_path / "c", tokens=100)
    assert stored.read(0)[SITES[1]].dtype == torch.bfloat16
    assert stored.facts["dtype"] == "bfloat16"


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_a_source_too_short_gives_what_it_holds(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: Shuffle
) -> None:
    """The very rows of a cache that asks for no more, also where it was killed between the one size and the other."""
    settings: dict[str, Any] = {"shard_tokens": 100, "block_shards": 2, "shuffle": shuffle}
    short = write(model, tmp_path / "c", tokens=5000, **settings)
    assert 300 < short.tokens < 5000
    assert short.facts["tokens"] == short.tokens
    exact = write(model, tmp_path / "exact", tokens=short.tokens, **settings)

    def rows(cache: ActivationCache) -> list[torch.Tensor]:
        return [cache.read(shard)[SITES[0]] for shard in range(len(cache.shards))]

    assert all(torch.equal(one, other) for one, other in zip(rows(short), rows(exact), strict=True))
    assert write(model, tmp_path / "c", tokens=5000, **settings).tokens == short.tokens, "it is finished"
    usual, calls = Staging.put, [0]

    def killed(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == short.tokens // 200 + 2:
            raise KeyboardInterrupt
        usual(*args)

    monkeypatch.setattr(Staging, "put", killed)
    with contextlib.suppress(KeyboardInterrupt):
        write(model, tmp_path / "d", tokens=5000, **settings)
    monkeypatch.setattr(Staging, "put", usual)
    again = write(model, tmp_path / "d", tokens=5000, **settings)
    assert all(torch.equal(one, other) for one, other in zip(rows(again), rows(exact), strict=True))


def test_a_source_too_short_goes_round_where_it_may(model: LanguageModel, tmp_path: Path) -> None:
    endless = HarvestSpec(context=ContextSpec(length=16), forward_contexts=16)
    assert write(model, tmp_path / "d", harvest_spec=endless, tokens=2000, shard_tokens=500).tokens == 2000


def test_what_stands_in_the_way_is_left_alone(model: LanguageModel, tmp_path: Path) -> None:
    write(model, tmp_path / "c", tokens=100)
    with pytest.raises(UserError, match=r"cache.tokens 100 and now it is 150"):
        write(model, tmp_path / "c", tokens=150)
    other = tiny_model("llama", seed=1)
    with pytest.raises(UserError, match="weights"):
        write(LanguageModel(other.model, model.tokenizer, other.anatomy, "tiny"), tmp_path / "c", tokens=100)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="no cache"):
        write(model, tmp_path / "mine")
    with pytest.raises(UserError, match="GB free"):
        write(model, tmp_path / "huge", tokens=10**14)


def test_auto_is_a_whole_permutation_however_full_the_disk_is(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write(model, tmp_path / "roomy", shuffle="auto").facts["shuffle"] == "global"
    free = int(1.5 * TOKENS * (2 * model.anatomy.hidden * 4 + 24))
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr("sae.activations.cache.writing.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="set shuffle: block, which needs"):
        write(model, tmp_path / "full", shuffle="auto")
    assert write(model, tmp_path / "full", shuffle="block").facts["shuffle"] == "block"


def test_a_harvest_killed_at_its_first_rename_goes_on(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".manifest.json.4711.tmp").write_text("{")
    assert write(model, tmp_path / "c").tokens == TOKENS
    assert not list((tmp_path / "c").glob(".*"))


def test_a_damaged_missing_or_cut_shard_is_refused(cache: ActivationCache, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(cache.folder, tmp_path / name)) / "shard-00001.safetensors"

    changed = broken("changed")
    data = bytearray(changed.read_bytes())
    data[-5] ^= 1
    changed.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged"):
        read_all(open_cache(changed.parent))
    assert read_all(open_cache(changed.parent), verify=False)
    cut = broken("cut")
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(UserError, match="missing or cut short"):
        open_cache(cut.parent)
    gone = broken("gone")
    gone.unlink()
    with pytest.raises(UserError, match="missing or cut short"):
        open_cache(gone.parent)
    manifest = broken("manifest").with_name("manifest.json")
    manifest.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_cache(manifest.parent)
    for wrong in ("[]", '{"format": "other"}'):
        manifest.write_text(wrong)
        with pytest.raises(UserError, match="is not of the format"):
            open_cache(manifest.parent)
    whole = json.loads((cache.folder / "manifest.json").read_text())
    for key, value in (("shards", 7), ("shards", [{}]), ("settings", None)):
        manifest.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(UserError, match="is no manifest of a cache"):
            open_cache(manifest.parent)
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        open_cache(tmp_path / "none")


def same(one: ActivationBatch, other: ActivationBatch) -> bool:
    return keys([one]) == keys([other]) and all(torch.equal(one[site], other[site]) for site in one.sites)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_twenty_batches_are_ten_and_ten_more_for_any_number_of_processes(
    cache: ActivationCache, world: int, shuffle: bool
) -> None:
    reading = ReadSpec(together=3, shuffle=shuffle)
    whole = CachedActivations(cache, batch_tokens=64, reading=reading)
    straight = [next(whole) for _ in range(20)]
    assert all(len(one) == 64 for one in straight)
    for rank in range(world):
        first = CachedActivations(cache, batch_tokens=64, reading=reading, rank=rank, world=world)
        got = [next(first) for _ in range(10)]
        again = CachedActivations(open_cache(cache.folder), batch_tokens=64, reading=reading, rank=rank, world=world)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        got += [next(again) for _ in range(10)]
        assert all(same(a, b.select(slice(rank, None, world))) for a, b in zip(got, straight, strict=True))
    other = CachedActivations(cache, batch_tokens=32, reading=reading)
    with pytest.raises(UserError, match="batch_tokens"):
        other.load_state_dict(whole.state_dict())


def test_epochs_end_and_have_orders_of_their_own(cache: ActivationCache) -> None:
    two = list(CachedActivations(cache, SITES[:1], batch_tokens=50, reading=ReadSpec(epochs=2)))
    assert len(two) == 2 * TOKENS // 50
    first, second = keys(two[:9]), keys(two[9:])
    assert Counter(first) == Counter(second)
    assert first != second
    assert two[0].sites == SITES[:1]
    assert torch.equal(two[0].values, two[0][SITES[0]])
    assert sum(map(len, CachedActivations(cache, batch_tokens=64, reading=ReadSpec(epochs=1)))) == 448
    with pytest.raises(UserError, match="less than a batch"):
        CachedActivations(cache, batch_tokens=TOKENS + 1, reading=ReadSpec(epochs=1))
    with pytest.raises(UserError, match="holds no"):
        CachedActivations(cache, [Site("attn", 0)], batch_tokens=64)


def test_plain_files_of_activations_are_read(tmp_path: Path, cache: ActivationCache) -> None:
    values = torch.arange(40.0).view(20, 2)
    save_file({"activations": values[:12].half()}, tmp_path / "a.safetensors")
    save_file({"activations": values[12:].half(), "documents": torch.arange(8)}, tmp_path / "b.safetensors")
    source = ActivationFiles(path=str(tmp_path), site="mlp.5")
    stream = open_activations(source, (), batch_tokens=20, reading=ReadSpec(epochs=1))
    (batch,) = list(stream)
    assert batch.sites == (Site("mlp", 5),)
    assert torch.equal(batch.values.sort(0).values, values)
    assert sorted(batch.documents.tolist()) == [-1] * 12 + [*range(8)]
    assert set(batch.token_ids.tolist()) == {-1}
    with pytest.raises(UserError, match="no tensor 'x', it has activations"):
        open_cache(ActivationFiles(path=str(tmp_path), key="x"))
    save_file({"activations": torch.zeros(3, 5)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="widths"):
        open_cache(source)
    (tmp_path / "c.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"c.safetensors is damaged"):
        open_cache(source)
    shard = load_file(cache.shards[0].path)
    assert set(shard) == {"resid.1", "mlp.0", "token_ids", "documents", "positions"}


def test_the_harvesting_stage_writes_a_cache_that_opens(tiny: Path, tmp_path: Path) -> None:
    asked = HarvestConfig(
        model=ModelSpec(path=str(tiny / "model"), device="cpu"),
        source=TextFiles(path=str(tiny / "forget.jsonl"), column="output"),
        sites=("resid.0", "mlp.1"),
        harvest=HarvestSpec(context=ContextSpec(length=16), forward_contexts=2),
        cache=CacheSpec(tokens=60, shard_tokens=30),
        out=str(tmp_path / "cache"),
    )
    said = describe(asked, run_harvest(asked))
    cache = open_cache(tmp_path / "cache")
    assert cache.tokens == 60
    assert set(cache.sites) == {Site("resid", 0), Site("mlp", 1)}
    assert said == f"wrote {tmp_path / 'cache'}: 60 tokens at resid.0, mlp.1"
    with pytest.raises(UserError, match=r"already holds a cache.*--resume true"):
        run_harvest(asked)
    assert run_harvest(replace(asked, resume=True)).tokens == 60
    for wrong, says in (
        ({"sites": ()}, "sites is empty"),
        ({"source": ActivationFiles(path="x")}, "harvested from text"),
    ):
        with pytest.raises(UserError, match=says):
            replace(asked, **wrong)


def test_a_cache_goes_on_after_settings_that_are_younger_than_it(model: LanguageModel, tmp_path: Path) -> None:
    """The first settings of its manifest, without some that have a default today."""
    path = tmp_path / "c" / "manifest.json"
    write(model, tmp_path / "c")
    manifest = json.loads(path.read_text())
    del manifest["settings"]["harvest"]["cut"], manifest["settings"]["harvest"]["masks"]["outliers"]
    del manifest["settings"]["cache"]["dtype"]
    path.write_text(json.dumps(manifest))
    assert write(model, tmp_path / "c").tokens == TOKENS
    with pytest.raises(UserError, match=r"was made with harvest\.cut True and now it is False"):
        write(model, tmp_path / "c", harvest_spec=replace(HARVEST, cut=False))
    with pytest.raises(UserError, match=r"was made with cache\.dtype None and now it is 'float16'"):
        write(model, tmp_path / "c", dtype="float16")
