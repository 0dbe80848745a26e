"""Process group, ranks, signals, and the few collectives that a run needs. No other file uses torch.distributed.

Every helper is a no-op on one process, so the same code runs with and without torchrun.
"""

import ctypes
import errno
import faulthandler
import gc
import io
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from common import InputError, is_rank0, printable

TIMEOUT = timedelta(minutes=60)  # the first start may download a model while the other ranks wait
TIMEOUT_IN_STEPS = timedelta(minutes=10)  # longer than any step, evaluation or save
SHUTDOWN_TIMEOUT = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))  # seconds; then torchrun kills
STACKS_AFTER = max(1, SHUTDOWN_TIMEOUT - 10)  # seconds from a signal to printing where this process hangs
SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP  # ask a run to stop
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LET_RANK0_SPEAK = 20  # seconds that other ranks wait for rank 0 to print a common error
GIVE_READERS = 1  # seconds that a full terminal or pipe has for being read, once this process is to stop
STOPPED = 75  # exit code of a run that was stopped and can be resumed (EX_TEMPFAIL)


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> Ranks:
    """Join the process group that torchrun describes in the environment; a single process needs none.

    Tensors on GPUs travel by NCCL, tensors and objects on the CPU by gloo. Raises InputError on a node with more
    processes than GPUs.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = torch.cuda.is_available()
    processes, gpus = processes_on_node(), torch.cuda.device_count()
    if use_cuda and processes > gpus:
        raise InputError(f"{processes} processes on a node where {gpus} GPU(s) are seen: --nproc_per_node={gpus}")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # fails at once where torchrun is gone already
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60).close()
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun may keep the store over a restart: without a prefix a rank could read the address of one that is gone
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world_size)
    return Ranks(rank, world_size, device)


def shorten_timeout() -> None:
    """From here on, a rank that hangs is noticed within TIMEOUT_IN_STEPS."""
    if dist.is_initialized():
        _set_pg_timeout(TIMEOUT_IN_STEPS)


def processes_on_node() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def restarted() -> bool:
    """Whether torchrun started this process again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def leave() -> None:
    """Leave the group. Call it after the last reference to the DDP model is gone: a live one can abort the exit."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ signals and failures


class Stop:
    """Why this process should stop after the current step: a signal's name or another reason; empty: it goes on.

    Until there is something to save, a signal ends the process at once: loading a model or compiling may take minutes.
    """

    reason = ""
    saves_first = False
    status: tuple[Path, str] | None = None  # a file and what a signal that ends the process at once writes into it

    def save_first(self) -> None:
        """From here on, a signal only sets the reason, and whoever asks for it saves and stops."""
        self.saves_first = True

    def watch_signals(self) -> "Stop":
        for number in SIGNALS:
            if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # nohup
                signal.signal(number, self._ask)
        signal.signal(signal.SIGALRM, _give_up_unread_output)
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a torchrun that is killed leaves no orphans
        return self

    def _ask(self, number: int, _frame) -> None:
        _give_up_unread_output()
        if not self.saves_first:
            if is_rank0():
                with suppress(OSError):
                    if self.status:
                        self.status[0].write_text(self.status[1])
                    # Not print, as the signal may have come in the middle of one.
                    os.write(1, f"stopped by {signal.Signals(number).name}: there was nothing to save yet\n".encode())
            os._exit(STOPPED)
        if number == signal.SIGINT and self.reason:
            os._exit(130)  # Ctrl-C twice
        self.reason = self.reason or signal.Signals(number).name
        signal.setitimer(signal.ITIMER_REAL, GIVE_READERS, GIVE_READERS)  # what fills up later is given up too
        faulthandler.dump_traceback_later(STACKS_AFTER)

    def wait(self, seconds: float) -> None:
        """Wait until a signal comes, or for so many seconds."""
        end = time.monotonic() + seconds
        while not self.reason and time.monotonic() < end:
            time.sleep(0.05)

    def agreed(self) -> str:
        """The first reason that any rank has, the same on every rank; empty when none has one. A collective."""
        return next(filter(None, gather_to_all(self.reason)), "")


def ignore_signals(_worker: int) -> None:
    """Ignore stop signals in a data worker: the training process decides when to stop, and needs data until then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _give_up_unread_output(*_signal) -> None:
    """Drop what goes to a terminal that is halted, or to a pipe whose reader sleeps: a write there never ends.

    One that has begun ends too: Python repeats it, into the void, once a signal's handler has run."""
    for descriptor in (1, 2):
        if not select.select([], [descriptor], [], GIVE_READERS)[1]:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _open_standard_streams() -> None:
    """Open standard streams that are closed, so that no file gets their numbers and what native code prints."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class _Unfailing(io.FileIO):
    """Drops what a closed terminal or pipe, or a full disk, does not take: a run goes on without a reader."""

    def write(self, data) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)


def _unfailing(stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Standard output or error on which no write fails, also where a character is unknown to the terminal. None is
    Python's for a stream that is closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    file = io.BufferedWriter(_Unfailing(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)


def run_and_exit(main: Callable, argv: list[str]) -> None:
    """Run a program's `main(argv, stop)` and exit with the code it returns, 2 for InputError, 1 for a failure.

    A failure is printed once, by the rank that failed. That rank leaves without cleaning up: destroying the process
    group would wait for the other ranks, which may be waiting in a collective.
    """
    _open_standard_streams()
    stop = Stop().watch_signals()
    for name in ("stdout", "stderr"):
        setattr(sys, name, _unfailing(getattr(sys, name)))
    try:
        code = main(argv, stop)
    except InputError as error:
        print0(f"error: {error}")
        if not is_rank0() and not dist.is_initialized():
            stop.wait(LET_RANK0_SPEAK)  # it may still be importing, and torchrun ends all with the first that leaves
        code = 2
    except Exception as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):  # gloo raises RuntimeError
            print(printable(f"rank {os.environ['RANK']} lost the others ({notes}): {error}"), file=sys.stderr)
        elif isinstance(error, FloatingPointError):  # of a model that is broken; the message says all
            print(printable(f"error: {error}"), file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(printable(f"error: no room on a disk: {error}"), file=sys.stderr)
        else:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(code)


# --------------------------------------------------------------------------------------------------------- collectives


def print0(*values) -> None:
    """Print on rank 0. What rows and file names bring along, such as escape codes, does not reach the terminal."""
    if is_rank0():
        print(printable(" ".join(map(str, values))), flush=True)


def from_rank0(function: Callable):
    """Run `function` on rank 0, and return its result, or raise its exception, on every rank. A collective."""
    outcome = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # raised again below, on every rank, so that none is left waiting
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def local_rank0_first(function: Callable):
    """Run `function` on the first rank of every node, and then on the others, which find what it left in the cache.

    What it raises on one of the first ranks is raised on every rank. A collective.
    """
    first, result, error = int(os.environ.get("LOCAL_RANK", 0)) == 0, None, None
    if first:
        try:
            result = function()
        except Exception as caught:  # raised again below, on every rank, so that none is left waiting
            error = caught
    for failure in filter(None, gather_to_all(error)):
        raise failure
    return result if first else function()


def gather_to_all(value) -> list:
    """Every rank's value, in the order of ranks. A collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def wrap(module: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """Wrap a module in DDP. Trainable parameters start as rank 0's; frozen ones are equal already and do not travel."""
    if ranks.world_size == 1:
        return module
    for parameter in module.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, src=0)
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames broadcast_buffers
        return DistributedDataParallel(
            module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
        )


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def no_sync(module: torch.nn.Module, skip: bool):
    """A context without gradient all-reduce where `skip`. It must cover the forward pass too."""
    return module.no_sync() if skip and isinstance(module, DistributedDataParallel) else nullcontext()


def seed_torch(*numbers: int) -> None:
    """Seed torch from whole numbers, never from a rank."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
