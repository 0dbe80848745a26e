"""Promises 3, 4 and 5 under faults: what each fault must lead to, and that the run that goes on ends like one that
nothing disturbed, to the last bit of its adapter and of its metrics."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faults
import pytest
import tiny
import torch
from faults import Run, arguments, at_step, losses, result, same

import dist_utils
import train
from common import InputError
from dist_utils import SIGNALS, STOPPED, Stop
from training import checkpoints


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the ranks: another number of threads sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert train.main(arguments(world, output)) == 0
    return output


@pytest.fixture(scope="module")
def on_two_ranks(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert Run(arguments(world, folder / "out"), folder / "log", ranks=2).wait() == [0, 0]
    return folder / "out"


def copy_until(finished: Path, step: int, output: Path) -> Path:
    """What was there after `step` steps of a finished run."""
    shutil.copytree(finished, output)
    for folder in checkpoints.checkpoints(output):
        if int(folder.name[-6:]) > step:
            shutil.rmtree(folder)
    return output


def clean(output: Path) -> bool:
    return not list(output.glob(f"{checkpoints.PARTIAL}*")) and not any(
        map(checkpoints.damage, checkpoints.checkpoints(output))
    )


# ---------------------------------------------------------------------------------------------------- killed in a save


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
def test_killed_in_a_save(world, undisturbed, tmp_path, place):
    output = tmp_path / "out"
    fault = partial(faults.kill_in_save, place)
    assert Run(arguments(world, output, keep=1), tmp_path / "log", fault=fault).wait() == [-signal.SIGKILL]
    (newest,) = (folder for folder in checkpoints.checkpoints(output)[-1:])
    complete = place in ("after the rename", "before old ones are dropped")
    assert newest.name == ("checkpoint-000004" if complete else "checkpoint-000002")
    assert train.main(arguments(world, output, keep=1)) == 0
    assert same(output, undisturbed) and clean(output)


def test_killed_after_the_last_save_before_the_best_one_is_marked(world, undisturbed, tmp_path):
    output = tmp_path / "out"
    fault = partial(faults.kill_in_save, "after the rename", step=6)
    assert Run(arguments(world, output), tmp_path / "log", fault=fault).wait() == [-signal.SIGKILL]
    assert train.main(arguments(world, output)) == 0
    assert (output / "best.json").read_text() == (undisturbed / "best.json").read_text()


def test_killed_while_a_checkpoint_is_replaced(world, undisturbed, tmp_path, capsys):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    (output / "checkpoint-000002").rename(output / f"{checkpoints.PARTIAL}old-checkpoint-000002")
    assert train.main(arguments(world, output)) == 0
    assert "at step 2" in capsys.readouterr().out and same(output, undisturbed) and clean(output)


# ------------------------------------------------------------------------------------------------------- damaged files


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


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
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(world, undisturbed, tmp_path, capsys, name):
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
    """A state file with a pickled call, its checksum in order."""
    output, ran = copy_until(undisturbed, 2, tmp_path / "out"), tmp_path / "ran"
    folder = output / "checkpoint-000002"

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save({"step": Call()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = checkpoints.size_and_sum(folder / "state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        train.main(arguments(world, output))
    assert not ran.exists()


def test_when_all_checkpoints_are_damaged_nothing_starts_over_in_silence(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    truncate(output / "checkpoint-000002" / "state.pt", 0)
    with pytest.raises(InputError, match="another --output"):
        train.main(arguments(world, output))


# --------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_nothing_else(world, undisturbed, small_disk, capsys):
    def fill_and_free(step: int) -> None:
        real = train.train_step

        def train_step(model, optimizer, micro_batches, *rest):
            number = micro_batches[0].work.step.number + 1
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


def test_a_disk_that_is_full_before_the_first_file_is_told_without_a_traceback(world, small_disk, tmp_path):
    output = small_disk / "out"
    output.mkdir()
    faults.fill_disk(small_disk)
    run = Run(arguments(world, output), tmp_path / "log")
    assert run.wait() == [1] and "Traceback" not in run.text()
    assert "error: no room on a disk: [Errno 28]" in run.text()


def test_more_processes_than_gpus_are_refused_on_each_of_them(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"4 processes on a node where 2 GPU\(s\) are seen: --nproc_per_node=2"):
        dist_utils.start()


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


# --------------------------------------------------------------------------------------------------- ranks that fail


def test_one_rank_that_raises_ends_the_job_with_its_traceback_once_and_its_samples(world, on_two_ranks, tmp_path):
    output, started = tmp_path / "out", time.monotonic()
    run = Run(arguments(world, output), tmp_path / "log", 2, partial(at_step, 3, faults.fail, rank=1))
    assert run.wait(60) == [1, 1] and time.monotonic() - started < 60
    assert run.text().count("Traceback") == 1 and run.text().count("ValueError: injected") == 1
    assert "rank 1, step 3, samples rows.jsonl:" in run.text() and "rank 0 lost the others" in run.text()
    assert Run(arguments(world, output), tmp_path / "log", ranks=2).wait() == [0, 0]
    assert same(output, on_two_ranks)


def test_wrong_settings_are_told_once_though_rank_0_comes_last(world, tmp_path):
    fault, log = "int(os.environ['RANK']) or time.sleep(3)", tmp_path / "log"
    argv = arguments(world, tmp_path / "out", train=tmp_path / "nothing.jsonl")
    started = time.monotonic()
    assert faults.torchrun(argv, log, fault=fault).wait(timeout=60) != 0 and time.monotonic() - started < 45
    assert log.read_text().count("nothing.jsonl does not exist") == 1


def test_a_failure_is_told_with_its_traceback_whatever_its_text():
    program = """
