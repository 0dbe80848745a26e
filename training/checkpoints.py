"""Checkpoints and the run's folder: written whole or not at all, checked before use, refused where the run has changed.

A checkpoint is a PEFT adapter folder with `state.pt` and, written last, `manifest.json` with the size and SHA-256 of
every file. It gets its name, checkpoint-STEP, once it is complete and on disk.
"""

import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import peft
import torch
import transformers

from common import (
    PARTIAL,
    WRITE_ERRORS,
    InputError,
    flush_to_disk,
    lock_folder,
    quote,
    remove,
    replacing,
    sign,
    write_whole,
    writing,
)
from dist_utils import print0, restarted, unwrap
from inputs.prompts import prompt_hash
from modeling.adapters import read_settings
from modeling.delta import kernel_versions
from modeling.loading import weights_hashes
from modeling.lora import load_lora, lora_differences, save_adapter
from training.compatibility import plan_difference, setting_differences, unknown_settings, with_defaults
from training.model_card import model_card
from training.progress import Progress, unfinished
from training.settings import path_problem

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
VERSIONS |= kernel_versions()  # Qwen3.5's numbers depend on them
REPLACED = f"{PARTIAL}old-"  # begins the name of a checkpoint that another one is taking the place of
NAME = re.compile(r"checkpoint-\d+")
NEEDED = {"state.pt", "adapter_config.json", "adapter_model.safetensors"}  # without which nothing can be loaded

