"""Checkpoints are whole or absent, and a run resumed from one ends like an undisturbed one, bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import faults
import pytest
import sweep_full_disk
import tiny
import torch
from faults import arguments, at_step, clean, copy_until, truncate
from runs import Run, adapter, losses, same

import train
from common import InputError
from dist_utils import STOPPED, Stop
from training import checkpoints

# ----------------------------------------------------------------------------------------------------- killed in a save


@pytest.mark.parametrize(
    "place",
    [
        "before the first file",
        "in the middle of a file",
        "before the manifest",
        "before the rename",
        "after the rename",
        "before old ones are dropped",
    ],
)
def test_a_run_killed_in_a_save_resumes_to_the_same_end(world, undisturbed, tmp_path, place):
    output = tmp_path / "out"
    fault = partial(faults.kill_in_save, place)
    assert Run(arguments(world, output, keep=1), tmp_path / "log", fault=fault).wait() == [-signal.SIGKILL]
    (newest,) = (folder for folder in checkpoints.checkpoints(output)[-1:])
    complete = place in ("after the rename", "before old ones are dropped")
    assert newest.name == ("checkpoint-000004" if complete else "checkpoint-000002")
    assert train.main(arguments(world, output, keep=1)) == 0
    assert same(output, undisturbed) and clean(output)


def test_a_run_killed_before_its_best_checkpoint_is_marked_marks_it_on_resume(world, undisturbed, tmp_path):
    output = tmp_path / "out"
    fault = partial(faults.kill_in_save, "after the rename", step=6)
    assert Run(arguments(world, output), tmp_path / "log", fault=fault).wait() == [-signal.SIGKILL]
    assert train.main(arguments(world, output)) == 0
    assert (output / "best.json").read_text() == (undisturbed / "best.json").read_text()


def test_a_checkpoint_whose_replacement_was_killed_is_put_back(world, undisturbed, tmp_path, capsys):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    (output / "checkpoint-000002").rename(output / f"{checkpoints.PARTIAL}old-checkpoint-000002")
    assert train.main(arguments(world, output)) == 0
    assert "at step 2" in capsys.readouterr().out and same(output, undisturbed) and clean(output)


# -------------------------------------------------------------------------------------------------------- damaged files


def flip_a_bit(path: Path, _=None) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state.pt"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99, "flip", "gone"])
def test_a_damaged_file_is_named(undisturbed, tmp_path, name, share):
    folder = shutil.copytree(undisturbed / "checkpoint-000006", tmp_path / "checkpoint-000006")
    assert checkpoints.damage(folder) == ""
    if share == "gone":
        (folder / name).unlink()
    elif share == "flip":
        flip_a_bit(folder / name)
    else:
        truncate(folder / name, share)
    words = {"flip": "SHA-256", "gone": "is missing"}.get(share, "bytes")
    assert name in checkpoints.damage(folder) and words in checkpoints.damage(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state.pt", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(world, undisturbed, tmp_path, capsys, name):
    output = copy_until(undisturbed, 4, tmp_path / "out")
    truncate(output / "checkpoint-000004" / name, 0.5)
    with pytest.raises(InputError, match="undamaged"):  # named, it is an error
        train.main(arguments(world, output, resume=output / "checkpoint-000004"))
    assert train.main(arguments(world, output)) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-000004 is damaged" in printed and name in printed and "checkpoint-000002 at step 2" in printed
    assert same(output, undisturbed) and clean(output)


def test_a_new_checkpoint_is_kept_beside_a_later_one_that_is_damaged(world, undisturbed, tmp_path, monkeypatch):
    output, stop = copy_until(undisturbed, 4, tmp_path / "out"), Stop()
    truncate(output / "checkpoint-000004" / "state.pt", 0.5)
    monkeypatch.setattr(
        train, "train_step", lambda *a, f=train.train_step: (setattr(stop, "reason", "SIGTERM"), f(*a))[1]
    )
    assert train.main(arguments(world, output, keep=1), stop) == STOPPED
    monkeypatch.undo()
    assert [folder.name for folder in checkpoints.checkpoints(output)][-1] == "checkpoint-000003"
    assert train.main(arguments(world, output, keep=1)) == 0 and same(output, undisturbed)


def test_another_run_s_checkpoint_goes_to_a_folder_of_its_own_and_is_saved_there_at_once(
    world, undisturbed, tmp_path, capsys
):
    other = copy_until(undisturbed, 2, tmp_path / "other")
    with pytest.raises(InputError, match="holds a run"):
        train.main(arguments(world, other, resume=undisturbed / "checkpoint-000004"))
    output, stop = tmp_path / "out", Stop()
    stop.reason = "SIGTERM"
    assert train.main(arguments(world, output, resume=undisturbed / "checkpoint-000004"), stop) == STOPPED
    assert train.main(["--config", str(output / "settings.toml"), "--resume=auto"]) == 0
    assert f"resumed {output}/checkpoint-000004 at step 4" in capsys.readouterr().out


def test_a_checkpoint_can_not_run_code(world, undisturbed, tmp_path):
    """The state file holds a pickled call, and its checksum is right."""
    output, ran = copy_until(undisturbed, 2, tmp_path / "out"), tmp_path / "ran"
    folder = output / "checkpoint-000002"

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save({"step": Call()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = checkpoints.size_and_sum(folder / "state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="state.pt can't be used, name another checkpoint: UnpicklingError"):
        train.main(arguments(world, output))
    assert not ran.exists()


def test_when_all_checkpoints_are_damaged_nothing_starts_over_silently(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    truncate(output / "checkpoint-000002" / "state.pt", 0)
    with pytest.raises(InputError, match="another --output"):
        train.main(arguments(world, output))


# ---------------------------------------------------------------------------------------------------------------- disks


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_nothing_else(world, undisturbed, small_disk, capsys):
    def fill_and_free(step: int) -> None:
        real = train.train_step

        def train_step(model, optimizer, micro_batches, *rest):
            number = micro_batches[0].assignment.step.number + 1
            if number == 3:
                faults.fill_disk(small_disk)
            if number == 5:
                (small_disk / "filler").unlink()
            return real(model, optimizer, micro_batches, *rest)

        patch.setattr(train, "train_step", train_step)

    with pytest.MonkeyPatch.context() as patch:
        fill_and_free(3)
        assert train.main(arguments(world, small_disk / "out", keep=1)) == 0
    printed = capsys.readouterr().out
    assert "checkpoint of step 4 not saved" in printed and "MiB free in" in printed
    assert same(small_disk / "out", undisturbed) and clean(small_disk / "out")


@pytest.mark.parametrize("limit", [sweep_full_disk.disk_of, sweep_full_disk.files_of])
def test_a_save_fails_without_harm_wherever_the_disk_ends(world, small_disk, limit):
    """`python tests/sweep_full_disk.py` tries every size."""
    saves = sweep_full_disk.Saves(world, small_disk / "out")
    sizes = [0, 1, 4096, 8192, 100_000, 106_496, 110_592, 114_688, 200_000, 282_624, 327_680, 331_776, 400_000]
    for action in (saves.save, saves.rehearse):
        found = sweep_full_disk.sweep(limit, small_disk, sizes, action, saves.is_whole)
        failed = "warned" if action == saves.save else "one line"
        assert found.keys() == {failed, "whole"} and found[failed] > 4


def test_the_best_checkpoint_that_could_be_saved_stays_marked_and_there(tmp_path, monkeypatch):
    def write(folder: Path, _model, state: dict) -> None:
        folder.mkdir()
        if state["step"] == 4:
            raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "write_checkpoint", write)
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 4)):
        state = {"step": step, "best": {"exact_match": 0.5, "step": best}}
        assert checkpoints.save_checkpoint(tmp_path, None, state, keep=1) == (step != 4)
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "checkpoint-000002"
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path)] == ["checkpoint-000002", "checkpoint-000008"]


def test_a_disk_that_stays_full_stops_the_run_and_harms_nothing(world, small_disk, tmp_path, capsys):
    output = small_disk / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train.train_step)
        at_step(3, partial(faults.fill_disk, small_disk))
        assert train.main(arguments(world, output, save_every=1, max_steps=12, epochs=9)) == 1
    printed = capsys.readouterr().out
    assert printed.count("not saved") >= 3 and "stopped at step" in printed
    whole = checkpoints.checkpoints(output)
    assert [folder.name[-1] for folder in whole] == ["1", "2"] and clean(output)


def test_a_disk_that_is_full_before_the_first_file_is_reported_without_a_traceback(world, small_disk, tmp_path):
    output = small_disk / "out"
    output.mkdir()
    faults.fill_disk(small_disk)
    run = Run(arguments(world, output), tmp_path / "log")
    assert run.wait() == [2] and "Traceback" not in run.text()
    assert re.search(r"error: .*can't write .*\[Errno 28\] No space left", run.text())


def test_a_disk_without_room_for_a_checkpoint_is_an_error_on_all_ranks_before_step_1(world, small_disk, tmp_path):
    output = small_disk / "out"
    output.mkdir()
    faults.fill_disk(small_disk)
    os.truncate(small_disk / "filler", os.path.getsize(small_disk / "filler") - 300_000)  # a checkpoint takes 1.3 MB
    run = Run(arguments(world, output), tmp_path / "log", ranks=2)
    assert run.wait() == [2, 2]
    assert run.text().count("error: a checkpoint can't be written to") == 1 and "Traceback" not in run.text()


def test_a_read_only_folder_is_an_error_before_the_model_is_loaded(world, small_disk, monkeypatch):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(InputError, match="can't write"):
        train.main(arguments(world, small_disk / "out"))


# ------------------------------------------------------------------------------------------------------ what may change


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.03}, "lr: was 0.02, is now 0.03"),
        ({"seed": 1}, "seed: was 0, is now 1"),
        ({"lora_r": 4}, "lora_r: was 16, is now 4"),
        ({"max_steps": 8}, "max_steps: was 6, is now 8"),
        ({"max_pixels": 10000}, "image max_pixels: was "),
    ],
)
def test_settings_that_change_the_result_are_refused_with_the_difference(
    world, undisturbed, tmp_path, monkeypatch, settings, words
):
    output = copy_until(undisturbed, 4, tmp_path / "out")
    before = (output / "settings.toml").read_text()
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(InputError, match="the run has changed") as error:
        train.main(arguments(world, output, **settings))
    assert words in str(error.value) and (output / "settings.toml").read_text() == before


def test_settings_that_do_not_change_the_result_may_change(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 4, tmp_path / "elsewhere")
    model = shutil.copytree(world / "model", tmp_path / "moved")
    assert train.main(arguments(world, output, workers=1, keep=2, save_every=3, model=model)) == 0
    assert same(output, undisturbed)


def test_a_run_goes_on_with_other_micro_batches_and_the_same_losses(world, undisturbed, tmp_path, monkeypatch):
    output, counts, real = copy_until(undisturbed, 2, tmp_path / "out"), [], train.train_step

    def train_step(model, optimizer, micro_batches, *rest):
        counts.append(len(micro_batches))
        return real(model, optimizer, micro_batches, *rest)

    monkeypatch.setattr(train, "train_step", train_step)
    assert train.main(arguments(world, output, max_tokens=200)) == 0
    assert len(counts) == 4 and max(counts) > 1  # at 700 tokens each of these steps is one micro-batch
    for resumed, expected in zip(losses(output), losses(undisturbed), strict=True):
        assert resumed[:2] == expected[:2] and resumed[2] == pytest.approx(expected[2], rel=1e-4)
    assert tiny.relative_error(adapter(output), adapter(undisturbed)) < 1e-2


def test_another_base_model_is_refused(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 4, tmp_path / "out")
    model = shutil.copytree(world / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"changed": True}))
    with pytest.raises(InputError, match="base model: was"):
        train.main(arguments(world, output, model=model))


def test_a_settings_file_edited_by_hand_is_checked_and_compared(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 4, tmp_path / "out")
    settings = output / "settings.toml"
    argv = [f"--config={settings}", f"--output={output}", "--resume=auto"]
    settings.write_text(settings.read_text().replace("lr = 0.02", "lr = 0.2"))
    with pytest.raises(InputError, match="lr: was 0.02, is now 0.2"):
        train.main(argv)
    settings.write_text(settings.read_text().replace("lr = 0.2", "lr = "))
    with pytest.raises(InputError, match="settings.toml"):
        train.main(argv)
    settings.write_text(settings.read_text().replace("lr = ", "lr = 0.02"))
    assert train.main(argv) == 0
    assert same(output, undisturbed)


# ------------------------------------------------------------------------------------------------------- a run's folder


def test_a_restarted_run_passes_by_a_folder_that_no_run_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Path("runs/rows-1").mkdir(parents=True)
    assert checkpoints.open_output("", "rows", "none").name == "rows-2"


def test_a_refused_run_is_not_resumed_by_a_restart(world, undisturbed, tmp_path, monkeypatch):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    (output / "lock").write_text("process 2 on another\nlauncher 0 none\n")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError, match="holds a run"):
        train.main(arguments(world, output, resume="none"))


def test_a_run_that_was_moved_is_refused_with_the_output_to_give(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    assert train.main(arguments(world, output)) == 0
    moved = output.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"is gone, the run lies in {moved}: --output {moved}"):
        train.main(["--config", str(moved / "settings.toml"), "--resume=auto"])
    assert train.main(["--config", str(moved / "settings.toml"), "--resume=auto", f"--output={moved}"]) == 0


def test_two_runs_on_one_folder_and_a_lock_that_a_killed_run_left(world, undisturbed, tmp_path):
    output = tmp_path / "out"
    first = Run(arguments(world, output), tmp_path / "log", fault=partial(at_step, 3, partial(time.sleep, 600)))
    faults.wait_for(lambda: (output / "checkpoint-000002").exists(), 60, first.text)
    second = Run(arguments(world, output), tmp_path / "log2")
    assert second.wait(20) == [2]
    assert f"in use by process {first.processes[0].pid} on " in second.text()
    first.signal(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    assert Run(arguments(world, output), tmp_path / "log3").wait() == [0]
    assert same(output, undisturbed) and clean(output)