import dist_utils
def main(*_):
    print("█")
    raise RuntimeError("/gloom/a.jpg")
dist_utils.run_and_exit(main, [])
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # a terminal that knows fewer characters
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "\\u2588\n"
    assert done.returncode == 1 and "RuntimeError: /gloom/a.jpg" in done.stderr and "Traceback" in done.stderr


def test_one_rank_that_hangs_is_noticed_and_shows_where(world, tmp_path):
    fault = "short_timeouts(5, partial(at_step, 3, partial(time.sleep, 1000), 1))"
    started, log = time.monotonic(), tmp_path / "log"
    launcher = faults.torchrun(arguments(world, tmp_path / "out"), log, fault=fault)
    assert launcher.wait(timeout=100) != 0 and time.monotonic() - started < 90
    text = log.read_text()
    assert "rank 0 lost the others (rank 0, step 3, samples" in text and "Timed out" in text
    assert "Timeout (0:00:02)!" in text and "faults.py" in text  # the stack of the rank that hung
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path / "out")] == ["checkpoint-000002"]


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(world, on_two_ranks, tmp_path):
    """In a folder that train.py chose itself."""
    fault = f"at_step(4, partial(first_time, Path({str(tmp_path / 'killed')!r}), kill_me), 1)"
    argv = [word for word in arguments(world, tmp_path) if not word.startswith(("--output", "--resume"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert faults.torchrun(argv, tmp_path / "log", 2, ("--max-restarts=1",), fault).wait(timeout=120) == 0
    assert "checkpoint-000002 at step 2" in (tmp_path / "log").read_text()
    assert same(tmp_path / "runs" / "rows-1", on_two_ranks) and not (tmp_path / "runs" / "rows-2").exists()


@pytest.mark.parametrize("target", faults.TARGETS)
def test_killed_at_a_random_moment(world, on_two_ranks, tmp_path, target):
    output = tmp_path / "out"
    story = faults.kill_until_done(arguments(world, output), tmp_path / "log", random.Random(), [target])
    assert same(output, on_two_ranks) and clean(output), story


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("rank", [1, None])
def test_a_signal_to_a_rank_or_to_all_saves_and_tells_stopped_from_done(world, on_two_ranks, tmp_path, number, rank):
    output = tmp_path / "out"
    fault = partial(at_step, 3, partial(faults.kill_me, number), rank)
    run = Run(arguments(world, output), tmp_path / "log", ranks=2, fault=fault)
    assert run.wait() == [STOPPED, STOPPED], run.text()
    assert f"stopped by {number.name} at step 3 of 6" in run.text() and "Traceback" not in run.text()
    assert (output / "status").read_text().startswith("stopped 3\nstep 3 of 6, epoch 0.60, ")
    assert Run(arguments(world, output), tmp_path / "log", ranks=2).wait() == [0, 0]
    assert (output / "status").read_text().startswith("done 6\nstep 6 of 6, epoch 1.20, loss ")
    assert same(output, on_two_ranks) and clean(output)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def slurm_flags() -> tuple:
    """What run.slurm tells torchrun about signals."""
    text = (Path(__file__).parents[2] / "run.slurm").read_text()
    return tuple(word for word in text.split() if word.startswith("--signals-to-handle="))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("to", ["torchrun", "everything"])
def test_a_signal_to_torchrun_or_to_every_process_of_the_job(world, on_two_ranks, tmp_path, number, to):
    output, log = tmp_path / "out", tmp_path / "log"
    launcher = faults.torchrun(arguments(world, output, workers=1), log, 2, slurm_flags(), "slowly(0.5)")
    faults.wait_for(lambda: '"step": 1' in text_of(output / "metrics.jsonl"), 90, log.read_text)
    everything = faults.descendants(launcher.pid)
    for pid in [launcher.pid] if to == "torchrun" else [launcher.pid, *everything]:
        os.kill(pid, number)
    launcher.wait(timeout=30)
    faults.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everything), 10)
    assert "exited unexpectedly" not in log.read_text() and "Traceback" not in log.read_text().split("stopped by")[0]
    assert (output / "status").read_text().startswith("stopped")
    assert Run(arguments(world, output), log, ranks=2).wait() == [0, 0]
    assert same(output, on_two_ranks) and clean(output)


def test_a_run_under_nohup_outlives_its_terminal(monkeypatch):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        Stop().watch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


@pytest.mark.parametrize(("seconds", "state"), [(1, "running"), (20, "stopped")])
def test_torchrun_waits_for_a_step_of_four_seconds_as_long_as_it_is_told(world, tmp_path, monkeypatch, seconds, state):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(seconds))
    output, log = tmp_path / "out", tmp_path / "log"
    launcher = faults.torchrun(arguments(world, output), log, 2, slurm_flags(), "slowly(4)")
    faults.wait_for(lambda: '"step": 1' in text_of(output / "metrics.jsonl"), 90, log.read_text)
    os.kill(launcher.pid, signal.SIGUSR1)
    launcher.wait(timeout=60)
    assert (output / "status").read_text().startswith(state)


