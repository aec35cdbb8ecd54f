"""Scripts in processes of their own, started in a moment: forked from a server that has imported the heavy libraries.

Importing them takes seconds of a core, and a test of a script is about the script. The real commands (`python`, `accelerate
launch`) are kept where the start itself is what is tested: `tests/lm/test_devices.py` and the tests of refusals and kills.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch.distributed import TCPStore

from unlearn.processes import HEAVY

ROOT = Path(__file__).resolve().parents[1]
_LEAVING = 20.0
"""Seconds that the other processes have after one has failed."""


def run_forked(
    path: Path, *words: str, launch: str | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end with one thread a process; what all its processes wrote, and the status of the first to fail.

    Args:
        path: the script, or a module of the checkout that is run as one.
        launch: a config of `configs/accelerate` by name: as many processes, with accelerate's environment for it.

    Raises:
        subprocess.TimeoutExpired: it takes longer than `timeout` seconds; nothing is left running.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    with tempfile.TemporaryDirectory() as folder:
        outputs = []
        running = []
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # here, as torch's launcher does
        for rank, variables in enumerate(_environments(launch, store.port)):
            outputs.append(Path(folder) / str(rank))
            started = context.Process(target=_script, args=(str(path), words, variables, str(outputs[-1])))
            started.start()
            running.append(started)
        status = 0
        try:
            while running:
                ended = wait([one.sentinel for one in running], _LEAVING if status else timeout)
                for one in running:
                    if one.sentinel in ended:
                        one.join()
                        status = status or one.exitcode or 0
                running = [one for one in running if one.sentinel not in ended]
                if not ended and not status:
                    raise subprocess.TimeoutExpired([str(path), *words], timeout)
                if not ended:
                    break
        finally:
            for one in running:
                one.kill()
                one.join()
        out, err = ("".join(_read(output, end) for output in outputs) for end in ("out", "err"))
    return subprocess.CompletedProcess([str(path), *words], status, out, err)


def _read(output: Path, end: str) -> str:
    path = output.with_suffix(f".{end}")
    return path.read_text() if path.exists() else ""


def _environments(launch: str | None, port: int) -> list[dict[str, str]]:
    """The variables of each process, as `accelerate launch` and torch's launcher set them; `port` is that of the store."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    if launch is None:
        return [own]
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = [
        "--config_file",
        str(ROOT / "configs" / "accelerate" / f"{launch}.yaml"),
        "--main_process_port",
        "0",
        "script",
    ]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    own = {**prepare_multi_gpu_env(args), **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store outlives every process of the run
    count = str(args.num_processes)
    return [
        {**own, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        for rank in map(str, range(args.num_processes))
    ]


def _script(path: str, words: Sequence[str], variables: Mapping[str, str], output: str) -> None:
    """Of the new process: be `python path words`; of a module of the checkout that is no script, `python -m` its name."""
    for end, stream in (("out", sys.stdout), ("err", sys.stderr)):
        with open(f"{output}.{end}", "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv, sys.path = [path, *words], [str(ROOT), *sys.path]
    script = Path(path)
    if script.parent == ROOT / "scripts" or not script.is_relative_to(ROOT):
        sys.path.insert(0, str(script.parent))
        runpy.run_path(path, run_name="__main__")
    else:
        runpy.run_module(".".join(script.relative_to(ROOT).with_suffix("").parts), run_name="__main__", alter_sys=True)
