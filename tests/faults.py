"""Runs of train.py in processes of their own, with faults injected from outside: the product has no hooks for them.

A server process that has imported the product is forked for each rank: a moment where an import takes seconds.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import data
import dist_utils
import train
from training import checkpoints

HERE = Path(__file__).parent
SETTINGS = {"batch-size": 8, "max-steps": 6, "max-tokens": 700, "lr": 0.02, "eval-every": 2, "save-every": 2}
SETTINGS |= {"log-every": 1, "workers": 0, "keep": 9, "lora-dropout": 0.1, "resume": "auto"}


def arguments(world: Path, output: Path, **settings) -> list[str]:
    """A run of 6 steps of 8 questions, evaluated and saved every 2, that goes on where it was interrupted."""
    given = {"train": world / "rows.jsonl", "val": world / "rows.jsonl", "images": world / "images"}
    given |= {"model": world / "model", "output": output} | SETTINGS
    return [f"--{n}={v}" for n, v in (given | {n.replace("_", "-"): v for n, v in settings.items()}).items()]


def result(output: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step:06d}" / "adapter_model.safetensors")


def same(left: Path, right: Path) -> bool:
    """Whether two runs ended with the same adapter, bit by bit, and wrote the same losses and accuracies."""
    a, b = result(left), result(right)
    return all(torch.equal(a[name], b[name]) for name in b) and losses(left) == losses(right)


def losses(output: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"], line.get("loss"), line.get("exact_match")) for line in lines]


# ------------------------------------------------------------------------------------------------------------ starting


class Run:
    """train.py on `ranks` ranks without torchrun; `fault` is called in each before it starts."""

    def __init__(self, argv: list[str], log: Path, ranks: int = 1, fault=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["faults"])
        self.log, environment = log, {}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            environment |= {"WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            mine = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            self.processes.append(context.Process(target=_rank, args=(argv, log, mine, fault)))
            self.processes[-1].start()

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit codes, negative for signals. Kills what has not ended in time."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"still running after {timeout} s:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        return self.log.read_text()

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, number)

    def reached(self, text: str, timeout: float = 60) -> None:
        wait_for(lambda: text in self.text(), timeout, self.text)


def _rank(argv, log, environment, fault) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a program started by itself
    torch.set_num_threads(1)
    if fault:
        fault()
    dist_utils.run_and_exit(train.main, argv)


def wait_for(condition, timeout: float, explain=lambda: "") -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.02)


def torchrun(argv: list[str], log: Path, ranks: int = 2, launcher: tuple = (), fault: str = "") -> subprocess.Popen:
    """train.py under torchrun, `fault` (an expression of this module) called in each rank first."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher]
    command += [str(HERE / "faults.py"), fault] if fault else [str(HERE.parent / "train.py")]
    with open(log, "a") as file:
        return subprocess.Popen([*command, *argv], env=environment, stdout=file, stderr=file)


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


# -------------------------------------------------------------------------------------------------------------- faults


def at_step(step: int, action, rank: int | None = None) -> None:
    """Call `action()` before step `step`, on one rank or on all."""
    real = train.train_step

    def train_step(model, optimizer, micro_batches, *rest):
        if micro_batches[0].work.step.number + 1 == step and rank in (None, int(os.environ.get("RANK", 0))):
            action()
        return real(model, optimizer, micro_batches, *rest)

    train.train_step = train_step


def kill_me(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("injected")


def kill_in_save(place: str, step: int = 4) -> None:
    """SIGKILL at a place of the save of a step."""
    real_write, real_rename, real_sync = checkpoints.write_checkpoint, os.rename, checkpoints.flush_to_disk

    def write(folder, model, state):
        if state["step"] != step:
            return real_write(folder, model, state)
        if place == "before the first file":
            kill_me()
        if place == "in the middle of a file":
            checkpoints.torch.save = lambda _state, file: (file.write(b"half of it"), file.flush(), kill_me())
        if place == "before the manifest":
            real_text = Path.write_text
            Path.write_text = lambda path, *rest, **how: (path.name == "manifest.json" and kill_me(),
                                                          real_text(path, *rest, **how))  # fmt: skip
        if place == "before the rename":
            os.rename = lambda *_: kill_me()
        if place == "after the rename":
            os.rename = lambda *names: (real_rename(*names), kill_me())
        if place == "before old ones are dropped":
            checkpoints.shutil.rmtree = lambda *_, **__: kill_me()
        real_write(folder, model, state)
        checkpoints.flush_to_disk = real_sync

    checkpoints.write_checkpoint = write


def short_timeouts(seconds: int, then) -> None:
    dist_utils.TIMEOUT_IN_STEPS = dist_utils.timedelta(seconds=seconds)
    dist_utils.STACKS_AFTER = 2
    then()


def stall_in_worker() -> None:
    """A data worker never comes back from its third picture on."""
    data.STALLED_AFTER, real, count = 3, data.load_patches, iter(range(1000))

    def load_patches(*args):
        if os.environ.get("ONELOOK_TEST_MAIN") != str(os.getpid()) and next(count) > 2:
            time.sleep(1000)
        return real(*args)

    os.environ["ONELOOK_TEST_MAIN"] = str(os.getpid())
    data.load_patches = load_patches


def fill_disk(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


def slowly(seconds: float) -> None:
    """Steps that take a while, so that something can happen to them."""
    real = train.train_step
    train.train_step = lambda *args: (time.sleep(seconds), real(*args))[1]


def first_time(flag: Path, action) -> None:
    """An action that happens once, whatever starts again."""
    if not flag.exists():
        flag.touch()
        action()


# -------------------------------------------------------------------------------------------------------- random trials


TARGETS = ["a rank", "all ranks", "torchrun"]


def kill_until_done(argv: list[str], log: Path, generator: random.Random, targets: list[str]) -> list[str]:
    """Start a run over and over, each time killing the next of `targets` at a random moment, until it is done.

    Returns what was killed and when.
    """
    story = []
    for target in [*targets, "nothing"]:
        launcher = torchrun(argv, log, fault="slowly(0.2)")
        delay = 120 if target == "nothing" else generator.uniform(5, 9)
        try:
            assert launcher.wait(timeout=delay) == 0, log.read_text()[-3000:]
            break
        except subprocess.TimeoutExpired:
            story.append(f"{target} after {delay:.1f} s")
        pids, everything = workers_of(launcher), descendants(launcher.pid)
        targets = {"a rank": pids[-1:], "all ranks": pids, "torchrun": [launcher.pid]}[target]
        for pid in targets:
            os.kill(pid, signal.SIGKILL)
        launcher.wait(timeout=60)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everything), 60, log.read_text)  # noqa: B023
    return story


def main() -> None:
    """python tests/faults.py --trials N: kill runs at random, N times; not part of the tests. Else: under torchrun."""
    if sys.argv[1] == "--trials":
        import tempfile

        import tiny

        folder = Path(tempfile.mkdtemp())
        world = tiny.write_world(folder)
        torchrun(arguments(world, folder / "undisturbed"), folder / "log").wait()
        for trial in range(int(sys.argv[2])):
            generator = random.Random(trial)
            argv = arguments(world, folder / str(trial))
            story = kill_until_done(argv, folder / "log", generator, generator.choices(TARGETS, k=3))
            equal = same(folder / str(trial), folder / "undisturbed")
            print(f"trial {trial}: {'same' if equal else 'DIFFERENT'} after {story}", flush=True)
    else:
        eval(sys.argv[1], globals() | {"partial": partial})
        dist_utils.run_and_exit(train.main, sys.argv[2:])


if __name__ == "__main__":
    main()