def test_a_slurm_job_has_most_of_the_time_between_signal_and_end_for_a_step_and_a_save():
    text = (Path(__file__).parents[2] / "run.slurm").read_text()
    wait, ahead = (int(re.search(rf"{name}(\d+)", text)[1]) for name in ("SHUTDOWN_TIMEOUT:-", "--signal=USR1@"))
    assert 0.8 * ahead <= wait < ahead


def test_control_c_twice_quits_at_once(world, tmp_path):
    fault = partial(at_step, 3, partial(time.sleep, 30))
    run = Run(arguments(world, tmp_path / "out"), tmp_path / "log", fault=fault)
    faults.wait_for(lambda: (tmp_path / "out" / "checkpoint-000002").exists(), 60, run.text)
    run.signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.processes[0].is_alive()
    run.signal(signal.SIGINT)
    assert run.wait(5) == [130]


@pytest.mark.parametrize("evaluation", [2, 3, 4])  # the third is that of the last step
def test_a_stop_during_an_evaluation_is_made_good_on_resume(world, undisturbed, tmp_path, monkeypatch, evaluation):
    output, stop, calls = tmp_path / "out", Stop(), []
    real = train.evaluate

    def evaluate(*args):
        calls.append(args)
        if len(calls) == evaluation:  # the first is the rehearsal's
            stop.reason = "SIGTERM"
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert train.main(arguments(world, output), stop) == STOPPED
    assert (output / "status").read_text().startswith(f"stopped {2 * (evaluation - 1)}\n")
    assert train.main(arguments(world, output)) == 0
    assert same(output, undisturbed) and clean(output)
    assert (output / "best.json").read_text() == (undisturbed / "best.json").read_text()


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_an_image_lost_during_training_is_named_and_training_resumes_when_it_is_back(
    world, undisturbed, tmp_path, how, workers
):
    images = shutil.copytree(world / "images", tmp_path / "images")
    lost = (images / "a.png").unlink if how == "deleted" else partial(truncate, images / "a.png", 0.5)
    output = tmp_path / "out"
    run = Run(
        arguments(world, output, images=images, workers=workers), tmp_path / "log", fault=partial(at_step, 3, lost)
    )
    assert run.wait() == [1]
    assert "rows.jsonl:" in run.text() and "a.png" in run.text() and "can't be read any more" in run.text()
    shutil.copy(world / "images" / "a.png", images / "a.png")
    assert train.main(arguments(world, output, images=images)) == 0
    assert same(output, undisturbed)


