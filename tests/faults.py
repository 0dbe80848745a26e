"""Faults that tests inject into runs from outside, since the product has no hooks for them.

python tests/faults.py --trials N                            # kill a run at random moments, N times; compare the ends
python tests/faults.py EXPRESSION --train=...                # under torchrun: train.py with a fault in every rank
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import runs
import tiny
from runs import wait_for

import data
import dist_utils
import train
from model import TreeModel
from training import checkpoints


def arguments(world: Path, output: Path, **settings) -> list[str]:
    """Arguments of a run that keeps every checkpoint and resumes where it was interrupted."""
    return runs.arguments(world, output, **({"keep": 9, "resume": "auto"} | settings))


def torchrun(argv: list[str], log: Path, fault: str = "", options: tuple = ()) -> subprocess.Popen:
    """train.py on two ranks under torchrun; `fault`, an expression of this module, is evaluated in each rank first."""
    command = [runs.ROOT / "tests" / "faults.py", fault] if fault else [runs.ROOT / "train.py"]
    return runs.torchrun(*command, *argv, log=log, options=options)


def copy_until(finished: Path, step: int, output: Path) -> Path:
    """A copy of a finished run as it was after `step` steps."""
    shutil.copytree(finished, output)
    for folder in checkpoints.checkpoints(output):
        if int(folder.name[-6:]) > step:
            shutil.rmtree(folder)
    return output


def clean(output: Path) -> bool:
    """Whether a run's folder holds no partial files and no damaged checkpoints."""
    partial_files = list(output.glob(f"{checkpoints.PARTIAL}*"))
    return not partial_files and not any(map(checkpoints.damage, checkpoints.checkpoints(output)))


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


# -------------------------------------------------------------------------------------------------------------- faults


def at_step(step: int, action, rank: int | None = None) -> None:
    """Call `action()` before step `step`, on one rank or on all."""
    real = train.train_step

    def train_step(model, optimizer, micro_batches, *rest):
        if micro_batches[0].assignment.step.number + 1 == step and rank in (None, int(os.environ.get("RANK", 0))):
            action()
        return real(model, optimizer, micro_batches, *rest)

    train.train_step = train_step


def no_reader(then=lambda: None) -> None:
    """Make standard output and error a pipe that nobody reads, as a terminal that is gone: each write fails."""
    reader, writer = os.pipe()
    os.close(reader)
    _print_to(writer)
    then()


def no_output(then) -> None:
    """Close standard output and error, as `>&-` does."""
    sys.stdout = sys.stderr = None
    os.close(1)
    os.close(2)
    then()


def sleeping_reader() -> None:
    """Send standard output and error to a pipe that is full, and stays so: each write waits for ever."""
    _reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    _print_to(writer)


def number_of_a_new_file(_argv, _stop) -> int:
    return os.open(os.devnull, os.O_RDONLY)


def full_output(then) -> None:
    """Send standard output and error to a disk that is full."""
    _print_to(os.open("/dev/full", os.O_WRONLY))
    then()


def _print_to(descriptor: int) -> None:
    for standard in (1, 2):
        os.dup2(descriptor, standard)


def kill_me(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("injected")


def nan_loss(steps: range, rank: int = 0) -> None:
    """Make the loss of these steps (counted from 0) NaN on one rank."""
    forward = TreeModel.forward

    def poisoned(self, batch):
        losses, right = forward(self, batch)
        spoiled = self.training and batch.assignment.step is not None and batch.assignment.step.number in steps
        return (losses * float("nan") if spoiled and rank == int(os.environ.get("RANK", 0)) else losses), right

    TreeModel.forward = poisoned


def kill_in_save(place: str, step: int = 4) -> None:
    """Kill this process at a given place in the save of a step."""
    real_write, real_replace, real_sync = checkpoints.write_checkpoint, os.replace, checkpoints.flush_to_disk

    def write(folder, model, state):
        if state["step"] != step:
            return real_write(folder, model, state)
        if place == "before the first file":
            kill_me()
        if place == "in the middle of a file":
            real_bytes = Path.write_bytes
            Path.write_bytes = lambda path, content: (real_bytes(path, content[: len(content) // 2]), kill_me())
        if place == "before the manifest":
            real_text = Path.write_text
            Path.write_text = lambda path, *rest, **options: (path.name == "manifest.json" and kill_me(),
                                                          real_text(path, *rest, **options))  # fmt: skip
        if place == "before the rename":
            os.replace = lambda *_: kill_me()
        if place == "after the rename":
            os.replace = lambda *names: (real_replace(*names), kill_me())
        if place == "before old ones are dropped":
            checkpoints.shutil.rmtree = lambda *_, **__: kill_me()
        real_write(folder, model, state)
        checkpoints.flush_to_disk = real_sync

    checkpoints.write_checkpoint = write


def rank_0_comes_late() -> None:
    time.sleep(0 if int(os.environ["RANK"]) else 3)


def ascii_terminal() -> None:
    """Print as to a terminal that can't show every character of a row."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def fail_over_a_strange_name(_argv, _stop) -> int:
    print("█")
    raise RuntimeError("/gloom/a.jpg")


def short_timeouts(seconds: int, then) -> None:
    dist_utils.TIMEOUT_IN_STEPS = dist_utils.timedelta(seconds=seconds)
    dist_utils.STACKS_AFTER = 2
    then()


def stall_in_worker() -> None:
    """Let a data worker hang at its fourth picture."""
    data.STALLED_AFTER, real, count = 3, data.load_patches, iter(range(1000))

    def load_patches(*args):
        if os.environ.get("ONELOOK_TEST_MAIN") != str(os.getpid()) and next(count) > 2:
            time.sleep(30)  # longer than the loader waits, and not so long that it outlives the tests
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
    """Make every step take longer, so that a signal or kill can hit one."""
    real = train.train_step
    train.train_step = lambda *args: (time.sleep(seconds), real(*args))[1]


def first_time(flag: Path, action) -> None:
    """Call `action()` in the first process that gets here, not in restarted ones."""
    if not flag.exists():
        flag.touch()
        action()


# -------------------------------------------------------------------------------------------------------- random trials


TARGETS = ["a rank", "all ranks", "torchrun"]


def kill_until_done(argv: list[str], log: Path, generator: random.Random, targets: list[str]) -> list[str]:
    """Start a run once for each of `targets`, kill that target at a random moment, and then let the run finish.

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
        ranks, everything = runs.workers_of(launcher), runs.descendants(launcher.pid)
        runs.kill({"a rank": ranks[-1:], "all ranks": ranks, "torchrun": [launcher.pid]}[target])
        launcher.wait(timeout=60)
        wait_for(partial(runs.gone, everything), 60, log.read_text)
    return story


def random_trials(count: int) -> None:
    folder = Path(tempfile.mkdtemp())
    world = tiny.write_world(folder)
    torchrun(arguments(world, folder / "undisturbed"), folder / "log").wait()
    for trial in range(count):
        generator = random.Random(trial)
        argv = arguments(world, folder / str(trial))
        story = kill_until_done(argv, folder / "log", generator, generator.choices(TARGETS, k=3))
        equal = runs.same(folder / str(trial), folder / "undisturbed")
        print(f"trial {trial}: {'same' if equal else 'DIFFERENT'} after {story}", flush=True)


def main(argv: list[str]) -> None:
    if argv[0] == "--trials":
        random_trials(int(argv[1]))
    else:
        eval(argv[0])
        dist_utils.run_and_exit(train.main, argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
