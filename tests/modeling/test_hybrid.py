"""Qwen3.5, three of whose four layers are recurrent: what is kept from one token to the next follows the tree.

tests/modeling/test_families.py holds this family to what is promised of all.
"""

import runpy
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import test_dist_utils
import test_dropout
import tiny
import torch
from runs import arguments
from steps import assert_exact, run_step, whole
from test_model import (  # noqa: F401 (these run here with this family)
    test_one_branch_does_not_leak_into_another,
    test_padding_changes_nothing,
    test_trees_of_one_branch_and_split_trees_equal_whole_ones,
)

import data as data_file
import eval as evaluation
import train
from common import InputError
from data import build_batch
from inputs.positions import token_paths
from modeling import delta
from modeling.memory import compile_layers
from modeling.targets import HYBRID_TARGETS
from training import checkpoints
from training.settings import parse_settings
from trees import Assignment

ALL = HYBRID_TARGETS + ",in_proj_a,in_proj_b"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("hybrid"), family="qwen3_5")


@pytest.fixture(scope="module")
def trees(world):
    return whole(tiny.load_world(world)[0].samples)


# ------------------------------------------------------------------------------------------------------------ exactness


def test_lora_on_the_gates_and_a_linear_layer_at_the_end_are_exact(tmp_path, monkeypatch):
    """Released models end with full attention, as the other tests do."""
    monkeypatch.setitem(tiny.HYBRID, "layer_types", ["linear_attention", "full_attention", "linear_attention"])
    world = tiny.write_world(tmp_path / "world", family="qwen3_5")
    model = tiny.lora_model(world, targets=ALL)
    expected = tiny.Reference(world, model, tmp_path / "adapter").loss_and_gradients(tiny.mixed_rows())
    trees = whole(tiny.load_world(world)[0].samples)
    assert_exact(run_step(world, [trees[::2], trees[1::2]], targets=ALL), expected)


def test_ranks_do_not_change_losses_gradients_or_weights(world, tmp_path):
    test_dist_utils.test_ranks_do_not_change_losses_gradients_or_weights(world, tmp_path, 3, 0, 0.1)


@pytest.mark.parametrize("more", [{"targets": ALL}, {"targets": HYBRID_TARGETS, "dora": True}], ids=["lora", "dora"])
def test_packing_and_cutting_do_not_change_gradients(world, trees, more):
    test_dropout.test_packing_and_cutting_do_not_change_gradients(world, trees, more)


def test_vectors_are_scaled_in_float32():
    """To bfloat16's nearest numbers, and a zero stays one."""
    x = torch.randn(4, 3, 128, generator=torch.manual_seed(0)).bfloat16()
    x[0, 0] = 0
    exact = torch.nn.functional.normalize(x.double(), dim=-1).bfloat16()
    torch.testing.assert_close(delta.unit_vectors(x), exact, rtol=2**-8, atol=0)
    assert (delta.unit_vectors(x) == exact).float().mean() > 0.99


def test_projections_of_the_same_input_are_dropped_alike(world):
    layer = tiny.lora_model(world, dropout=0.1, targets=ALL).base.model.language_model.layers[0].linear_attn
    names = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    qkv, z, a, b, out = (getattr(layer, name).lora_dropout["default"] for name in names)
    assert qkv is z is a is b and qkv is not out


# -------------------------------------------------------------------------------------------------------------- mutants


def never_forked(paths, tree):
    paths |= {"root_starts": paths["starts_on_cpu"], "branch_starts": np.zeros(1, int), "root_of": np.zeros(1, int)}
    roots, branches = paths["starts_on_cpu"]
    starts = [*roots, *(roots[-1] + start for start in branches[1:])]
    return paths | {"root_starts": np.array(starts), "starts_on_cpu": (starts, [0])}


def convolved_with_the_tokens_beside_it(paths, tree):
    beside = np.stack([np.arange(len(tree)) - lag for lag in (1, 2, 3)])
    return paths | {"before": np.where((beside >= 0) & (tree[beside] == tree), beside, -1)}


def with_the_state_of_another_tree(paths, tree):
    return paths | {"root_of": (paths["root_of"] + 1) % (len(paths["root_starts"]) - 1)}


