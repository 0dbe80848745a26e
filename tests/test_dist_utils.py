"""Promise 2: the plan doesn't know the machine. 1, 2 and 4 ranks give the same losses, gradients and weights."""

import pytest
import rank_steps
import tiny
import torch
from runs import Run


def steps_on(ranks: int, world, folder, *settings) -> dict:
    """What the steps of two epochs give on so many ranks; settings: batch size, questions per image, dropout."""
    out = folder / f"{ranks}.pt"
    Run([world, out, *settings], folder / f"{ranks}.log", ranks, main=rank_steps.main).succeed()
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("batch_size", "per_image", "dropout"), [(33, 0, 0.0), (3, 0, 0.1)])
def test_ranks_do_not_change_losses_gradients_or_weights(world, tmp_path, batch_size, per_image, dropout):
    """33: one step holds every kind of row; 3: most steps have fewer trees than there are ranks."""
    one, two, four = (steps_on(n, world, tmp_path, batch_size, per_image, dropout) for n in (1, 2, 4))
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
