"""Trackers that get the numbers of metrics.jsonl as well: TensorBoard and Weights & Biases. Rank 0 writes to them."""

import argparse
import json
import uuid
from pathlib import Path

from common import InputError, write_whole

UPLOAD_S = 60  # how long the end of a run waits for Weights & Biases; a job to be requeued has three minutes


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl as EVENT/NAME; accuracy by type as eval/exact_match/TYPE."""
    event = line["event"]
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    numbers |= {f"exact_match/{kind}": share for kind, (share, _) in line.get("by_type", {}).items()}
    return {f"{event}/{name}": value for name, value in numbers.items()}


class TensorBoard:
    """Event files in OUTPUT/tensorboard. Steps after `done` are run again: readers drop what was written about them."""

    def __init__(self, output: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)

    def write(self, line: dict) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()  # like metrics.jsonl, so that a kill loses nothing

    def close(self, _code: int) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run in the project `args.wandb`, the same one whenever training in this folder is resumed.

    It gets numbers and settings but not the console's text, which shows rows. Raises InputError if wandb can't start.
    """

    def __init__(self, args: argparse.Namespace, output: Path):
        import wandb

        id_file = output / "wandb-id"
        if not id_file.exists():
            write_whole(id_file, uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=args.wandb,
                name=output.name,
                id=id_file.read_text(),
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
    done = json.loads((checkpoint / "manifest.json").read_text())["step"] if checkpoint else 0
    trackers = [WeightsAndBiases(args, output)] if args.wandb else []
    return trackers + ([TensorBoard(output, done)] if args.tensorboard else [])
