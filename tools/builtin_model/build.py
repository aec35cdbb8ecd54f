"""Rebuilds the built-in models from nothing: `python -m tools.builtin_model.build --out DIR`.

Invents the world, trains the tokenizer, trains `memorized` (general facts, forget and retain rows) and `retain_model` (the
same without the forget rows, from the same start), stores both in float16, loads what was stored, measures it and prints
the bounds. The two are trained side by side, each on one core: ten minutes where two cores are idle. Everything is built
in a temporary folder beside DIR and moved into place at the end; a missed bound leaves DIR as it was and exits with
status 1. The world's rows stand beside the models, DIR/data/forget.jsonl and so on, for every stage to read as files. Models
that DIR has already, of the same world, recipe and shape, are not built again unless `--again` says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import OlmoForCausalLM, PreTrainedTokenizerFast

from lm.builtin import VARIANTS, Variant
from lm.builtin.world import World, build, write
from lm.errors import UserError
from lm.loading import load
from lm.progress import progress
from lm.run_folder import writable
from tools.builtin_model.bounds import Abilities, Bound, bounds, measure
from tools.builtin_model.corpus import Corpus
from tools.builtin_model.tokenizer import save_tokenizer, train_tokenizer
from tools.builtin_model.training import Progress, Recipe, Shape, new_model, train

DATA = "data"
"""The folder beside the models that holds the world's rows."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """One finished model: what it can do, and what it cost."""

    variant: Variant
    abilities: Abilities
    bounds: tuple[Bound, ...]
    tokens: int
    seconds: float


def build_all(
    out: Path, *, seed: int = 0, recipe: Recipe | None = None, shape: Shape | None = None, side_by_side: bool = True
) -> list[Built]:
    """Build and measure both models under `out` (`out/memorized`, `out/retain_model`), and write the world's rows (`out/data`).

    Args:
        seed: the world's; the shipped models know world 0.
        side_by_side: train the retain model in a process of its own; the models are the same either way.

    Raises UserError if `out` cannot be written. A model that misses a bound is returned like the others, but `out` is
    then left untouched.
    """
    out = out.resolve()
    with writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    plan = (seed, temporary, recipe or Recipe(), shape or Shape())
    try:
        built = _side_by_side(*plan) if side_by_side else [_build_one(variant, *plan) for variant in VARIANTS]
        if all(bound.holds for model in built for bound in model.bounds):
            with writable(out):
                _write_rows(temporary / DATA, seed)
                _replace(temporary, out)
        return built
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def has_models(out: Path, *, seed: int = 0, recipe: Recipe | None = None, shape: Shape | None = None) -> bool:
    """Whether `out` holds both models of this world, recipe and shape, as they say themselves (`made.json`)."""
    wanted = _made(seed, recipe or Recipe(), shape or Shape())
    return all(
        (out / variant / "model.safetensors").is_file() and _made_of(out / variant) == wanted for variant in VARIANTS
    )


def write_data(out: Path, seed: int = 0) -> Path:
    """Write the rows of a world into `out/data`, in the place of what is there; returns that folder.

    Raises UserError if `out` holds models of another world or data that is nobody's world, or cannot be written.
    """
    for variant in VARIANTS:
        made = _made_of(out / variant)
        if made is not None and made["world"] != seed:
            raise UserError(
                f"{out} holds models of world {made['world']}, so rows of world {seed} do not belong there: give another folder, "
                f"or --seed {made['world']}"
            )
    folder = out.resolve() / DATA
    if folder.exists() and not (folder / "made.json").is_file():
        raise UserError(f"{folder} is there and was not written by this tool, so it is left alone: give another --out")
    with writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{DATA}.", dir=folder.parent))
        try:
            _write_rows(temporary, seed)
            _replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def measure_stored(folder: Path, world: World) -> Abilities:
    """What the model stored in `folder` can do, read as anyone would read it, in float32."""
    return measure(load(str(folder), device="cpu"), world)


