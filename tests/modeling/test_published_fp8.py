"""Models that were published in FP8, in blocks with a scale each: read as the numbers that these stand for."""

import json
import re
import shutil
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import merge
import train
from common import InputError
from model import load_base
from modeling.fp8 import E4M3
from modeling.linear import QuantizedLinear, quantize_layer
from modeling.loading import resolve_model
from modeling.precision import PRECISIONS

CPU, BLOCK = torch.device("cpu"), (48, 80)  # neither divides a width: blocks at the ends are cut off
LAYERS = re.compile(r"model\.language_model\.layers\.\d+\..*_proj\.weight")
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
CONFIG |= {"modules_to_not_convert": ["lm_head", "model.visual"]}


def blocks_of(weight: torch.Tensor):
    """Each block's place in the table of scales, with a view of the block."""
    for row in range(0, weight.shape[0], BLOCK[0]):
        for column in range(0, weight.shape[1], BLOCK[1]):
            place = row // BLOCK[0], column // BLOCK[1]
            yield place, weight[row : row + BLOCK[0], column : column + BLOCK[1]]


def publish(model: Path, out: Path, names: re.Pattern = LAYERS) -> dict[str, torch.Tensor]:
    """Write a model's folder with the weights of these names in FP8. Returns the numbers that these stand for, in
    float64."""
    shutil.copytree(model, out)
    weights, numbers = load_file(model / "model.safetensors"), {}
    for name in filter(names.fullmatch, list(weights)):
        weight = weights[name].double()
        *_, (last, _) = blocks_of(weight)
        scales = torch.zeros(last[0] + 1, last[1] + 1, dtype=torch.bfloat16)
        for place, block in blocks_of(weight):
            scales[place] = block.abs().max() / 400  # rounded to bfloat16, the largest one still fits
            block.copy_((block / scales[place].double()).to(E4M3))
        weights[name], weights[f"{name}_scale_inv"] = weight.to(E4M3), scales
        for place, block in blocks_of(weight):
            block.mul_(scales[place].double())
        numbers[name] = weight
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return numbers


@pytest.fixture(scope="module")
def published(world, tmp_path_factory):
    """The folder of such a model, and its numbers."""
    folder = tmp_path_factory.mktemp("published") / "tiny-FP8"
    return folder, publish(world / "model", folder)


def test_weights_become_the_numbers_that_their_codes_and_scales_stand_for(world, published):
    folder, numbers = published
    loaded, original = (
        load_base(resolve_model(str(folder)), torch.float32, CPU),
        load_base(world / "model", torch.float32, CPU),
    )
    assert len(numbers) == 3 * 7 and not hasattr(loaded.config, "quantization_config")
    assert type(loaded) is type(original) and loaded.state_dict().keys() == original.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        expected = numbers.get(name, original.state_dict()[name].double())
        assert torch.equal(weight, expected.float()), name  # the product of two short numbers, rounded once
        if name in numbers:
            error = (weight - original.state_dict()[name]).norm() / original.state_dict()[name].norm()
            assert 0.005 < error < 0.04, name


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_they_can_have_every_base_precision(published, precision):
    """It rounds the numbers once more, per channel."""
    loaded, whole = (load_base(published[0], torch.bfloat16, CPU, kind) for kind in (precision, "bf16"))
    for ours, theirs in zip(loaded.model.language_model.layers, whole.model.language_model.layers):
        quantize_layer(theirs, precision)
        layers = [name for name, module in ours.named_modules() if isinstance(module, QuantizedLinear)]
        assert len(layers) == 7
        tensors, expected = ({**dict(x.named_parameters()), **dict(x.named_buffers())} for x in (ours, theirs))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quant_method": "awq"}, "has quantized weights\n  this program trains dense"),
        ({"weight_block_size": None}, "has quantized weights\n"),
        ({"fmt": "e5m2"}, "has quantized weights\n"),
        ({"scale_fmt": "ue8m0"}, "has quantized weights\n"),
    ],
)
def test_other_quantized_models_are_refused(published, tmp_path, changed, message):
    shutil.copytree(published[0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] |= changed
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        resolve_model(str(tmp_path / "model"))


def test_codes_elsewhere_or_without_their_scales_are_never_taken_for_numbers(world, published, tmp_path):
    publish(world / "model", tmp_path / "vision", re.compile(r"model\.visual\.blocks\.0\.mlp\..*weight"))
    with pytest.raises(InputError, match="has FP8 outside .* layers, which .* not supported:\n  model.visual.blocks.0"):
        load_base(tmp_path / "vision", torch.float32, CPU)
    shutil.copytree(published[0], tmp_path / "lost")
    weights = load_file(published[0] / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight_scale_inv"
    save_file(
        {n: w for n, w in weights.items() if n != name}, tmp_path / "lost" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=f"has no weights {name}: copy or"):
        load_base(tmp_path / "lost", torch.float32, CPU)


def test_an_adapter_trained_on_one_is_merged_into_the_model_that_it_was_made_from(world, published, tmp_path):
    settings = {"model": str(published[0]), "max_steps": 2, "epochs": 9, "lr": 0.005}
    assert train.main(runs.arguments(world, tmp_path / "run", **settings)) == 0
    words = [f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}"]
    with pytest.raises(InputError, match="tiny-FP8 was published in FP8, .*\n.*made from by --model, or serve"):
        merge.main(words)
    assert merge.main([*words, f"--model={world / 'model'}"]) == 0
