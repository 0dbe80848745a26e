"""A run's folder whose files are damaged, that another process uses, that goes away, or that another version wrote: all
of it is named, and nothing outside the folder is touched."""

import errno
import fcntl
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import arguments, at_step, copy_until
from runs import lines, same

import common
import train
from common import PARTIAL, InputError, lock_folder
from inputs.refused import stop_or_skip_bad
from inputs.rows import BadRow
from training import checkpoints, settings
from training.compatibility import PLAN_VERSION
from training.metrics import read_metrics
from training.progress import Progress

GARBAGE = [b"", b"\x00\xff\xfe", b"{", b"[]", b"null", b'"text"', b'{"checkpoint": 3}', b"[" * 100_000, b'{"a": NaN}']


# ------------------------------------------------------------------------------------------------ a folder that is gone


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def test_a_list_of_bad_rows_that_can_not_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "bad_rows.jsonl").mkdir()
    for bad in ([], [BadRow("rows.jsonl:1", "no answer", {})]):
        with pytest.raises(InputError, match="not written, .*bad_rows.jsonl: .*directory"):
            stop_or_skip_bad(bad, ["rows.jsonl"], {0}, False, tmp_path, "")


@pytest.mark.parametrize(
    ("fault", "save_every"),  # noticed by the save, or by the next line of metrics
    [(shutil.rmtree, 1), (empty, 0), (lambda folder: folder.rename(folder.with_name("moved")), 0)],
)
def test_a_run_whose_folder_goes_away_ends_with_code_1_and_says_so(world, tmp_path, capsys, fault, save_every):
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train.train_step)
        at_step(2, partial(fault, output))
        words = arguments(world, output, save_every=save_every, eval_every=0, max_steps=9, epochs=9)
        assert train.main([*words, "--val="]) == 1
    gone = rf"error: stopped at step [23] of 9: .* was not saved to {output} \({output} was removed, emptied, moved"
    assert re.search(gone, capsys.readouterr().out) and not list(output.glob("checkpoint-*"))
    assert output.exists() == (fault is empty)


def test_lines_of_metrics_go_on_in_a_new_file_where_theirs_was_removed(world, undisturbed, tmp_path, capsys):
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train.train_step)
        at_step(4, lambda: (output / "metrics.jsonl").unlink())
        assert train.main(arguments(world, output)) == 0
    assert capsys.readouterr().out.count("metrics.jsonl was removed or replaced: lines are added") == 1
    assert [line["step"] for line in lines(output, "train")] == [4, 5, 6]


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("content", GARBAGE)
def test_a_damaged_best_json_is_named_and_no_checkpoint_counts_as_best(undisturbed, tmp_path, capsys, content):
    output = copy_until(undisturbed, 4, tmp_path / "out")
    (output / "best.json").write_bytes(content)
    assert checkpoints.pick_checkpoint(output).name == "checkpoint-000004"
    assert "best.json is damaged" in capsys.readouterr().out


def test_best_json_names_nothing_outside_the_folder(undisturbed, tmp_path, capsys):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    for name in (str(undisturbed / "checkpoint-000006"), "../out/checkpoint-000002", ""):
        (output / "best.json").write_text(json.dumps({"checkpoint": name}))
        assert checkpoints.marked_best(output) == "" and "best.json is damaged" in capsys.readouterr().out


def changed_manifest(**changes):
    def change(manifest: dict) -> bytes:
        changed = {name: value for name, value in (manifest | changes).items() if value is not None}
        return json.dumps(changed).encode()

    return change


def with_file(name: str):
    written = {"bytes": 0, "sha256": ""}
    return lambda manifest: json.dumps(manifest | {"files": manifest["files"] | {name: written}}).encode()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *((lambda _, content=content: content, "no readable manifest.json") for content in GARBAGE),
        *((changed_manifest(**{name: None}), "no readable manifest.json") for name in ("files", "step", "identity")),
        *((changed_manifest(files=files), "no readable manifest") for files in ([], {"a": 1}, {"a": {"bytes": 0.5}})),
        (changed_manifest(files={}), "does not name adapter_config.json"),
        (changed_manifest(step="2"), "no readable manifest.json"),
        (changed_manifest(identity=[]), "no readable manifest.json"),
        *((with_file(name), "no file of the checkpoint") for name in ("../../a", "/etc/passwd", "a/b", "..", ".", "")),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named_and_never_leads_outside(undisturbed, tmp_path, change, problem):
    folder = shutil.copytree(undisturbed / "checkpoint-000006", tmp_path / "checkpoint-000006")
    manifest = folder / "manifest.json"
    manifest.write_bytes(change(json.loads(manifest.read_text())))
    assert problem in checkpoints.damage(folder)
    with pytest.raises(InputError, match="is damaged: .*name another checkpoint"):
        checkpoints.pick_checkpoint(folder)