def with_padding_in_the_first_state(paths, tree):
    padding, (roots, branches) = np.flatnonzero(tree < 0), paths["starts_on_cpu"]
    starts = [0] + [start + len(padding) for start in roots[1:]]
    order = np.insert(paths["order"], roots[1], padding)
    return paths | {"order": order, "root_starts": np.array(starts), "starts_on_cpu": (starts, branches)}


@pytest.mark.parametrize("mutant", [never_forked, convolved_with_the_tokens_beside_it, with_the_state_of_another_tree])
def test_wrong_paths_are_noticed(world, reference, trees, monkeypatch, mutant):
    monkeypatch.setattr(data_file, "token_paths", lambda tree, branch: mutant(token_paths(tree, branch), tree))
    _, gradients = run_step(world, [trees])
    assert tiny.relative_error(gradients, reference[1]) > 0.05


def test_padding_in_a_state_is_noticed(world, trees, monkeypatch):
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world)
    padded = build_batch(data, Assignment(tuple(trees)), dataset.settings, 128)
    right, _ = model(padded)
    wrong = with_padding_in_the_first_state(
        token_paths(padded.tree.numpy(), padded.branch.numpy()), padded.tree.numpy()
    )
    padded.paths |= {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in wrong.items()}
    assert (padded.tree < 0).any() and (model(padded)[0] - right).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------------------- paths


def test_paths_go_from_the_trunk_into_each_branch():
    """Two trees: a trunk of 2 with branches of 3 and 1 tokens, and one without a trunk; 2 tokens of padding."""
    tree, branch = np.array([0, 0, 0, 0, 0, 0, 1, 1, -1, -1]), np.array([0, 0, 1, 1, 1, 2, 1, 1, 0, 0])
    paths = token_paths(tree, branch)
    assert paths["before"][:, :8].tolist() == [
        [-1, 0, 1, 2, 3, 1, -1, 6],
        [-1, -1, 0, 1, 2, 0, -1, -1],
        [-1, -1, -1, 0, 1, -1, -1, -1],
    ]
    assert paths["order"].tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert paths["root_starts"].tolist() == [0, 2, 4] and paths["branch_starts"].tolist() == [0, 3, 4]
    assert paths["root_of"].tolist() == [0, 0, 0] and paths["starts_on_cpu"] == ([0, 2, 4], [0, 3, 4])


def test_trees_of_all_shapes_do_not_recompile(world, trees):
    """After the first step, which compiles the layers of both kinds."""
    dataset, model = tiny.load_world(world)[1], tiny.lora_model(world)
    compile_layers(model.model, 1.0, backend="eager")
    graphs = []
    for step in range(4):
        losses, _ = model(dataset[Assignment((trees[step % len(trees)], trees[(step * 3 + 1) % len(trees)]))])
        losses.sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[1] == graphs[-1] > 0, graphs


# -------------------------------------------------------------------------------------------------------------- kernels


VERSIONS = {"fla-core": (0, 6, 0), "triton": (3, 7, 1)}


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "versions", "told"),
    [
        ("cpu", torch.float32, 9, VERSIONS, "fast kernels need a GPU and bfloat16"),
        ("cuda", torch.float32, 9, VERSIONS, "fast kernels need a GPU and bfloat16"),
        ("cuda", torch.bfloat16, 9, {"triton": (3, 7, 1)}, "pip install flash-linear-attention"),
        ("cuda", torch.bfloat16, 9, VERSIONS, ""),
        ("cuda", torch.bfloat16, 8, VERSIONS | {"triton": (3, 6, 0)}, ""),
        ("cuda", torch.bfloat16, 9, VERSIONS | {"triton": (3, 6, 0), "tilelang": (1,), "nvcc": (13,)}, ""),
        ("cuda", torch.bfloat16, 9, VERSIONS | {"triton": (3, 6, 0), "tilelang": (1,)}, "pip install 'tilelang[nvcc]'"),
        ("cuda", torch.bfloat16, 9, VERSIONS | {"triton": (3, 6, 0)}, "Triton 3.6.0 gives wrong gradients"),
        ("cuda", torch.bfloat16, 9, VERSIONS | {"fla-core": (0, 5, 2)}, "is older than 0.6: pip install -U flash-"),
        ("cuda", torch.bfloat16, 9, VERSIONS | {"flash_qla": (0, 1, 3)}, "nvcc, which is not here"),
        ("cuda", torch.bfloat16, 9, VERSIONS | {"flash_qla": (0, 1, 3), "nvcc": (13,)}, ""),
        ("cuda", torch.bfloat16, 8, VERSIONS | {"flash_qla": (0, 1, 3)}, ""),
    ],
)
def test_a_start_says_which_code_runs_and_refuses_wrong_gradients(
    monkeypatch, device, dtype, capability, versions, told
):
    pretend(monkeypatch, capability, versions)
    try:
        said = delta.check_kernels("qwen3_5", torch.device(device), dtype)
    except InputError as error:
        said = str(error)
        assert any(reason in said for reason in ("wrong gradients", "older", "not here"))
    assert told in said and bool(told) == bool(said)
    assert all(len(line) <= 100 for line in f"warning: {said}".splitlines())
    assert not delta.check_kernels("qwen3_vl", torch.device(device), dtype)


