"""--base-precision on whole models: whole trees give the same gradients in whatever company they run, forward passes
are those of bf16 where they should be, and memory for weights is what it says."""

import gc
import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from steps import run_step, whole
from test_bench import bench
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

import modeling.quantized
from common import InputError
from model import TreeModel, load_base
from modeling.linear import QuantizedLinear, quantize_layer, weight_bytes
from modeling.lora import add_lora
from modeling.precision import PRECISIONS, ROUNDED_GRADIENTS
from training.scaling import plan_settings
from trees import PlanSettings, StepSampler, cut_to_fit

CPU = torch.device("cpu")
QUANTIZED = [precision for precision in PRECISIONS if precision != "bf16"]


@pytest.fixture(scope="module")
def trees(world):
    return whole(tiny.load_world(world)[0].samples)


# --------------------------------------------------------------------------------------------------- the same gradients


@pytest.fixture
def in_float64(monkeypatch):
    """Run models of `tiny.lora_model` in float64, also what transformers and the product compute in float32."""
    lora_model, forward = tiny.lora_model, TreeModel.forward

    def forward_in_float64(self, batch):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return forward(self, batch)

    monkeypatch.setattr(tiny, "lora_model", lambda *args, **more: lora_model(*args, **more).double())
    monkeypatch.setattr(TreeModel, "forward", forward_in_float64)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_whole_trees_have_the_same_gradients_however_they_are_packed_and_shared(
    world, trees, in_float64, precision, monkeypatch
):
    """Over the shares of 1, 2 and 4 ranks, with room for all trees or for few. Emulated; with dropout."""
    for cost in ("IMAGE_COST", "MICRO_BATCH_COST"):  # such small trees would not be cut
        monkeypatch.setattr(f"trees.{cost}", 0.0)
    samples = tiny.load_world(world)[0].samples

    def micro_batches(ranks: int, max_tokens: int, whole_trees: bool = True) -> list[tuple]:
        settings = PlanSettings(len(samples), 0, seed=3, whole_trees=whole_trees)
        samplers = [StepSampler(samples, settings, max_tokens, rank, ranks) for rank in range(ranks)]
        return [assignment.trees for sampler in samplers for assignment in sampler if assignment.in_loss]

    cut, whole = (sum(map(len, micro_batches(16, 9999, whole_trees))) for whole_trees in (False, True))
    assert cut > whole == len(trees)
    results = []
    for ranks, max_tokens in ((1, 9999), (2, 250), (4, 9999)):
        batches = micro_batches(ranks, max_tokens)
        assert sum(map(len, batches)) == len(trees) and len(batches) >= ranks + (max_tokens == 250)
        results.append(run_step(world, batches, seed=3, dropout=0.1, precision=precision))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-9)
        assert tiny.relative_error(gradients, results[0][1]) < 1e-9


