"""Checkpoints and the run's folder: written whole or not at all, checked before use, refused where the run has changed.

A checkpoint is a PEFT adapter folder with `state.pt` and, written last, `manifest.json`: the size and SHA-256 of every
file. It gets its name, checkpoint-STEP, once it is complete and on disk.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

import peft
import torch
import transformers
from safetensors import SafetensorError

from common import PARTIAL, InputError, flush_to_disk, write_whole
from dist_utils import print0, restarted, unwrap
from modeling.lora import load_lora, save_adapter
from training.model_card import model_card

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
_locks = []  # open files: a lock lasts as long as its file is open

# ------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(folder: Path, model, state: dict) -> None:
    """Write adapter, state and manifest, all of it on disk on return."""
    save_adapter(unwrap(model).model, folder)
    (folder / "README.md").write_text(model_card(state), encoding="utf-8")
    with open(folder / "state.pt", "wb") as file:  # torch.save by path: a full disk is a RuntimeError
        torch.save(state, file)
    files = {path.name: size_and_sum(path) for path in sorted(folder.iterdir())}
    manifest = {"step": state["step"], "versions": VERSIONS, "identity": state["identity"]}
    manifest["files"] = files
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*folder.iterdir(), folder]:
        flush_to_disk(path)


def save_checkpoint(output: Path, model, state: dict, keep: int) -> bool:
    """Write checkpoint-STEP, mark the best one, drop all but that and the last `keep`.

    Returns False, after saying why, when the disk does not take it; checkpoints that were there stay as they were.
    """
    name = f"checkpoint-{state['step']:06d}"
    partial = output / f"{PARTIAL}{name}"
    try:
        write_checkpoint(partial, model, state)
        if (output / name).exists():  # a damaged one, or one without the evaluation that was due with it
            os.rename(output / name, output / f"{PARTIAL}old-{name}")
        os.rename(partial, output / name)
        flush_to_disk(output)
        mark_best(output, state["best"])
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(output).free / 2**20
        print0(f"warning: checkpoint of step {state['step']} not saved: {error} ({free:,.1f} MiB free in {output})")
        return False
    found = [folder.name for folder in checkpoints(output)]  # later ones are damaged, or of steps that are made again
    kept = {*found[: found.index(name) + 1][-keep:], marked_best(output)}
    dropped = [folder for folder in checkpoints(output) if folder.name not in kept]
    for old in [*output.glob(f"{PARTIAL}old-*"), *dropped]:
        shutil.rmtree(old, onerror=lambda _function, path, failure: print0(f"warning: {path} stays: {failure[1]}"))
    return True


def mark_best(output: Path, best: dict) -> None:
    """Write best.json, unless the best one's save failed: then the best one that is there stays marked."""
    name = f"checkpoint-{best.get('step', 0):06d}"
    if (output / name).exists():
        write_whole(output / "best.json", json.dumps({"checkpoint": name, **best}))


def write_or_warn(path: Path, text: str) -> None:
    """The same for a file that a run can do without: a disk that does not take it is told."""
    try:
        write_whole(path, text)
    except OSError as error:
        print0(f"warning: {path.name} not written: {error}")