def resealed(folder: Path) -> Path:
    """The checkpoint with a manifest that fits its files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: checkpoints.size_and_sum(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    "state", [b"garbage", [], {"step": 2}, {"step": 2, "settings": {"image_settings": {"a": 1}}}, 0]
)
def test_a_state_that_is_none_is_one_clear_error(undisturbed, tmp_path, state):
    folder = shutil.copytree(undisturbed / "checkpoint-000006", tmp_path / "checkpoint-000006")
    (folder / "state.pt").write_bytes(state) if isinstance(state, bytes) else torch.save(state, folder / "state.pt")
    with pytest.raises(InputError, match="state.pt can't be used, name another checkpoint: .*Error"):
        checkpoints.read_state(resealed(folder))


@pytest.mark.parametrize("change", [{"optimizer": {}}, {"best": {"step": "4"}}])
def test_a_state_of_something_else_is_refused_before_training(world, undisturbed, tmp_path, change):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    folder = output / "checkpoint-000002"
    torch.save(checkpoints.read_state(folder) | change, folder / "state.pt")
    resealed(folder)
    with pytest.raises(InputError, match="state.pt does not fit this run, name another checkpoint"):
        train.main(arguments(world, output))


def test_damaged_lines_of_metrics_are_left_out_and_counted(world, undisturbed, tmp_path, capsys):
    output = copy_until(undisturbed, 4, tmp_path / "out")
    damaged = [b"\x00\xff\n", b"{\n", b"[]\n", b"3\n", b"\n", b'{"event": "train", "step": "4"}\n']
    damaged += [b'{"event": "train", "step": 3}\n', b'{"event": "eval", "step": 3, "loss": NaN, "exact_match": 1}\n']
    damaged += [b'{"event": "eval", "step": 2, "loss": 1, "exact_match": 1, "by_type": [1]}\n', b"[" * 9999 + b"\n"]
    path = output / "metrics.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([good[0], *damaged, *good[1:], b'{"event": "tr']))
    assert train.main(arguments(world, output)) == 0
    printed = capsys.readouterr().out
    assert f"{path}: {len(damaged)} damaged line(s) left out, the first is line 2" in printed
    assert printed.count("damaged line") == 1 and same(output, undisturbed)


def test_a_line_that_a_kill_has_cut_is_nothing_to_warn_of(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"event": "skipped", "step": 1}\n{"event": "sk')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1 and not capsys.readouterr().out


# ------------------------------------------------------------------------------------------- partial files, and outside


def test_partial_files_of_any_kind_are_cleared_and_nothing_outside_is(undisturbed, tmp_path):
    output, outside = copy_until(undisturbed, 2, tmp_path / "out"), tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (output / f"{PARTIAL}link").symlink_to(outside)
    (output / f"{PARTIAL}dangling").symlink_to(tmp_path / "nowhere")
    (output / f"{PARTIAL}old-checkpoint-000009").symlink_to(outside)
    (output / f"{PARTIAL}old-checkpoint-000008").touch()
    (output / f"{PARTIAL}old-anything").mkdir()
    (output / f"{PARTIAL}folder").mkdir()
    (output / f"{PARTIAL}folder" / "link").symlink_to(outside)
    checkpoints.open_output(str(output), "", "auto")
    assert not list(output.glob(f"{PARTIAL}*")) and (outside / "below").is_dir()
    assert not (output / "anything").exists() and not (output / "checkpoint-000008").exists()


def test_a_checkpoint_that_is_a_link_is_dropped_without_what_it_leads_to(world, undisturbed, tmp_path):
    output, outside = copy_until(undisturbed, 4, tmp_path / "out"), tmp_path / "outside"
    (output / "checkpoint-000002").rename(outside)
    (output / "checkpoint-000002").symlink_to(outside)
    (output / "checkpoint-000001").touch()  # a file
    assert train.main(arguments(world, output, keep=1)) == 0
    assert not checkpoints.damage(outside) and checkpoints.marked_best(output)
    assert not os.path.lexists(output / "checkpoint-000001") and not os.path.lexists(output / "checkpoint-000002")


# ---------------------------------------------------------------------------------------------------- who may use it


@pytest.mark.parametrize("text", [b"process 7 on node\nlauncher 1\n", b"", b"\xff\xfe\n"])
def test_a_folder_that_another_process_uses_is_refused(tmp_path, hold, text):
    (tmp_path / "lock").write_bytes(text)
    hold(tmp_path / "lock")
    user = {b"p": "process 7 on node", b"": "another process", b"\xff": ".*"}[text[:1]]
    with pytest.raises(InputError, match=f"--output {tmp_path} is in use by {user}"):
        checkpoints.open_output(str(tmp_path), "", "none")


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert checkpoints.open_output(str(tmp_path / "out"), "", "none") == tmp_path / "out"
    assert "can't be locked ([Errno 37] No locks available)" in capsys.readouterr().err


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="can't write to .*symbolic links"):
        checkpoints.open_output(str(tmp_path / "out"), "", "none")
    assert (tmp_path / "outside").read_text() == "precious"


def test_an_output_that_is_a_file_or_read_only_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--output: .*file is a file, name a folder"):
        checkpoints.open_output(str(tmp_path / "file"), "", "none")

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    lock_folder(tmp_path / "out", "--output")
    monkeypatch.setattr(common, "write_whole", refuse)  # the lock is there from before, and may be opened
    with pytest.raises(InputError, match="--output: can't write to .*Read-only file system"):
        lock_folder(tmp_path / "out", "--output")


def test_a_folder_may_have_any_name_that_is_text(undisturbed, tmp_path):
    output = copy_until(undisturbed, 6, tmp_path / "a [1]*?\n'quoted\" 息肉 #")
    settings_file = output / "settings.toml"
    settings_file.write_text(
        settings.to_toml(settings.parse_settings([f"--config={settings_file}", f"--output={output}"]))
    )
    assert train.main([f"--config={settings_file}", "--resume=auto"]) == 0
    assert settings.parse_settings([f"--config={settings_file}"]).output == str(output)


# ---------------------------------------------------------------------------------------------------- other versions

FIRST_RELEASE = json.loads((Path(__file__).parent / "identity_of_first_release.json").read_text())


def as_of_first_release(folder: Path) -> None:
    """Give a checkpoint the identity and the settings that the first release knew."""
    manifest, state = json.loads((folder / "manifest.json").read_text()), torch.load(folder / "state.pt")
    identity = FIRST_RELEASE | {"base model": manifest["identity"]["base model"]}
    known = identity.keys() | settings.FREE_SETTINGS
    state["settings"] = {name: value for name, value in state["settings"].items() if name in known} | {
        "image_settings": {
            name.removeprefix("image "): value for name, value in FIRST_RELEASE.items() if name.startswith("image ")
        }
    }
    torch.save(state | {"identity": identity}, folder / "state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest | {"identity": identity}))
    resealed(folder)


@pytest.fixture
def new_flag(monkeypatch):
    """A flag that came after the first release, and changes what a run learns."""
    real = settings.build_parser

    def build_parser():
        parser = real()
        parser.add_argument("--invented", type=settings.number(int, 0), default=0)
        return parser

    monkeypatch.setattr(settings, "build_parser", build_parser)
    monkeypatch.setattr("training.compatibility.build_parser", build_parser)


def test_a_checkpoint_resumes_whatever_flags_were_added_since(world, undisturbed, tmp_path, new_flag):
    output = copy_until(undisturbed, 4, tmp_path / "out")
    assert "invented" not in checkpoints.read_manifest(output / "checkpoint-000004")["identity"]
    with pytest.raises(InputError, match="the run has changed:\n  invented: was 0, is now 3$"):
        train.main(arguments(world, output, invented=3))
    assert train.main(arguments(world, output)) == 0
    assert same(output, undisturbed)


@pytest.mark.parametrize("version", [None, 1, PLAN_VERSION + 1])  # None: as the first release wrote it
def test_a_run_that_another_version_planned_is_refused_with_the_reason_once(world, undisturbed, tmp_path, version):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    folder = output / "checkpoint-000002"
    if version is None:
        as_of_first_release(folder)
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["identity"]["plan version"] = version
        (folder / "manifest.json").write_text(json.dumps(manifest))
    for settings_now in ({}, {"lr": 0.03, "seed": 1, "lora_r": 4}):  # no list of differences comes with it
        with pytest.raises(InputError) as refused:
            train.main(arguments(world, output, **settings_now))
        reason, *more = str(refused.value).split(": another version began its run, ")
        assert reason == f"{folder} can't be resumed" and len(more) == 1 and "\n" not in more[0]
        assert "steps of other trees" in more[0] and f"--init-from {folder}. eval.py and merge.py" in more[0]


def test_a_checkpoint_of_the_first_release_starts_a_new_run_and_is_evaluated_and_merged(
    world, undisturbed, tmp_path, capsys, new_flag
):
    folder = copy_until(undisturbed, 2, tmp_path / "old") / "checkpoint-000002"
    as_of_first_release(folder)
    assert train.main(arguments(world, tmp_path / "new", init_from=folder, max_steps=1, eval_every=0)) == 0
    assert f"LoRA starts from the weights of {folder}" in capsys.readouterr().out
    found, state = checkpoints.find_adapter(str(folder), "")  # as eval.py and merge.py do
    run = state["settings"]
    assert found == folder and run["invented"] == 0 and run["image_settings"]["window_size"] == 0
    assert run["lora_r"] == 16 and run["max_tokens"] == 700


def test_settings_that_only_a_newer_version_knows_are_named(world, undisturbed, tmp_path, capsys):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    folder = output / "checkpoint-000002"
    manifest, state = json.loads((folder / "manifest.json").read_text()), torch.load(folder / "state.pt")
    state["settings"] |= {"beta": 0.5, "off": False}
    torch.save(state, folder / "state.pt")
    manifest["identity"] |= {"beta": 0.5, "off": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    resealed(folder)
    with pytest.raises(InputError, match="the run has changed:\n  beta = 0.5: only a newer version knows it$"):
        train.main(arguments(world, output))
    capsys.readouterr()
    checkpoints.read_state(folder)  # as for an evaluation
    assert "trained with settings that this version does not know: beta = 0.5\n" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- the rehearsal


def test_the_rehearsed_checkpoint_is_as_large_as_a_real_one(world, tmp_path, monkeypatch):
    sizes, write = [], checkpoints.write_checkpoint

    def measured(folder, *rest):
        write(folder, *rest)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))

    monkeypatch.setattr(checkpoints, "write_checkpoint", measured)
    monkeypatch.setattr("training.rehearsal.write_checkpoint", measured)
    assert train.main(arguments(world, tmp_path / "out", max_steps=2, eval_every=0)) == 0
    assert len(sizes) == 2 and sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_progress_of_a_checkpoint_has_the_types_that_the_loop_needs():
    for state in ({"step": "2"}, {"best": [1]}, {"best": {"step": None}}, {"sums": 1}, {"evaluation_due": 1}):
        with pytest.raises(TypeError):
            Progress.from_state(state)
    assert Progress.from_state({"step": 2}) == Progress(step=2)


# ------------------------------------------------------------------------------------------------- names, and workers


@pytest.mark.parametrize("flag", ["output", "images", "train", "model", "resume"])
def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_written(world, tmp_path, flag):
    words = [word for word in arguments(world, tmp_path / "out") if not word.startswith(f"--{flag}=")]
    with pytest.raises(InputError, match=rf"--{flag}: '.*\\udcff' holds bytes that are not UTF-8"):
        train.main([*words, f"--{flag}={tmp_path}/a\udcff"])
    assert not list(tmp_path.iterdir())


def test_a_folder_below_one_whose_name_is_not_utf_8_is_refused(world, tmp_path, monkeypatch):
    folder = tmp_path / "a\udcff"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="not UTF-8"):
        checkpoints.open_output("out", "", "none")
    assert not list(folder.iterdir())


def test_shared_memory_that_data_workers_would_fill_is_told_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("loaded the model"))
    usage = SimpleNamespace(free=500_000)
    monkeypatch.setattr("training.shared_memory.shutil", SimpleNamespace(disk_usage=lambda _: usage))
    with pytest.raises(
        InputError, match=r"has 0.5 MiB free, and the batches of --workers 4 may take \d+: give --workers"
    ):
        train.main(arguments(world, tmp_path / "out", workers=4))
