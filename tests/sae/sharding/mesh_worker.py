"""All that `test_sharding` looks at, run on 1, 2 and 4 gloo processes that are forked from one (so torch loads once).

    python tests.sae.sharding.mesh_worker.py FOLDER

Each process writes `FOLDER/<world>-<rank>.pt`: a dict from the name of a case to what it gave, or to an exception's text.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[1])]
# ruff: noqa: E402

import torch
import torch.distributed as dist
from made import SITE, Made
from torch import Tensor

from lm import UserError
from lm.run_folder import RunFolder
from sae import allocate, idle_choice, smallest_chosen
from sae.sharding import Mesh, RowCuts, copy_to_shards, feature_choice, mutual_choice, sum_of_shards
from sae.sparse_code import SparseCode
from sae.trainer import (
    AutoencoderSpec,
    AuxiliarySpec,
    Recipe,
    TrainerConfig,
    ZipfSpec,
    checkpoints,
    named,
    train_on_stream,
)
from sae.trainer.loop import Loop

BATCH, FEATURES, K = 22, 26, 3
SPECS = (
    AutoencoderSpec(name="token", choice="token", features=FEATURES, k=K, learning_rate=1e-3),
    AutoencoderSpec(name="multi", choice="token", features=FEATURES, k=K, learning_rate=1e-3, multi_topk=True),
    AutoencoderSpec(name="mutual", choice="mutual", features=FEATURES, k=K, learning_rate=1e-3),
    AutoencoderSpec(name="feature", choice="feature", features=FEATURES, k=K, learning_rate=1e-3, multi_topk=True),
)


def recipe(**trainer: Any) -> Recipe:
    return Recipe(
        trainer=TrainerConfig(
            **{
                "steps": 8,
                "batch_tokens": BATCH,
                "warmup": 2,
                "start_tokens": 30,
                "calibrate_tokens": 44,
                "calibrate_on": "training",
                **trainer,
            },
            log_every=4,
            backend="cpu",
            clip=5.0,
            ema=0.5,
        ),
        auxiliary=AuxiliarySpec(k_aux=4, window=20, tau=0.9, scale_by_count=True, weighting="gradient"),
        zipf=ZipfSpec(mutual_share=0.3, measure_every=2, fit_every=4, window=100, least_firings=0),
    )


def meshes(world: int) -> list[Mesh]:
    return [Mesh(features=features) for features in (1, 2, 4) if features <= world and world % features == 0]


def whole(mesh: Mesh, code: SparseCode, shape: tuple[int, int]) -> list[int]:
    """The flat numbers of everybody's matches together, sorted, with those that are there more than once."""
    rows = mesh.global_rows(shape[0])[code.token_ids()]
    flat = (rows * shape[1] + code.indices + mesh.bounds(shape[1])[0]).tolist()
    if mesh.sizes["all"] == 1:
        return sorted(flat)
    parts: list[Any] = [None] * mesh.sizes["all"]
    dist.all_gather_object(parts, flat)
    return sorted(itertools.chain(*parts))


def flat(code: SparseCode) -> list[int]:
    return (code.token_ids() * code.features + code.indices).tolist()


def samples() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    plain = torch.randn(BATCH, FEATURES, generator=made)
    return {
        "plain": plain,
        "ties": (plain * 2).round() / 2,
        "equal": torch.full((BATCH, FEATURES), 0.25),
        "negative": -plain.abs(),
        "few": torch.where(torch.rand(BATCH, FEATURES, generator=made) < 0.05, plain, -1.0),
        "bfloat16": plain.bfloat16(),
        "tiny": plain * 1e-42,
    }


