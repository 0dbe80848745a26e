import json
import os
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import tiny
import torch
from runs import Run
from transformers import AutoTokenizer

import train
from data import load_data
from inputs.images import image_settings


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep the record of checked images out of the user's cache, and let other processes import product and tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here.parent), str(here)]))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Run with one thread, as the ranks do: another number of threads adds in another order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny model, images and rows of every kind. Tests only read it."""
    return tiny.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """Loss and gradients of the world's rows, each run alone."""
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    return tiny.Reference(world, tiny.lora_model(world), tmp_path_factory.mktemp("adapter")).loss_and_gradients(rows)


@pytest.fixture(scope="session")
def undisturbed(world, tmp_path_factory):
    """The folder of a run of 6 steps that nothing disturbed. Tests only read it, or copy it with `copy_until`."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert train.main(faults.arguments(world, output)) == 0
    return output


@pytest.fixture(scope="session")
def on_two_ranks(world, tmp_path_factory):
    """The folder of the same run on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    Run(faults.arguments(world, folder / "out"), folder / "log", ranks=2).succeed()
    return folder / "out"


@pytest.fixture(scope="session")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "model")


@pytest.fixture(scope="session")
def settings(world):
    """The world's image settings."""
    return image_settings(world / "model")


@pytest.fixture
def load(world, tmp_path, tokenizer, settings):
    """Load rows, given as objects or lines, with the images of `world` unless others are given."""

    def load(rows, images=world / "images", max_tokens=100_000, **options):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return load_data([tmp_path / "rows.jsonl"], images, tokenizer, settings, max_tokens, **options)

    return load


@pytest.fixture
def announce():
    """Print what a slow test does next and the seconds until then: `pytest -s` shows where the time goes."""
    started = time.perf_counter()
    return lambda step: print(f"{time.perf_counter() - started:7.1f} s: {step}", flush=True)


@pytest.fixture
def hold():
    """Lock files for another process."""
    holders = []

    def hold(path: Path) -> None:
        code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, 6); print(1, flush=True)"
        words = [sys.executable, "-c", f"{code}; time.sleep(60)", path]
        holders.append(subprocess.Popen(words, stdout=subprocess.PIPE))
        holders[-1].stdout.readline()

    yield hold
    for holder in holders:
        holder.kill()
        holder.wait()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
