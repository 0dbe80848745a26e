"""Trackers that get the numbers of metrics.jsonl as well: TensorBoard and Weights & Biases. Rank 0 writes to them."""

import argparse
import os
import socket
import time
import uuid
from pathlib import Path

from common import InputError, write_whole, writing
from training.checkpoints import read_manifest

UPLOAD_S = 60  # how long the end of a run waits for Weights & Biases; a job to be requeued has three minutes


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl as EVENT/NAME; accuracy by type as eval/exact_match/TYPE."""
    event = line["event"]
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    numbers |= {f"exact_match/{kind}": share for kind, (share, _) in line.get("by_type", {}).items()}
    return {f"{event}/{name}": value for name, value in numbers.items()}


class TensorBoard:
    """Event files in OUTPUT/tensorboard. Steps after `done` are run again: readers drop what was written about them.

    They are written here and now: SummaryWriter's thread would print a traceback over a full disk.
    """

    def __init__(self, output: Path, done: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.make_event, self.make_summary, folder = Event, Summary, output / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self.records = RecordWriter(open(folder / name, "xb"))
        self._add(done + 1, file_version="brain.Event:2")
        self._add(done + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content) -> None:
        self.records.write(self.make_event(wall_time=time.time(), step=step, **content).SerializeToString())
        self.records.flush()  # like metrics.jsonl, so that a kill loses nothing

    def write(self, line: dict) -> None:
        values = [self.make_summary.Value(tag=name, simple_value=value) for name, value in scalars(line).items()]
        self._add(line["step"], summary=self.make_summary(value=values))

    def close(self, _code: int) -> None:
        self.records.close()


class WeightsAndBiases:
    """A run in the project `args.wandb`, the same one whenever training in this folder is resumed.

    It gets numbers and settings but not the console's text, which shows rows. Raises InputError if wandb can't start.
    """

    def __init__(self, args: argparse.Namespace, output: Path):
        import wandb

        id_file = output / "wandb-id"
        with writing(f"--wandb: {id_file}"):
            if not id_file.exists():
                write_whole(id_file, uuid.uuid4().hex[:8])
            run_id = id_file.read_text(errors="replace")
        try:
            self.run = wandb.init(
                project=args.wandb,
                name=output.name,
                id=run_id,
                resume="allow",
                dir=str(output),
                config=vars(args),
                settings=wandb.Settings(console="off", finish_timeout=UPLOAD_S),
            )
        except (wandb.Error, ValueError) as error:
            raise InputError(f"--wandb: {error} (WANDB_MODE=offline needs no account and no network)") from None

    def write(self, line: dict) -> None:
        if numbers := scalars(line):
            self.run.log(numbers, step=line["step"])

    def close(self, code: int) -> None:
        self.run.finish(exit_code=code)


def open_trackers(args: argparse.Namespace, output: Path, checkpoint: Path | None) -> list:
    """The trackers that `args` asks for. `checkpoint` is the one that training goes on from."""
    done = read_manifest(checkpoint)["step"] if checkpoint else 0
    trackers = [WeightsAndBiases(args, output)] if args.wandb else []
    with writing(f"--tensorboard: can't write to {output}/tensorboard"):
        return trackers + ([TensorBoard(output, done)] if args.tensorboard else [])