def selections(world: int) -> dict[str, Any]:
    """Every choice on every mesh, against one process; and how many collectives each took."""
    counts = {}
    budgets = torch.arange(FEATURES) % 7
    for mesh, (name, z) in itertools.product(meshes(world), samples().items()):
        start, end = mesh.bounds(FEATURES)
        block = z[mesh.global_rows(BATCH)][:, start:end].contiguous()
        key = f"{mesh.sizes['data']}x{mesh.sizes['features']} {name}"

        mesh.counts.clear()
        found = mutual_choice(mesh, block, K * BATCH, batch=BATCH)
        counts[f"mutual {key}"] = dict(mesh.counts)
        wanted = allocate.mutual_choice(z, K * BATCH)
        assert whole(mesh, found.code, (BATCH, FEATURES)) == flat(wanted), ("mutual", key)
        assert torch.equal(found.smallest, smallest_chosen(wanted, per_feature=False)), ("smallest", key)
        found.code.check()
        for guess in (float(found.smallest) * 1.01, 1e-3):
            mesh.counts.clear()
            again = mutual_choice(mesh, block, K * BATCH, batch=BATCH, guess=guess).code
            assert whole(mesh, again, (BATCH, FEATURES)) == flat(wanted), ("guess", guess, key)
            counts[f"guess {guess > 1e-3} {key}"] = dict(mesh.counts)
        odd = mutual_choice(mesh, block, 41, batch=BATCH).code
        assert whole(mesh, odd, (BATCH, FEATURES)) == flat(allocate.mutual_choice(z, 41)), ("mutual 41", key)

        mesh.counts.clear()
        found = feature_choice(mesh, block, budgets[start:end], batch=BATCH)
        counts[f"feature {key}"] = dict(mesh.counts)
        wanted = allocate.feature_choice(z, budgets)
        assert whole(mesh, found.code, (BATCH, FEATURES)) == flat(wanted), ("feature", key)
        assert torch.equal(found.smallest, smallest_chosen(wanted, per_feature=True)[start:end]), ("smallest", key)
        found.code.check()

        idle = torch.arange(FEATURES) < FEATURES // 4  # none on the last shards
        mesh.counts.clear()
        local = [allocate.token_choice(block, 2 * K), idle_choice(block, idle[start:end], k_aux=2)]
        cuts = RowCuts(mesh, local, [2 * K, 2])
        counts[f"token {key}"] = dict(mesh.counts)
        for number, k, one in (
            (0, 2 * K, allocate.token_choice(z, 2 * K)),
            (0, K, allocate.token_choice(z, K)),
            (1, 2, idle_choice(z, idle, k_aux=2)),
        ):
            assert whole(mesh, cuts.cut(number, k), (BATCH, FEATURES)) == flat(one), ("token", k, key)
    return counts


def autograd(world: int) -> None:
    """A product over shards: values and gradients as without shards."""
    made = torch.Generator().manual_seed(5)
    x, w, v = (torch.randn(6, 12, generator=made, dtype=torch.float64) for _ in range(3))
    b = torch.randn(6, generator=made, dtype=torch.float64, requires_grad=True)
    w.requires_grad_()
    ((((x - b[:, None]) * w).tanh() * v).sum(1).square()).sum().backward()
    for mesh in meshes(world):
        start, end = mesh.bounds(12)
        part = w.detach()[:, start:end].clone().requires_grad_()
        bias = b.detach().clone().requires_grad_()
        inner = (x[:, start:end] - copy_to_shards(bias, mesh, "b")[:, None]) * part
        sum_of_shards((inner.tanh() * v[:, start:end]).sum(1), mesh, "sum").square().sum().backward()
        assert w.grad is not None
        torch.testing.assert_close(part.grad, w.grad[:, start:end])
        torch.testing.assert_close(bias.grad, b.grad)


def rows(world: int) -> None:
    """What processes harvest comes together as their data rank's rows, and as the whole batch; uneven too."""
    for mesh, batch in itertools.product(meshes(world), (BATCH, 8, 9, 7)):
        values = torch.arange(batch * 2.0).view(batch, 2)
        mine = values[mesh.stream_rank :: world]
        assert torch.equal(mesh.share_rows(mine, batch), values[mesh.global_rows(batch)])
        assert torch.equal(mesh.whole_batch(mine, batch), values)
        assert len(mesh.global_rows(batch)) == mesh.rows(batch)


def trained(world: int) -> dict[str, Any]:
    """Weights, thresholds and held-out measures of every autoencoder on every mesh."""
    out = {}
    for mesh in meshes(world):
        stream = Made(rank=mesh.stream_rank, world=world, batch=BATCH)
        held_out = {SITE: next(Made(seed=0, batch=2 * BATCH + 5)).values}
        results = train_on_stream(stream, named(SPECS, [SITE]), recipe(), mesh=mesh, held_out=held_out, show=False)
        assert results is not None
        out[f"{mesh.sizes['data']}x{mesh.sizes['features']}"] = {
            one.name: (one.autoencoder.state_dict(), one.measures, one.fitted) for one in results
        }
    return out


