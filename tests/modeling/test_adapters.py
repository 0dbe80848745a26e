"""Adapters that PEFT, ms-swift or LLaMA-Factory wrote: they give the same losses here, or are refused by name."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from steps import whole
from transformers import AutoModelForImageTextToText

from common import InputError
from model import TreeModel, load_base
from modeling.adapters import base_name, read_layers, read_settings
from modeling.loading import weights_hashes
from modeling.lora import load_adapter, merge_lora
from trees import Assignment

CPU = torch.device("cpu")
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SWIFT = r"^(model\.language_model(?=\.).*\.(down_proj|q_proj|v_proj)|model\.visual\.merger(?=\.).*\.linear_fc\d)$"
MADE = {
    "ms-swift": {"target_modules": SWIFT, "lora_dropout": 0.05, "lora_alpha": 32, "use_rslora": True},
    "LLaMA-Factory with the vision tower": {"target_modules": [*NAMES, "qkv", "attn.proj", "linear_fc1"]},
    "layers of their own rank and scale": {
        "target_modules": NAMES, "rank_pattern": {"q_proj": 2, "model.language_model.layers.1.mlp.up_proj": 16},
        "alpha_pattern": {r"layers\.[02]\..*\.v_proj": 64}, "layers_to_transform": [0, 1],
    },
    "DoRA and lm_head": {"target_modules": ["q_proj", "up_proj", "lm_head"], "use_dora": True},
}  # fmt: skip
NAMED = {
    "transformers 4.51": [("model.model.language_model.", "model.model."), ("model.model.visual", "model.visual")],
    "transformers 4.52": [("model.model.language_model.", "model.language_model.model.")],
    "the adapter's name": [(".weight", ".default.weight")],
    "no prefix": [("base_model.model.", "")],
}


def make(world, folder, **config):
    """An adapter by PEFT alone, saved to `folder`. Returns the model with it."""
    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(world / "model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, **{"lora_alpha": 8} | config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def renamed(weights: dict, pairs: list) -> dict:
    for old, new in pairs:
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    return weights


def losses(world, folder) -> list[torch.Tensor]:
    """Losses of answer tokens of four rows by this program: with LoRA beside the weights, and added to them."""
    data, dataset = tiny.load_world(world)
    model = TreeModel(load_adapter(load_base(world / "model", torch.float32, CPU), folder), dataset.settings).eval()
    trees = [tree for tree in whole(data.samples) if tree.samples in ((26, 27, 28), (29,))]
    with torch.no_grad():
        beside, _ = model(dataset[Assignment(tuple(trees))])
        merge_lora(model.model)
        added, _ = model(dataset[Assignment(tuple(trees))])
    return [beside, added]


@pytest.fixture(scope="module")
def inputs(world, tmp_path_factory):
    """The same rows, for transformers alone."""
    reference = tiny.Reference(world, tiny.lora_model(world), tmp_path_factory.mktemp("any"))
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    return [reference.inputs(row) for row in rows[26:30]]


@torch.no_grad()
def plain_losses(model, inputs: list[dict]) -> torch.Tensor:
    found = []
    for fields in inputs:
        logits = model(**{name: value for name, value in fields.items() if name != "labels"}).logits[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits, fields["labels"][0, 1:], reduction="none"))
    found = torch.cat(found)
    return found[found != 0]  # 0 are those of tokens that are not trained


@pytest.mark.parametrize("kind", MADE)
def test_an_adapter_made_elsewhere_gives_the_losses_that_peft_gives(world, inputs, tmp_path, kind):
    expected = plain_losses(make(world, tmp_path / "made", **MADE[kind]), inputs)
    for found in losses(world, tmp_path / "made"):
        torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-4, atol=1e-4)


def test_weights_find_their_layers_whatever_version_named_them(world, tmp_path):
    make(world, tmp_path, target_modules=[*NAMES, "qkv"], alpha_pattern={"layers.1.self_attn.q_proj": 99})
    (expected, _), layers = losses(world, tmp_path), read_layers(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for pairs in NAMED.values():
        other = renamed(weights, pairs)
        save_file(other, tmp_path / "adapter_model.safetensors")
        assert read_layers(tmp_path).keys() == layers.keys() and other.keys() != weights.keys()
    save_file(renamed(weights, NAMED["transformers 4.51"]), tmp_path / "adapter_model.safetensors")
    assert torch.equal(losses(world, tmp_path)[0], expected)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make(world, folder, target_modules=["q_proj", "v_proj"])
    return folder


REFUSED = {
    "modules_to_save ['lm_head'], which is not supported: merge it with the program": {"modules_to_save": ["lm_head"]},
    "lora_bias True, which is not": {"lora_bias": True},
    "bias 'all', which is not": {"bias": "all"},
    "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "target_parameters": {"target_parameters": ["mlp.experts.down_proj"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "a_later_setting 'x'": {"a_later_setting": "x"},
    "an adapter of the kind 'LOHA', not LORA": {"peft_type": "LOHA"},
    "init_lora_weights 'pissa', which changes the base": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_adapter_that_can_t_be_run_is_refused_by_name_before_the_model_is_read(made, tmp_path, message):
    folder = shutil.copytree(made, tmp_path / "made")
    settings = json.loads((folder / "adapter_config.json").read_text()) | REFUSED[message]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as error:
        read_settings(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


HEAD, PLACE = "base_model.model.", "layers.0.self_attn.q_proj"
ADDED = {  # names and shapes, or a layer that gets the weights of PLACE
    "embed_tokens.lora_embedding_A: not LoRA of a linear": {f"{HEAD}model.embed_tokens.lora_embedding_A": (4, 9)},
    "model.lm_head.weight and 1 more: not LoRA": {f"{HEAD}lm_head.weight": (4, 9), f"{HEAD}x.weight": (4, 9)},
    "layers.7.mlp.up_proj: one of lora_A and lora_B is missing": {"model.layers.7.mlp.up_proj.lora_A.weight": (4, 9)},
    "model.visual.patch_embed.proj.lora_A.weight and 1 more: not LoRA of a linear": {
        f"{HEAD}model.visual.patch_embed.proj.lora_{side}.weight": (4, 3, 2, 8, 8) for side in "AB"
    },
    "which has no linear layer model.language_model.layers.7.self_attn.q_proj": "layers.7.self_attn.q_proj",
    "which has no linear layer model.language_model.layers.1.mlp.fc1": "layers.1.mlp.fc1",
    "size mismatch for": "layers.0.mlp.down_proj",
}


@pytest.mark.parametrize("message", ADDED)
def test_a_weight_that_finds_no_place_is_an_error_and_never_left_out(world, made, tmp_path, message):
    folder = shutil.copytree(made, tmp_path / "made")
    weights, added = load_file(folder / "adapter_model.safetensors"), ADDED[message]
    if isinstance(added, str):
        added = {name.replace(PLACE, added): weight.clone() for name, weight in weights.items() if PLACE in name}
        assert len(added) == 2
    else:
        added = {name: torch.zeros(shape) for name, shape in added.items()}
    save_file(weights | added, folder / "adapter_model.safetensors")
    with pytest.raises(InputError) as error:
        load_adapter(load_base(world / "model", torch.float32, CPU), folder)
    assert message in str(error.value)


def test_what_is_no_adapter_s_folder_is_said_with_what_to_do(world, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "runs" / "checkpoint-9")
    said = {
        tmp_path / "no": "no adapter_config.json, there is no such folder",
        world / "model": "no adapter_config.json; a whole model is named by --model",
        tmp_path / "runs": "no adapter_config.json; checkpoint-9 in it does: name one",
    }
    for path, message in said.items():
        with pytest.raises(InputError, match=message):
            read_settings(path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin, a pickle, which could run code: .*save_pretrained"):
        read_settings(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="is damaged: adapter_model.safetensors"):
        load_adapter(load_base(world / "model", torch.float32, CPU), folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="is damaged: adapter_config.json"):
        read_settings(folder)


def test_lora_on_tied_embeddings_is_refused(tmp_path):
    world = tiny.write_world(tmp_path / "world", tiny.mixed_rows()[25:], "qwen2_vl")
    make(world, tmp_path / "made", target_modules=["lm_head"])
    with pytest.raises(InputError, match="LoRA on lm_head, whose weights are the embeddings too"):
        load_adapter(load_base(world / "model", torch.float32, CPU), tmp_path / "made")


def test_an_adapter_names_its_base_model_or_must_be_told(made, tmp_path, world):
    assert base_name(made) == str(world / "model")
    folder = shutil.copytree(made, tmp_path / "made")
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="does not name its base model: give it by --model"):
        base_name(folder)


def test_the_hash_of_weights_knows_other_weights_but_not_other_files(world, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(world / "model")
    expected = weights_hashes(world / "model")
    model.bfloat16().save_pretrained(tmp_path / "half", max_shard_size="1MB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1 and weights_hashes(tmp_path / "half") == expected
    (tmp_path / "old").mkdir()
    weights = load_file(world / "model" / "model.safetensors")
    old = renamed(weights, [("model.language_model.", "model."), ("model.visual.", "visual.")])
    del old["lm_head.weight"]
    save_file(old, tmp_path / "old" / "model.safetensors")
    assert weights_hashes(tmp_path / "old") == expected
    for name, others in [
        ("model.layers.1.self_attn.q_proj.weight", {"base weights outside layers"}),
        ("visual.merger.linear_fc2.bias", {"base weights in layers"}),
    ]:
        save_file(old | {name: old[name] + 0.02}, tmp_path / "old" / "model.safetensors")
        found = weights_hashes(tmp_path / "old")
        assert {kind for kind in expected if found[kind] == expected[kind]} == others
