"""Checkpoints and the run's folder: written whole or not at all, checked before use, refused where the run has changed.

A checkpoint is a PEFT adapter folder with `state.pt` and, written last, `manifest.json` with the size and SHA-256 of
every file. It gets its name, checkpoint-STEP, once it is complete and on disk.
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

from common import PARTIAL, InputError, flush_to_disk, remove, replacing, write_whole
from dist_utils import print0, restarted, unwrap
from modeling.lora import load_lora, save_adapter
from training.model_card import model_card
from training.progress import Progress

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
REPLACED = f"{PARTIAL}old-"  # begins the name of a checkpoint that another one is taking the place of
_locks = []  # open files: a lock lasts as long as its file is open

# ------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(folder: Path, model, state: dict) -> None:
    """Write adapter, model card, state and manifest. All of it is on disk on return: a crash of the machine right after
    the rename must not leave a checkpoint with empty files."""
    save_adapter(unwrap(model).model, folder)
    (folder / "README.md").write_text(model_card(state), encoding="utf-8")
    with open(folder / "state.pt", "wb") as file:  # by path, torch.save reports a full disk as RuntimeError
        torch.save(state, file)
    files = {path.name: size_and_sum(path) for path in sorted(folder.iterdir())}
    # Last of all: a folder without a manifest is not a checkpoint.
    manifest = {"step": state["step"], "versions": VERSIONS, "identity": state["identity"], "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*folder.iterdir(), folder]:
        flush_to_disk(path)


def save_checkpoint(output: Path, model, state: dict, keep: int) -> bool:
    """Write checkpoint-STEP, mark the best one, and remove all but that one and the last `keep`.

    Returns False, after saying why, when the disk does not take it. Checkpoints that were there stay as they were.
    """
    folder = output / f"checkpoint-{state['step']:06d}"
    try:
        with replacing(folder) as partial:
            write_checkpoint(partial, model, state)
            if folder.exists():  # damaged, or written when a stop came before its evaluation
                os.rename(folder, output / f"{REPLACED}{folder.name}")
        flush_to_disk(output)  # the new name too
        mark_best(output, state["best"])
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        free = shutil.disk_usage(output).free / 2**20
        print0(f"warning: checkpoint of step {state['step']} not saved: {error} ({free:,.1f} MiB free in {output})")
        return False
    _remove_old(output, folder.name, keep)
    return True


def _remove_old(output: Path, newest: str, keep: int) -> None:
    """Remove all checkpoints but the last `keep` up to `newest`, and the best one. Those after `newest` are damaged, or
    of steps that are being trained again."""
    names = [folder.name for folder in checkpoints(output)]
    # Counted back from the newest one: where a run went back, later checkpoints don't push out those it builds on.
    kept = {*names[: names.index(newest) + 1][-keep:], marked_best(output)}
    unwanted = [folder for folder in checkpoints(output) if folder.name not in kept]
    for old in [*output.glob(f"{REPLACED}*"), *unwanted]:
        shutil.rmtree(old, onerror=lambda _function, path, failure: print0(f"warning: {path} stays: {failure[1]}"))


def mark_best(output: Path, best: dict) -> None:
    """Write best.json. When the best one could not be saved, the best one that is there stays marked."""
    name = f"checkpoint-{best.get('step', 0):06d}"
    if (output / name).exists():
        write_whole(output / "best.json", json.dumps({"checkpoint": name, **best}))


def size_and_sum(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# ------------------------------------------------------------------------------------------------------------- reading


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


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
        if path.stat().st_size != written["bytes"]:  # says more than a wrong sum, and needs no reading
            return f"{name} has {path.stat().st_size:,} of {written['bytes']:,} bytes"
        if size_and_sum(path) != written:
            return f"{name} has changed since it was written (SHA-256)"
    return ""


def marked_best(output: Path) -> str:
    """The name of the checkpoint that best.json marks; empty when there is none."""
    mark = output / "best.json"
    return json.loads(mark.read_text())["checkpoint"] if mark.exists() else ""


def pick_checkpoint(folder: Path) -> Path:
    """The folder itself if it is a checkpoint; of a run's folder its best checkpoint, or the newest if none is marked.

    Raises InputError when there is none, or when it is damaged.
    """
    candidates = [folder] if (folder / "state.pt").exists() else checkpoints(folder)[-1:]
    if best := marked_best(folder):
        candidates = [folder / best]
    if not candidates:
        raise InputError(f"--ckpt: {folder} is neither a checkpoint nor a run's folder with one")
    if problem := damage(candidates[0]):
        raise InputError(f"--ckpt: {candidates[0]} is damaged: {problem}; name another checkpoint")
    return candidates[0]


def read_state(folder: Path) -> dict:
    """A checkpoint's state.pt: plain values and tensors. torch refuses anything that would run code."""
    return torch.load(folder / "state.pt", weights_only=True, map_location="cpu")


