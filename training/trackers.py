"""Where the numbers of metrics.jsonl go as well: TensorBoard and Weights & Biases, on rank 0, where asked for."""

import argparse
import json
import uuid
from pathlib import Path

from common import InputError, write_whole

UPLOAD_S = 60  # that the end of a run waits for Weights & Biases: a job that is to be requeued has three minutes


def scalars(line: dict) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl as EVENT/NAME; accuracy by type as eval/exact_match/TYPE."""
    event = line["event"]
    found = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    found |= {f"exact_match/{kind}": share for kind, (share, _) in line.get("by_type", {}).items()}
    return {f"{event}/{name}": value for name, value in found.items()}


class TensorBoard:
    """Event files in OUTPUT/tensorboard. Steps after `done` are made again: readers drop what was written of them."""

    def __init__(self, output: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)

    def write(self, line: dict) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()  # as metrics.jsonl: a kill loses nothing

    def close(self, _code: int) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run in the project `args.wandb`, the same one whenever training in this folder goes on. It gets numbers and
    settings, not the console's text, which shows rows. Raises InputError where wandb can't start."""

    def __init__(self, args: argparse.Namespace, output: Path):
        import wandb

        name = output / "wandb-id"
        if not name.exists():
            write_whole(name, uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=args.wandb,
                name=output.name,
                id=name.read_text(),
                resume="allow",
                dir=str(output),
                config=vars(args),
                settings=wandb.Settings(console="off", finish_timeout=UPLOAD_S),
            )
        except (wandb.Error, ValueError) as error:
            raise InputError(f"--wandb: {error} (WANDB_MODE=offline needs no account and no network)") from None

    def write(self, line: dict) -> None:
        if found := scalars(line):
            self.run.log(found, step=line["step"])

    def close(self, code: int) -> None:
        self.run.finish(exit_code=code)


def open_trackers(args: argparse.Namespace, output: Path, found: Path | None) -> list:
    """What `args` asks for; `found` is the checkpoint that training goes on from."""
    done = json.loads((found / "manifest.json").read_text())["step"] if found else 0
    trackers = [WeightsAndBiases(args, output)] if args.wandb else []
    return trackers + ([TensorBoard(output, done)] if args.tensorboard else [])