@pytest.mark.parametrize("precision", QUANTIZED)
def test_cutting_a_tree_changes_gradients_only_where_they_are_rounded(world, trees, in_float64, precision):
    """A prefix's gradient is a sum over branches. Rounded part by part it is off by about 2%, as by bfloat16."""
    parts = [part for tree in trees for part in cut_to_fit(tree, tree.tokens - sum(tree.branch_tokens) // 3)]
    loss, gradients = run_step(world, [trees], precision=precision)
    loss_of_parts, of_parts = run_step(world, [parts], precision=precision)
    apart = tiny.relative_error(of_parts, gradients)
    print(f"{precision}: cut trees change the worst gradient by {apart:.2%}")
    assert loss_of_parts == pytest.approx(loss, rel=1e-12)
    assert 1e-3 < apart < 0.05 if precision in ROUNDED_GRADIENTS else apart < 1e-9


def test_fp8_backward_has_the_losses_of_bf16_bit_for_bit(world, trees):
    (loss, exact), (same_loss, rounded) = (
        run_step(world, [trees], precision=precision) for precision in ("bf16", "fp8-backward")
    )
    assert same_loss == loss and 1e-3 < tiny.relative_error(rounded, exact) < 0.1
    assert run_step(world, [trees], precision="fp8")[0] != loss


def test_runs_with_rounded_gradients_plan_whole_trees():
    args = SimpleNamespace(batch_size=8, questions_per_image=0, seed=0, train_weights=[])
    whole_trees = {p: plan_settings(SimpleNamespace(**vars(args), base_precision=p)).whole_trees for p in PRECISIONS}
    assert whole_trees == {"bf16": False, "fp8-backward": True, "fp8": True, "fp8-weights": False}


# -------------------------------------------------------------------------------------------------------- compiled code


def mlp_of_tiny(folder: Path, precision: str) -> torch.nn.Module:
    """The MLP of a decoder layer with LoRA, neither half of which is zero."""
    preset, args = bench.PRESETS["tiny"], SimpleNamespace(compile=False)
    model = bench.tree_model(preset, CPU, torch.float32, folder, args, precision).eval()
    mlp = model.base.model.language_model.layers[0].mlp
    for name, parameter in mlp.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    return mlp


def gradients_of(mlp, run) -> dict[str, torch.Tensor]:
    """Gradients of x and of LoRA's matrices."""
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mlp.zero_grad()
    (run(x) * torch.linspace(-1, 1, 64)).sum().backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in mlp.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("precision", "forward", "backward"), [("fp8", 2, 3), ("fp8-backward", 0, 3)])
def test_compiled_layers_quantize_an_input_once_for_all_that_get_it(tmp_path, precision, forward, backward):
    """gate and up share one pass (so do q, k and v), and down has its own. Each gradient is another."""
    passes = []

    def count(gm, _inputs):
        passes.append(Counter(str(node.target) for node in gm.graph.nodes)["aten.amax.default"])
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    mlp = mlp_of_tiny(tmp_path, precision)
    compiled = gradients_of(mlp, torch.compile(mlp, dynamic=True, backend=backend, fullgraph=True))
    assert passes == [forward, backward]
    assert tiny.relative_error(compiled, gradients_of(mlp, mlp)) < 1e-5


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp8-backward", "fp8-weights"])
def test_weights_are_not_kept_in_another_type_for_the_backward_pass(tmp_path, precision, is_compiled):
    mlp = mlp_of_tiny(tmp_path, precision)
    layers = [module for module in mlp.modules() if isinstance(module, QuantizedLinear)]
    weights, saved = {layer.weight.data_ptr() for layer in layers}, []

    def keep(tensor):
        if sorted(tensor.shape) == [64, 128]:
            saved.append(tensor.data_ptr() in weights)
        return tensor

    run = torch.compile(mlp, dynamic=True, backend="aot_eager_decomp_partition") if is_compiled else mlp
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gradients_of(mlp, run)
    assert saved == [True] * 3


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "qwen3_5"])  # which is refused
def test_a_model_is_quantized_as_it_is_loaded_one_layer_at_a_time(tmp_path, family, monkeypatch, caplog):
    """It has all that the same model has that was loaded whole and quantized then, and logs nothing."""
    folder = tiny.write_world(tmp_path / "world", tiny.mixed_rows()[14:], family) / "model"
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.05}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    expected = load_base(folder, torch.float32, CPU)
    for layer in expected.model.language_model.layers:
        quantize_layer(layer, "fp8")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    text, alive = expected.config.text_config, []
    shapes = {(text.intermediate_size, text.hidden_size), (text.hidden_size, text.intermediate_size)}

    def count() -> int:
        """Float tensors of the sizes of gate, up and down."""
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device == CPU]
        return sum(t.is_floating_point() and tuple(t.shape) in shapes for t in tensors)

    def quantize(layer, precision):
        alive.append(count())
        quantize_layer(layer, precision)

    monkeypatch.setattr(modeling.quantized, "quantize_layer", quantize)
    loaded = load_base(folder, torch.float32, CPU, "fp8")
    assert alive == [count() + 3] * 3  # those of the layer at hand and no others
    assert not caplog.messages
    assert (
        type(loaded) is type(expected) and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    )
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (loaded, expected))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert str(loaded.config) == str(expected.config) and loaded.generation_config == expected.generation_config
    layers = [name for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 3 * len(names) and {name.rpartition(".")[2] for name in layers} == set(names)
    tied = loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert tied == (family == "qwen2_vl")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_of_weights_are_those_of_the_loaded_model(world, precision):
    loaded = load_base(world / "model", torch.bfloat16, CPU, precision)
    tensors = {id(t): t for t in [*loaded.parameters(), *loaded.buffers()]}
    with torch.device("meta"):
        empty = add_lora(type(loaded)(loaded.config), "", 4, 8, 0.0).get_base_model()
    tables = sum(t.nbytes for name, t in loaded.named_buffers() if "inv_freq" in name)
    assert sum(t.nbytes for t in tensors.values()) - tables == weight_bytes(empty, precision)


def test_lost_weights_are_an_error_that_names_them(world, tmp_path):
    for path in (world / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name, path = "model.language_model.layers.1.mlp.up_proj.weight", tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match=f"no weights {name}"):
        load_base(tmp_path, torch.float32, CPU, "fp8-weights")