def size_and_sum(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ------------------------------------------------------------------------------------------------------- reading


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty when they are as they were written."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "no readable manifest.json"
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["bytes"]:
            return f"{name} has {path.stat().st_size:,} of {written['bytes']:,} bytes"
        if size_and_sum(path) != written:
            return f"{name} has changed since it was written (SHA-256)"
    return ""


def marked_best(output: Path) -> str:
    """The name of the checkpoint that best.json marks; empty: none."""
    mark = output / "best.json"
    return json.loads(mark.read_text())["checkpoint"] if mark.exists() else ""


def pick_checkpoint(folder: Path) -> Path:
    """The folder itself, or of a run's folder its best checkpoint, or its newest where none is marked best."""
    found = [folder] if (folder / "state.pt").exists() else checkpoints(folder)[-1:]
    if best := marked_best(folder):
        found = [folder / best]
    if not found:
        raise InputError(f"--ckpt: {folder} is neither a checkpoint nor a run's folder with one")
    if problem := damage(found[0]):
        raise InputError(f"--ckpt: {found[0]} is damaged: {problem}; name another checkpoint")
    return found[0]


def read_state(folder: Path) -> dict:
    """A checkpoint's state.pt: plain values and tensors; anything that would run code is refused."""
    return torch.load(folder / "state.pt", weights_only=True, map_location="cpu")


def find_checkpoint(choice: str, output: Path, identity: dict) -> Path | None:
    """The checkpoint that --resume names, with "auto" the newest undamaged one; None when there is none yet.

    Raises InputError when the named one or all are damaged, or belong to a run that would learn something else.
    """
    folders = {"none": [], "auto": checkpoints(output)}.get(choice, [Path(choice)])
    for folder in reversed(folders):
        if problem := damage(folder):
            print0(f"warning: {folder} is damaged and not used: {problem}")
            continue
        before, now = json.loads((folder / "manifest.json").read_text())["identity"], json.loads(json.dumps(identity))
        if changed := [name for name in now if before.get(name) != now[name]]:
            lines = [f"  {name}: was {before.get(name)!r}, is now {now[name]!r}" for name in changed]
            raise InputError("\n".join([f"{folder} can't be resumed, the run has changed:", *lines]))
        return folder
    if folders:
        raise InputError("nothing undamaged to resume: name another checkpoint, or start anew with another --output")
    if choice == "auto":
        print0(f"nothing to resume in {output}: starting at step 0")
    return None


def load_checkpoint(folder: Path, model, optimizer, output: Path) -> dict:
    """Give model and optimizer what a checkpoint holds. Returns its state."""
    state = read_state(folder)
    load_lora(unwrap(model).model, folder)
    optimizer.load_state_dict(state["optimizer"])
    print0(f"resumed {folder} at step {state['step']}")
    if later := [path.name for path in checkpoints(output) if int(path.name.split("-")[1]) > state["step"]]:
        print0(f"warning: {', '.join(later)} will be dropped at the next save: these steps are made again")
    if folder.parent.resolve() != output:
        state |= {"best": {}, "stale": 0}  # it is not in this folder
    return state


# -------------------------------------------------------------------------------------------------- a run's folder


def open_output(output: str, name: str, resume: str) -> Path:
    """The run's folder, locked for this process. Empty `output`: the next free runs/NAME-N.

    Raises InputError when another run is using it, when it holds a run that is not to be resumed, or can't be written.
    """
    launcher = f"launcher {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    folder, number = Path(output), 1
    while not output and (folder := Path(f"runs/{name}-{number}")).exists():
        if restarted() and (folder / "lock").is_file() and launcher in (folder / "lock").read_text():
            break  # this run's own, before torchrun restarted it
        number += 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: can't write to {folder}: {error}") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it however this process ends
    except OSError:
        lock.seek(0)
        raise InputError(f"--output {folder} is in use by {lock.readline().strip()}") from None
    _locks.append(lock)
    metrics = folder / "metrics.jsonl"
    holds_run = checkpoints(folder) or (metrics.exists() and metrics.stat().st_size)
    lock.seek(0)
    resuming = resume == "auto" or (resume != "none" and Path(resume).resolve().parent == folder.resolve())
    if not (resuming or (restarted() and launcher in lock.read())) and holds_run:
        raise InputError(f"--output {folder} holds a run: --resume auto goes on with it, another folder starts anew")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{launcher}\n")
    lock.flush()
    for old in folder.glob(f"{PARTIAL}old-*"):
        if not (place := folder / old.name.removeprefix(f"{PARTIAL}old-")).exists():
            old.rename(place)  # a save was killed between its two renames
    for stray in folder.glob(f"{PARTIAL}*"):  # of a save that was killed
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    return folder.resolve()
