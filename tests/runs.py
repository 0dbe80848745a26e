"""Runs of the commands on a tiny model, and what they leave behind.

A run costs a second, but a process that imports train.py costs five. So most runs take place in the test's process;
`Run` forks ranks from a server process that has imported everything; `torchrun` starts the real launcher, for tests
where the launcher matters.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import dist_utils
import eval  # noqa: F401 (the server of `Run` imports it with this module)
import train

ROOT = Path(__file__).parents[1]
SETTINGS = {"batch-size": 8, "max-steps": 6, "max-tokens": 700, "lr": 0.02, "eval-every": 2, "save-every": 2}
SETTINGS |= {"log-every": 1, "workers": 0, "keep": 2, "lora-dropout": 0.1}


def arguments(world: Path, output: Path, **settings) -> list[str]:
    """train.py's arguments for 6 steps of 8 questions, with an evaluation and a checkpoint every 2 steps."""
    paths = {"train": world / "rows.jsonl", "val": world / "rows.jsonl", "images": world / "images"}
    paths |= {"model": world / "model", "output": output}
    changed = {name.replace("_", "-"): value for name, value in settings.items()}
    return [f"--{name}={value}" for name, value in (paths | SETTINGS | changed).items()]


def lines(output: Path, event: str) -> list[dict]:
    """The lines of metrics.jsonl for an event: train, eval or skipped."""
    every_line = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every_line if line["event"] == event]


def losses(output: Path) -> list[tuple]:
    every_line = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"], line.get("loss"), line.get("exact_match")) for line in every_line]


def adapter(output: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step:06d}" / "adapter_model.safetensors")


def same(left: Path, right: Path, step: int = 6) -> bool:
    """Whether two runs ended with the same adapter, bit for bit, and wrote the same losses and accuracies."""
    ours, theirs = adapter(left, step), adapter(right, step)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs) and losses(left) == losses(right)


def wait_for(condition: Callable, timeout: float, explain: Callable = lambda: "") -> None:
    """Wait until `condition()` holds; fail with `explain()` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.02)


class Run:
    """A command on `ranks` ranks without torchrun. `fault` is called in each rank before the command starts.

    main: `train.main` or another function of (arguments, stop) that the forked process can import.
    """

    def __init__(self, argv: list, log: Path, ranks: int = 1, fault: Callable | None = None, main=train.main):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["faults", "rank_steps"])
        self.log, common, argv = log, {}, list(map(str, argv))
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            common |= {"WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            self.processes.append(context.Process(target=_rank, args=(main, argv, log, environment, fault)))
            self.processes[-1].start()

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit codes, negative for signals. Kills what has not ended in time, which is a failure."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"still running after {timeout} s:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def succeed(self, timeout: float = 300) -> str:
        """Wait until all ranks have exited with 0; returns their output."""
        assert self.wait(timeout) == [0] * len(self.processes), self.text()
        return self.text()

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, number)

    def reached(self, text: str, timeout: float = 60) -> None:
        wait_for(lambda: text in self.text(), timeout, self.text)


def _rank(main, argv, log, environment, fault) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a program started by itself
    torch.set_num_threads(1)
    if fault:
        fault()
    dist_utils.run_and_exit(main, argv)


def torchrun(*command, log: Path, ranks: int = 2, options: tuple = (), cwd: Path | None = None) -> subprocess.Popen:
    """Start a script under torchrun on CPU ranks of one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    with open(log, "a") as file:
        return subprocess.Popen([*launcher, *map(str, command)], env=environment, cwd=cwd, stdout=file, stderr=file)


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of torchrun's ranks, in their order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in descendants(child)]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        os.kill(pid, number)
