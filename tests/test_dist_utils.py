"""Promise 2: the plan doesn't know the machine. 1, 2 and 4 ranks give the same losses, gradients and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

HERE = Path(__file__).parent


def torchrun(ranks: int, *command, timeout: int = 300, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a script of ours on `ranks` CPU ranks of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    words = [*launcher, *map(str, command)]
    return subprocess.run(words, env=environment, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False)


def run(world, tmp_path, ranks: int, batch_size: int, per_image: int, dropout: float) -> dict:
    out = tmp_path / f"{ranks}.pt"
    done = torchrun(ranks, HERE / "rank_steps.py", world, out, batch_size, per_image, dropout)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("batch_size", "per_image", "dropout"), [(33, 0, 0.0), (3, 0, 0.1)])
def test_ranks_do_not_change_losses_gradients_or_weights(world, tmp_path, batch_size, per_image, dropout):
    """33: one step holds every kind of row; 3: most steps have fewer trees than there are ranks."""
    one, two, four = (run(world, tmp_path, n, batch_size, per_image, dropout) for n in (1, 2, 4))
    for other in (two, four):
        assert other["samples"] == one["samples"]
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert tiny.relative_error(other["gradients"], one["gradients"]) < 1e-5
        torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-3, atol=1e-5)
    samples = len(tiny.load_world(world)[0].samples)
    steps = -(-samples // batch_size)
    for epoch in (one["samples"][:steps], one["samples"][steps:]):
        assert sorted(i for step in epoch for i in step) == list(range(samples))
    if batch_size == 3:
        assert any(0 in counts for counts in four["counts"])  # an idle rank took part in the all-reduce