def find_checkpoint(choice: str, output: Path, identity: dict) -> Path | None:
    """The checkpoint that --resume names; for "auto" the newest undamaged one. None when there is none yet.

    Raises InputError when the named one or all are damaged, or belong to a run that would learn something else.
    """
    folders = {"none": [], "auto": checkpoints(output)}.get(choice, [Path(choice)])
    for folder in reversed(folders):  # a damaged one costs the steps since the one before it
        if problem := damage(folder):
            print0(f"warning: {folder} is damaged and not used: {problem}")
            continue
        before = json.loads((folder / "manifest.json").read_text())["identity"]
        now = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        # Only what this version knows: a setting that was removed since can't be compared.
        if changed := [name for name in now if before.get(name) != now[name]]:
            lines = [f"  {name}: was {before.get(name)!r}, is now {now[name]!r}" for name in changed]
            raise InputError("\n".join([f"{folder} can't be resumed, the run has changed:", *lines]))
        return folder
    if folders:
        raise InputError("nothing undamaged to resume: name another checkpoint, or start anew with another --output")
    if choice == "auto":
        print0(f"nothing to resume in {output}: starting at step 0")
    return None


def load_checkpoint(folder: Path, model, optimizer, output: Path, identity: dict) -> tuple[Progress, dict]:
    """Give model and optimizer what a checkpoint holds. Returns where it stands, and its identity updated by this
    run's."""
    state = read_state(folder)
    load_lora(unwrap(model).model, folder)
    optimizer.load_state_dict(state["optimizer"])
    progress = Progress.from_state(state)
    print0(f"resumed {folder} at step {progress.step}")
    if later := [path.name for path in checkpoints(output) if step_of(path) > progress.step]:
        print0(f"warning: {', '.join(later)} will be removed at the next save: their steps are trained again")
    if folder.parent.resolve() != output:
        progress.best, progress.stale = {}, 0  # the best checkpoint is not in this folder
    return progress, state.get("identity", {}) | identity


# ------------------------------------------------------------------------------------------------------- a run's folder


def open_output(output: str, name: str, resume: str) -> Path:
    """The run's folder, locked for this process. Where `output` is empty: the next free runs/NAME-N.

    Raises InputError when another run is using it, when it holds a run that is not to be resumed, or can't be written.
    """
    launcher = f"launcher {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    folder = Path(output) if output else _next_free_folder(name, launcher)
    lock = _lock(folder)
    metrics = folder / "metrics.jsonl"
    holds_run = checkpoints(folder) or (metrics.exists() and metrics.stat().st_size)
    is_resumed = resume == "auto" or (resume != "none" and Path(resume).resolve().parent == folder.resolve())
    # torchrun --max-restarts starts the same command again: its own folder is then not another run's.
    lock.seek(0)
    if holds_run and not is_resumed and not (restarted() and launcher in lock.read()):
        raise InputError(f"--output {folder} holds a run: --resume auto goes on with it, another folder starts anew")
    lock.truncate(0)  # the text names the holder to others; the lock itself is the kernel's
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{launcher}\n")
    lock.flush()
    _clear_unfinished(folder)
    return folder.resolve()


def _next_free_folder(name: str, launcher: str) -> Path:
    """The first runs/NAME-N that does not exist, or that torchrun restarted this run in."""
    number = 1
    while (folder := Path(f"runs/{name}-{number}")).exists():
        if restarted() and (folder / "lock").is_file() and launcher in (folder / "lock").read_text():
            break
        number += 1
    return folder


def _lock(folder: Path):
    """The folder's lock file, open and locked as long as this process lives: the kernel frees it however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: can't write to {folder}: {error}") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf, as flock is local to a machine on some NFS
    except OSError:
        lock.seek(0)
        raise InputError(f"--output {folder} is in use by {lock.readline().strip()}") from None
    _locks.append(lock)
    return lock


def _clear_unfinished(folder: Path) -> None:
    """Undo what a killed save left: a checkpoint that it had moved aside comes back, half-written ones go."""
    for old in folder.glob(f"{REPLACED}*"):
        place = folder / old.name.removeprefix(REPLACED)
        if not place.exists():  # killed between the two renames
            old.rename(place)
    for leftover in folder.glob(f"{PARTIAL}*"):
        remove(leftover)