def collectives(world: int) -> dict[str, Any]:
    """How many collectives the last of some steps took, by what they were for, one autoencoder at a time."""
    out = {}
    for mesh in meshes(world):
        for spec in SPECS:
            stream = Made(rank=mesh.stream_rank, world=world, batch=BATCH)
            loop = Loop(stream, named([spec], [SITE]), recipe(), mesh, torch.device("cpu"))
            loop._start()
            for _ in range(6):
                loop._one_step()
            mesh.counts.clear()
            idle = loop.members[0].idle_total
            loop._one_step()
            out[f"{mesh.sizes['data']}x{mesh.sizes['features']} {spec.name}"] = {**mesh.counts, "idle": idle}
    return out


def problems(world: int) -> dict[str, str]:
    """What every process says when the data of one of them are bad or end."""
    said = {}
    for mesh in meshes(world):
        last = mesh.stream_rank == world - 1
        for name, stream in (
            ("nan", Made(rank=mesh.stream_rank, world=world, bad=4 if last else None)),
            ("end", Made(rank=mesh.stream_rank, world=world, length=5 if last else 99)),
        ):
            try:
                train_on_stream(stream, named(SPECS[:1], [SITE]), recipe(), mesh=mesh, show=False)
            except UserError as error:
                said[f"{name} {mesh.sizes['features']}"] = str(error)
    return said


def saved(world: int) -> Any:
    """Two processes stop after three steps; four, two and one go on from there."""
    folder = FOLDER / "stopped"
    if world == 2:
        mesh = Mesh(features=2)
        stream = Made(rank=mesh.stream_rank, world=2)
        members = named(SPECS, [SITE])
        assert (
            train_on_stream(stream, members, recipe(), mesh=mesh, run=RunFolder(folder), stop_at=3, show=False) is None
        )
    if world == 2:
        dist.barrier()
    mesh = Mesh(features=2 if world == 4 else 1)
    stream = Made(rank=mesh.stream_rank, world=world)
    run = RunFolder(FOLDER / f"on-{world}", main=mesh.is_main)
    if mesh.is_main:
        import shutil

        shutil.copytree(folder, run.path)
    if world > 1:
        dist.barrier()
    results = train_on_stream(stream, named(SPECS, [SITE]), recipe(), mesh=mesh, run=run, resume=True, show=False)
    assert results is not None
    return {one.name: one.autoencoder.state_dict() for one in results}


def loaded(world: int) -> Any:
    """The whole weights right after that checkpoint was read, before any step."""
    mesh = Mesh(features=2 if world == 4 else 1)
    stream = Made(rank=mesh.stream_rank, world=world)
    loop = Loop(stream, named(SPECS, [SITE]), recipe(), mesh, torch.device("cpu"))
    assert checkpoints.load_newest(RunFolder(FOLDER / "stopped"), mesh, loop.members, stream) is not None
    return {
        member.name: {
            name: value if name == "b_dec" else mesh.whole_features(value, member.spec.features, "test")
            for name, value in member.named().items()
        }
        for member in loop.members
    }


def full_disk(world: int) -> dict[str, str]:
    """What every process says when one of them cannot write its part of a checkpoint; and that no half of one is left."""
    import errno

    import sae.trainer.checkpoints as module

    mesh, real = Mesh(), module.save_state

    def failing(path: Path, state: Any) -> None:
        if mesh.places["all"] == world - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, state)

    module.save_state = failing
    folder = FOLDER / f"full-{world}"
    folder.mkdir(exist_ok=True)
    try:
        train_on_stream(
            Made(rank=mesh.stream_rank, world=world),
            named(SPECS[:1], [SITE]),
            recipe(),
            mesh=mesh,
            run=RunFolder(folder, main=mesh.is_main),
            show=False,
        )
    except UserError as error:
        return {"said": str(error), "left": str(sorted(path.name for path in folder.rglob("*")))}
    finally:
        module.save_state = real
    return {}


CASES = (selections, autograd, rows, trained, collectives, problems, saved, loaded, full_disk)


def process(rank: int, world: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{FOLDER}/meet-{world}", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for case in CASES:
        try:
            found[case.__name__] = case(world)
        except BaseException:
            found[case.__name__] = traceback.format_exc()
            break
    torch.save(found, FOLDER / f"{world}-{rank}.pt")


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    for size in (2, 4, 1):
        children = []
        for place in range(size):
            child = os.fork()
            if child == 0:
                process(place, size)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