def test_a_data_worker_that_stalls_is_named(world, tmp_path):
    run = Run(arguments(world, tmp_path / "out", workers=2), tmp_path / "log", fault=faults.stall_in_worker)
    assert run.wait(60) == [1]
    assert "timed out after 3 seconds" in run.text() and "data worker " in run.text() and ".png" in run.text()


# ------------------------------------------------------------------------------------------------ resuming elsewhere


def test_one_two_and_three_ranks_resume_each_other(world, undisturbed, tmp_path):
    output = tmp_path / "out"
    for ranks, step in ((2, 1), (3, 3), (1, 4), (2, None)):
        fault = partial(at_step, step, partial(faults.kill_me, signal.SIGTERM)) if step else None
        run = Run(arguments(world, output), tmp_path / f"log{ranks}", ranks, fault)
        assert run.wait() == [STOPPED if step else 0] * ranks, run.text()
    for mine, theirs in zip(losses(output), losses(undisturbed), strict=True):
        assert mine[:2] == theirs[:2] and mine[2] == pytest.approx(theirs[2], rel=1e-5)
    assert tiny.relative_error(result(output), result(undisturbed)) < 1e-2


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


def test_settings_that_do_not_change_the_result_are_free(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 4, tmp_path / "elsewhere")
    model = shutil.copytree(world / "model", tmp_path / "moved")
    assert train.main(arguments(world, output, workers=1, keep=2, save_every=3, model=model)) == 0
    assert same(output, undisturbed)


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


def test_metrics_cut_by_a_kill_and_lines_after_the_checkpoint_are_written_again(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    assert train.main(arguments(world, output)) == 0
    assert same(output, undisturbed)


def test_a_log_interval_across_a_stop_averages_the_same_steps(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(world, whole, log_every=4, eval_every=0)) == 0
    run = Run(
        arguments(world, parts, log_every=4, eval_every=0),
        tmp_path / "log",
        fault=partial(at_step, 3, partial(faults.kill_me, signal.SIGTERM)),
    )
    assert run.wait() == [STOPPED]
    assert train.main(arguments(world, parts, log_every=4, eval_every=0)) == 0
    assert losses(parts) == losses(whole)


def test_a_restarted_run_passes_by_a_folder_that_no_run_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Path("runs/rows-1").mkdir(parents=True)
    assert checkpoints.open_output("", "rows", "none").name == "rows-2"


def test_a_refused_run_is_not_resumed_by_a_restart(world, undisturbed, tmp_path, monkeypatch):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    (output / "lock").write_text("process 2 on another\nlauncher 1 none\n")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(InputError, match="holds a run"):
        train.main(arguments(world, output, resume="none"))


def test_a_run_that_was_moved_is_told_where_it_lies(world, undisturbed, tmp_path):
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