# ------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(folder: Path, model, state: dict) -> None:
    """Write adapter, model card, state and manifest. All of it is on disk on return: a crash of the machine right after
    the rename must not leave a checkpoint with empty files."""
    folder.mkdir()  # not its parents: a run's folder that was removed stays so
    save_adapter(unwrap(model).model, folder)
    (folder / "README.md").write_text(model_card(state), encoding="utf-8")
    # By way of memory: on a disk that does not take it, torch.save raises one of several RuntimeErrors, or OSError.
    content = io.BytesIO()
    torch.save(state, content)
    (folder / "state.pt").write_bytes(content.getbuffer())
    files = {path.name: size_and_sum(path) for path in sorted(folder.iterdir())}
    # Last of all: a folder without a manifest is not a checkpoint.
    manifest = {"step": state["step"], "versions": VERSIONS, "identity": state["identity"], "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest | state["base"], indent=1) + "\n")
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
    except WRITE_ERRORS as error:
        print0(f"warning: checkpoint of step {state['step']} not saved: {error}{_room(output)}")
        return False
    _remove_old(output, state, keep)
    return True


def _room(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB free in {folder})"
    except OSError:  # the disk is gone altogether
        return ""


def _remove_old(output: Path, state: dict, keep: int) -> None:
    """Remove all checkpoints but the last `keep` up to the step of `state`, and the best one. Those after it are
    damaged, or of steps that are being trained again."""
    # Counted back from the newest one: where a run went back, later checkpoints don't push out those it builds on.
    kept = [folder.name for folder in checkpoints(output) if step_of(folder) <= state["step"]][-keep:]
    kept.append(marked_best(output))
    unwanted = [folder for folder in checkpoints(output) if folder.name not in kept]
    for old in [*output.glob(f"{REPLACED}*"), *unwanted]:
        try:
            remove(old)
        except OSError as error:
            print0(f"warning: {old} stays: {error}")


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
    return sorted((path for path in output.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_manifest(folder: Path) -> dict:
    """A checkpoint's manifest.json. Raises ValueError that says what is wrong with it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        step, identity, files = (manifest[name] for name in ("step", "identity", "files"))
        sizes = [written["bytes"] for written in files.values()]
        is_whole = type(step) is int and isinstance(identity, dict) and all(type(size) is int for size in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError("no readable manifest.json")
    if outside := [name for name in files if Path(name).name != name or name in ("", "..")]:
        raise ValueError(f"manifest.json names {quote(outside[0])}, which is no file of the checkpoint")
    if missing := NEEDED - files.keys():
        raise ValueError(f"manifest.json does not name {min(missing)}")
    return manifest


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty when they are as they were written."""
    try:
        for name, written in read_manifest(folder)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["bytes"]:  # says more than a wrong sum, and needs no reading
                return f"{name} has {path.stat().st_size:,} of {written['bytes']:,} bytes"
            if size_and_sum(path) != written:
                return f"{name} has changed since it was written (SHA-256)"
    except (OSError, ValueError) as error:  # a disk that can't be read, or the manifest
        return str(error)
    return ""


def marked_best(output: Path) -> str:
    """The name of the checkpoint that best.json marks; empty, after a warning, when it can't be read."""
    mark = output / "best.json"
    if not mark.exists():
        return ""
    try:
        name = json.loads(mark.read_bytes())["checkpoint"]
        if NAME.fullmatch(name):
            return name
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    print0(f"warning: {mark} is damaged, so no checkpoint counts as the best one")
    return ""


def pick_checkpoint(folder: Path) -> Path:
    """The folder itself if it is a checkpoint; of a run's folder its best checkpoint, or the newest if none is marked.

    Raises InputError when there is none, or when it is damaged.
    """
    candidates = [folder] if (folder / "state.pt").exists() else checkpoints(folder)[-1:]
    if best := marked_best(folder):
        candidates = [folder / best]
    if not candidates:
        raise InputError(f"--ckpt: {_without_checkpoint(folder)}")
    chosen = candidates[0]
    if problem := damage(chosen):
        raise InputError(f"--ckpt: {chosen} is damaged: {problem}; name another checkpoint")
    if where := unfinished(chosen.parent):
        print0(f"{chosen.parent} is not finished ({where}): this is its {chosen.name}")
    return chosen


def _without_checkpoint(folder: Path) -> str:
    """What is wrong with a folder that neither is a checkpoint nor holds one."""
    if problem := path_problem(str(folder), is_folder=True):
        return problem
    if where := unfinished(folder):
        return f"{folder} is a run that has no checkpoint yet: {where}"
    if any((folder / name).is_file() for name in ("status", "lock", "metrics.jsonl")):
        return f"{folder} is a run that has no checkpoint: it ended before its first one, or they were removed"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter that was not made here: name it by --adapter"
    if (folder / "config.json").is_file():
        return f"{folder} is a whole model: name it by --model"
    runs = sorted({str(state.parent.parent) for state in folder.glob("*/checkpoint-*/state.pt")})
    named = f"; runs in it: {', '.join(runs[:5])}{', …' * (len(runs) > 5)}" if runs else ""
    return f"{folder} is neither a run's folder nor a checkpoint{named}"


def find_adapter(ckpt: str, adapter: str) -> tuple[Path | None, dict]:
    """The folder that --ckpt or --adapter names, and the state of its run: empty for an adapter made elsewhere. (None,
    {}) where neither names one. Raises InputError for what is not an adapter that can be run."""
    if not (ckpt or adapter):
        return None, {}
    if adapter and not (Path(adapter) / "state.pt").is_file():
        read_settings(Path(adapter))
        return Path(adapter).resolve(), {}
    folder = pick_checkpoint(Path(ckpt or adapter).resolve())
    return folder, read_state(folder)


def check_base(resumed: Path | None, first: Path | None, model: str) -> None:
    """Raise InputError where a run would continue with other base weights than it began with, and warn where a new one
    begins with the adapter `first` of other base weights."""
    if text := _other_base(resumed, model):
        remedy = "start a new run with another --output and this checkpoint as --init-from"
        raise InputError(f"{text}\n  resume with that base model, or {remedy}")
    if not resumed:
        warn_of_other_base(first, model)


def warn_of_other_base(folder: Path | None, model: str) -> None:
    """Print a warning where a checkpoint was trained on other weights than those in a model's folder."""
    if text := _other_base(folder, model):
        print0(f"warning: {text}")


def _other_base(folder: Path | None, model: str) -> str:
    """What tells that a checkpoint was trained on other weights than those in a model's folder; empty otherwise. One of
    an older version, and an adapter made elsewhere, do not tell."""
    if not folder or all(_recorded(folder, name) in ("", now) for name, now in weights_hashes(model).items()):
        return ""
    return f"{folder}\n  was trained on other base weights than those in {model}"


def warn_of_other_prompts(folder: Path | None, tokenizer) -> None:
    """Print a warning where a model's chat template or tokenizer writes a question otherwise than when a checkpoint was
    trained. Of an adapter made elsewhere, the template in its folder tells."""
    known, template = _recorded(folder, "prompt"), folder / "chat_template.jinja" if folder else Path()
    if known:
        differs = known != prompt_hash(tokenizer)
    else:
        own = tokenizer.chat_template and tokenizer.get_chat_template()
        differs = own and template.is_file() and template.read_text("utf-8", "replace").strip() != own.strip()
    if differs:
        print0(f"warning: {folder} was trained with another chat template than that of {tokenizer.name_or_path}")


def _recorded(folder: Path | None, name: str) -> str:
    """A hash in a checkpoint's manifest, which may be damaged; empty where there is none."""
    path = folder / "manifest.json" if folder else Path()
    found = re.search(rf'"{name}": "(\w+)"', path.read_text("utf-8", "replace") if path.is_file() else "")
    return found[1] if found else ""


def read_state(folder: Path) -> dict:
    """A checkpoint's state.pt: plain values and tensors, with the settings of its run as this version has them. Raises
    InputError when it can't be read; torch refuses anything that would run code."""
    try:
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        unknown = unknown_settings(state["settings"])
        state["settings"] = with_defaults(state["settings"])
    except Exception as error:  # whatever torch and Python raise over a file that another program wrote
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{folder}/state.pt can't be used, name another checkpoint: {reason}") from None
    if unknown:
        print0(f"warning: {folder} was trained with settings that this version does not know: {', '.join(unknown)}")
    return state


def find_checkpoint(choice: str, output: Path, identity: dict) -> Path | None:
    """The checkpoint that --resume names; for "auto" the newest undamaged one. None when there is none yet.

    Raises InputError when the named one or all are damaged, or belong to a run that would learn something else, or to
    one that another version planned.
    """
    folders = {"none": [], "auto": checkpoints(output)}.get(choice, [Path(choice)])
    for folder in reversed(folders):  # a damaged one costs the steps since the one before it
        if problem := damage(folder):
            print0(f"warning: {folder} is damaged and not used: {problem}")
            continue
        before = read_manifest(folder)["identity"]
        if problem := plan_difference(folder, before):
            raise InputError(problem)
        if changed := setting_differences(before, identity):
            raise InputError("\n  ".join([f"{folder} can't be resumed, the run has changed:", *changed]))
        return folder
    if folders:
        raise InputError("nothing undamaged to resume: name another checkpoint, or start anew with another --output")
    if choice == "auto":
        print0(f"nothing to resume in {output}: starting at step 0")
    return None


def load_checkpoint(folder: Path, model, optimizer, output: Path, identity: dict) -> tuple[Progress, dict]:
    """Give model and optimizer what a checkpoint holds. Returns where it stands, and its identity updated by this
    run's."""
    state, peft_model = read_state(folder), unwrap(model).model
    if differences := lora_differences(peft_model, folder):
        raise InputError("\n  ".join([f"{folder} does not fit, name another checkpoint:", *differences]))
    load_lora(peft_model, folder)
    try:
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress.from_state(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/state.pt does not fit this run, name another checkpoint: {error}") from None
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
    lock = lock_folder(folder, "--output")
    metrics = folder / "metrics.jsonl"
    holds_run = checkpoints(folder) or (metrics.exists() and metrics.stat().st_size)
    is_resumed = resume == "auto" or (resume != "none" and Path(resume).resolve().parent == folder.resolve())
    # torchrun --max-restarts starts the same command again: its own folder is then not another run's.
    lock.seek(0)
    if holds_run and not is_resumed and not (restarted() and launcher in lock.read()):
        raise InputError(f"--output {folder} holds a run: --resume auto goes on with it, another folder starts anew")
    with writing(f"--output: can't write to {folder}"):
        sign(lock, f"{launcher}\n")
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


def _clear_unfinished(folder: Path) -> None:
    """Undo what a killed save left: a checkpoint that it had moved aside comes back, half-written ones go."""
    for old in folder.glob(f"{REPLACED}*"):
        place = folder / old.name.removeprefix(REPLACED)
        if NAME.fullmatch(place.name) and old.is_dir() and not place.exists():  # killed between the two renames
            old.rename(place)
    for leftover in folder.glob(f"{PARTIAL}*"):
        remove(leftover)