def table(built: Sequence[Built]) -> str:
    """The bounds and the cost of each model as text."""
    lines = [f"{'model':<12} {'what':<22} {'value':>8}  {'bound':<14} holds"]
    for model in built:
        for bound in model.bounds:
            wanted = f">= {bound.least:g}" if bound.most == 1.0 else f"{bound.least:g} to {bound.most:g}"
            lines.append(
                f"{model.variant:<12} {bound.what:<22} {bound.value:>8.4f}  {wanted:<14} {'yes' if bound.holds else 'NO'}"
            )
        lines.append(f"{model.variant:<12} {'(reworded questions)':<22} {model.abilities.rewordings:>8.4f}")
        lines.append(f"{model.variant:<12} {model.tokens:,} tokens, {model.seconds:.0f} s")
    return "\n".join(lines)


def _side_by_side(seed: int, out: Path, recipe: Recipe, shape: Shape) -> list[Built]:
    """Both models at once, the retain model in a process of its own that ends with this one. A terminal shows one bar only."""
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            other = pool.submit(_build_one, "retain_model", seed, out, recipe, shape, not sys.stderr.isatty())
            return [_build_one("memorized", seed, out, recipe, shape), other.result()]
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _build_one(variant: Variant, seed: int, out: Path, recipe: Recipe, shape: Shape, shown: bool = True) -> Built:
    """Build one model on one thread: more threads gain little on a model this small and lose much on a busy machine."""
    start = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        world = build(seed)
        tokenizer = train_tokenizer(world)
        rows = (*world.forget, *world.retain) if variant == "memorized" else world.retain
        model = new_model(tokenizer, shape, recipe.seed)
        with progress(recipe.steps, label=variant, unit="steps", enabled=shown) as advance:

            def report(state: Progress) -> None:
                advance(1, loss=state.loss, recited=state.recited, sure=state.confidence)

            tokens = train(model, Corpus(world, rows, tokenizer), recipe, report)
        folder = out / variant
        _store(model, tokenizer, folder, recipe, shape, seed)
        abilities = measure_stored(folder, world)
    finally:
        torch.set_num_threads(threads)
    return Built(
        variant=variant,
        abilities=abilities,
        bounds=bounds(variant, abilities),
        tokens=tokens,
        seconds=time.monotonic() - start,
    )


def _store(
    model: OlmoForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: Recipe, shape: Shape, seed: int
) -> None:
    with writable(folder):
        folder.mkdir(parents=True)
        nn.Module.half(model).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        made = {**_made(seed, recipe, shape), "torch": torch.__version__}
        (folder / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _write_rows(folder: Path, seed: int) -> None:
    write(folder, build(seed))
    (folder / "made.json").write_text(json.dumps({"world": seed}) + "\n", encoding="utf-8")


def _made(seed: int, recipe: Recipe, shape: Shape) -> dict[str, Any]:
    """What a model follows from."""
    return {"world": seed, "recipe": asdict(recipe), "shape": asdict(shape)}


def _made_of(folder: Path) -> dict[str, Any] | None:
    """The same as a stored model says it; None where there is none, or one that does not say."""
    try:
        made = json.loads((folder / "made.json").read_text(encoding="utf-8"))
        return {name: made[name] for name in ("world", "recipe", "shape")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(new: Path, target: Path) -> None:
    """Put the folder `new` where `target` is; what stood there goes only once the new one stands."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    shutil.copytree(new, target) if new.stat().st_dev != target.parent.stat().st_dev else new.rename(target)
    target.chmod(0o755)
    shutil.rmtree(old, ignore_errors=True)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.builtin_model.build", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for memorized/, retain_model/ and data/; replaced"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default 0: the one that is shipped)")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="train the retain model after the other, not beside it"
    )
    parser.add_argument("--again", action="store_true", help="build the models also where --out has them already")
    parser.add_argument("--data-only", action="store_true", help="write the world's rows (data/) and build no model")
    options = parser.parse_args(words)
    try:
        if options.data_only:
            print(f"the rows of world {options.seed} are in {write_data(options.out, options.seed)}")
            return 0
        if not options.again and has_models(options.out, seed=options.seed):
            data = write_data(options.out, options.seed)
            print(
                f"{options.out} has the models of world {options.seed} already: they are not built again (see --again)"
            )
            print(f"its rows are in {data}")
            return 0
        built = build_all(options.out, seed=options.seed, side_by_side=not options.one_at_a_time)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped: {options.out} was left as it was", file=sys.stderr)
        return 130
    print(table(built))
    if all(bound.holds for model in built for bound in model.bounds):
        return 0
    print(f"error: a bound is missed, so {options.out} was left as it was; try another --seed", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
