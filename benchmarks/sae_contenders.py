"""One contender of `benchmarks/sae.py` in a process of its own: builds its autoencoder, then steps when told to.

    python -m benchmarks.sae_contenders '{"name": "ours", ...}'

Speaks JSON, one line a message: `steps` in, seconds and losses out; an empty line ends it with the peak of memory. Each
contender trains the same start weights on the same activations with its own forward pass, loss and training step, as
its own trainer takes it; sparsify's step is put together here in the order of its `Trainer.fit`, which takes a whole
language model. The loss reported is always the fraction of variance unexplained, before the step.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[Any], Any]
"""Activations (tokens, hidden) in; the loss as the contender has it out, a number or a tensor."""


def main(asked: dict[str, Any], say: Callable[[Any], None]) -> None:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(asked["threads"])
    make, package = CONTENDERS[asked["name"]]
    prepare = make(asked)  # imports
    device = asked["device"]
    held = memory("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    given = {name: tensor.to(device) for name, tensor in load_file(asked["file"]).items()}
    batches = given["activations"].split(asked["tokens"])
    scales = [float((x - x.mean(0)).square().sum(1).mean()) for x in batches]
    step, optimizer, unit = prepare(given["w_dec"])
    del given
    if device == "cpu":
        forget_peak()
    else:
        torch.cuda.reset_peak_memory_stats()
    say({"version": _version(package), "optimizer": optimizer})
    done = 0
    while line := sys.stdin.readline().strip():
        losses, started, busy = [], time.perf_counter(), time.process_time()
        for number in range(done, done + int(line)):
            place = number % len(batches)
            losses.append((step(batches[place]), 1.0 if unit == "fvu" else scales[place]))
        if device != "cpu":
            torch.cuda.synchronize()
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        done += int(line)
        say({"seconds": seconds, "cpu": busy, "losses": [float(loss) / scale for loss, scale in losses]})
    say({"peak": memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(), "held": held})


def ours(asked: dict[str, Any]) -> Any:
    """This project: one sparse node, unit-norm decoder, firing counts and, for mutual choice, the running threshold."""
    import torch

    from sae import Firings, RunningThreshold, mutual_choice, token_choice
    from sae.kernels import Selection, encode_decode, take_parallel_, unit_rows_
    from sae.trainer.zipf_fit import moved

    k, mutual = asked["k"], asked["choice"] == "mutual"

    def by_token(z: Any, start: int) -> Selection:
        return Selection(token_choice(z, k))

    def by_batch(z: Any) -> Selection:
        return Selection(mutual_choice(z, k * len(z)))

    def prepare(w_dec: Any) -> tuple[Step, str, str]:
        features, hidden = w_dec.shape
        shapes = [w_dec.clone(), w_dec.new_zeros(features), w_dec.clone(), w_dec.new_zeros(hidden)]
        w_enc, b_enc, decoder, b_dec = (torch.nn.Parameter(weight) for weight in shapes)
        adam = torch.optim.Adam([w_enc, b_enc, decoder, b_dec], lr=asked["rate"], fused=True)
        state = {"firings": moved(Firings.start(features), w_dec.device), "threshold": RunningThreshold.start()}

        def step(x: Any) -> Any:
            got = encode_decode(
                x, w_enc, b_enc, decoder, b_dec, by_batch if mutual else by_token, splits=None if mutual else "tokens"
            )
            loss = (got.x_hat + b_dec - x).square().sum(1).mean()
            loss.backward()
            state["firings"] = state["firings"].update(got.code)
            if mutual:
                state["threshold"] = state["threshold"].update(got.code)
            take_parallel_(decoder.grad, decoder.data)
            adam.step()
            adam.zero_grad()
            unit_rows_(decoder.data)
            return loss.detach()

        return step, "Adam fused", "sum"

    return prepare


def saelens(asked: dict[str, Any]) -> Any:
    """SAELens: `SAETrainer.step`, which clips gradients and counts firings."""
    import torch
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sparse = asked["name"] == "saelens_sparse"

    def prepare(w_dec: Any) -> tuple[Step, str, str]:
        features, hidden = w_dec.shape
        common = {
            "d_in": hidden,
            "d_sae": features,
            "k": asked["k"],
            "device": asked["device"],
            "use_sparse_activations": sparse,
        }
        if asked["choice"] == "mutual":
            model = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
        else:
            model = TopKTrainingSAE(TopKTrainingSAEConfig(**common))
        with torch.no_grad():
            model.W_dec.copy_(w_dec)
            model.W_enc.copy_(w_dec.T)
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=10**9,
                train_batch_size_samples=asked["tokens"],
                lr=asked["rate"],
                lr_end=asked["rate"],
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae=model,
            data_provider=iter(()),
        )
        if asked["optimizer"] == "same":
            trainer.optimizer = torch.optim.Adam(model.parameters(), lr=asked["rate"], fused=True)

        def step(x: Any) -> Any:
            out = trainer.step(x)
            trainer.n_training_steps += 1
            return out.losses["mse_loss"].detach()

        return step, "Adam fused" if asked["optimizer"] == "same" else "Adam", "sum"

    return prepare


def dictionary_learning(asked: dict[str, Any]) -> Any:
    """dictionary_learning: `Trainer.update`, which projects and clips gradients and keeps the decoder at unit norm."""
    import torch
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    def prepare(w_dec: Any) -> tuple[Step, str, str]:
        features, hidden = w_dec.shape
        trainer = (BatchTopKTrainer if asked["choice"] == "mutual" else TopKTrainer)(
            steps=10**6,
            activation_dim=hidden,
            dict_size=features,
            k=asked["k"],
            layer=0,
            lm_name="none",
            lr=asked["rate"],
            warmup_steps=0,
            device=asked["device"],
        )
        with torch.no_grad():
            trainer.ae.decoder.weight.copy_(w_dec.T)
            trainer.ae.encoder.weight.copy_(w_dec)
        if asked["optimizer"] == "same":
            trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=asked["rate"], fused=True)
        number = iter(range(1, 10**9))  # at step 0 it would replace the pre-bias by a median

        def step(x: Any) -> Any:
            return trainer.update(next(number), x)

        return step, "Adam fused" if asked["optimizer"] == "same" else "Adam", "sum"

    return prepare


def sparsify(asked: dict[str, Any]) -> Any:
    """EleutherAI's sparsify (on a GPU its Triton decoder): SignSGD with ScheduleFree as it ships, or Adam; token choice."""
    import torch
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    def prepare(w_dec: Any) -> tuple[Step, str, str]:
        features, hidden = w_dec.shape
        model = SparseCoder(hidden, SparseCoderConfig(num_latents=features, k=asked["k"]), w_dec.device, torch.float32)
        with torch.no_grad():
            model.encoder.weight.copy_(w_dec)
            model.W_dec.copy_(w_dec)
        name = "Adam fused" if asked["optimizer"] == "same" else "SignSGD + ScheduleFree"
        if asked["optimizer"] == "same":
            optimizer = torch.optim.Adam(model.parameters(), lr=asked["rate"], fused=True)
        else:
            rate = 5e-3 / (features / 2**14) ** 0.5  # its own rule
            optimizer = ScheduleFreeWrapper(SignSGD(model.parameters(), lr=rate), momentum=0.95)
            optimizer.train()
        silent = torch.zeros(features, dtype=torch.int64, device=w_dec.device)

        def step(x: Any) -> Any:
            model.set_decoder_norm_to_unit_norm()
            fired = torch.zeros(features, dtype=torch.bool, device=w_dec.device)
            out = model(x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
            fired[out.latent_indices.flatten()] = True
            out.fvu.backward()
            model.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            silent.add_(len(x))
            silent[fired] = 0
            return out.fvu.detach()

        return step, name, "fvu"

    return prepare


CONTENDERS = {
    "ours": (ours, "palimpsest-unlearning"),
    "saelens": (saelens, "sae-lens"),
    "saelens_sparse": (saelens, "sae-lens"),
    "sparsify": (sparsify, "eai-sparsify"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def memory(which: str) -> int:
    """Resident bytes of this process now ("VmRSS") or at most since `forget_peak` ("VmHWM")."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(which))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Building may pass through a peak of its own; what training needs is asked here. Linux only, else kept."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not mix with the messages
    main(json.loads(sys.argv[1]), lambda message: print(json.dumps(message), file=channel, flush=True))