def pretend(monkeypatch, capability: int, versions: dict) -> None:
    """That these versions are installed, with a GPU of this capability."""
    installed = {"fla" if name == "fla-core" else name for name in versions}
    monkeypatch.setattr(delta, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(delta, "_release", lambda name: versions.get(name, ()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    parts = {
        "common.backends": {
            "CommonTileLangBackend": SimpleNamespace(can_use=lambda: {"tilelang", "nvcc"} <= installed)
        },
        "gated_delta_rule.backends": {"FlashQLABackend": SimpleNamespace(can_use=lambda: "flash_qla" in installed)},
    }
    modules = {"fla.utils": {"has_usable_nvcc": lambda: "nvcc" in installed}}
    modules |= {f"fla.ops.{name}": content for name, content in parts.items()}
    for name in ("fla", "fla.ops", "fla.ops.common", "fla.ops.gated_delta_rule", *modules):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(modules.get(name, {}))


def test_the_versions_of_installed_kernels_are_recorded(monkeypatch):
    installed = {"fla-core": "0.6.0", "triton": "3.6.0"}

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(delta, "version", version)
    assert delta.kernel_versions() == installed and delta._release("triton") == (3, 6, 0)
    assert runpy.run_path(checkpoints.__file__)["VERSIONS"].items() > installed.items()


def test_an_evaluation_refuses_kernels_that_can_t_run_before_it_loads_weights(world, monkeypatch):
    """It has no gradients, so the wrong ones of Triton 3.6 do not matter."""

    def loads(*_):
        raise NotImplementedError

    monkeypatch.setattr(evaluation, "load_base", loads)
    arguments = str(world / "model"), None, None, torch.bfloat16, torch.device("cuda")
    pretend(monkeypatch, 9, {"fla-core": (0, 5, 2), "triton": (3, 6, 0)})
    with pytest.raises(InputError, match="^flash-linear-attention is older than 0.6: pip install -U flash-"):
        evaluation.load_model(*arguments)
    pretend(monkeypatch, 9, VERSIONS | {"flash_qla": (0, 1, 3)})
    with pytest.raises(InputError, match="^flash-qla compiles its kernels with nvcc, which is not here:\n  pip"):
        evaluation.load_model(*arguments)
    pretend(monkeypatch, 9, {"fla-core": (0, 6, 0), "triton": (3, 6, 0)})
    with pytest.raises(NotImplementedError):
        evaluation.load_model(*arguments)


def test_a_run_says_that_it_is_slow_and_records_what_lora_is_on(world, tmp_path, capsys):
    words = arguments(world, tmp_path / "out", max_steps=1, save_every=0, eval_every=0)
    assert train.main(words) == 0
    assert "warning: linear attention runs slowly, by transformers' reference code\n  fast" in capsys.readouterr().out
    assert parse_settings(["--config", str(tmp_path / "out" / "settings.toml")]).lora_targets == HYBRID_TARGETS
    with pytest.raises(InputError, match="^--base-precision fp8-weights: Qwen3.5 runs in bf16 only$"):
        train.main([*words, "--base-precision=fp8-weights", "--output", str(tmp_path / "other")])
    with pytest.raises(InputError, match="^--base-precision fp8-weights: Qwen3.5 runs in bf16 only$"):
        evaluation.main(["--ckpt", str(tmp_path / "out"), "--base-precision=fp8-weights", "--workers=0"])
