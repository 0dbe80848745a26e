"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, each with random weights: the promises of test_model.py and test_eval.py,
and what differs between them."""

import json
import shutil
from collections import Counter
from itertools import chain

import pytest
import test_cuda
import test_eval
import tiny
import torch
from huggingface_hub import constants
from peft import PeftModel
from runs import arguments
from safetensors.torch import load_file, save_file
from steps import whole
from test_model import (  # noqa: F401 (these run here with each family)
    test_a_step_equals_its_samples_one_by_one_in_any_number_of_micro_batches,
    test_patch_projection_equals_the_conv3d,
    test_patches_equal_the_image_processor_s,
    test_rotary_positions_equal_the_installed_model_s,
    test_the_plan_s_own_packing_is_exact,
)
from transformers import AutoModelForImageTextToText

import eval as evaluation
import model as model_file
import train
from common import InputError
from data import build_batch
from evaluation.answers import generate
from evaluation.runner import plan_evaluation
from inputs.images import ImageSettings, image_settings
from model import load_base
from modeling import attention, loading
from modeling.loading import MODEL_TYPES, TIED, model_name, resolve_model
from modeling.lora import lora_table, save_adapter
from modeling.memory import compile_layers
from modeling.targets import DEFAULT_TARGETS
from trees import Assignment, grow_tree

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def world(family, tmp_path_factory):
    told = {"messages": [tiny.turn("system", "Answer briefly."), tiny.turn("user", "Is it sharp?", 1),
                         tiny.turn("assistant", "yes")], "images": ["a.png"]}  # fmt: skip
    return tiny.write_world(tmp_path_factory.mktemp(family), [*tiny.mixed_rows(), told], family)


@pytest.fixture(scope="module")
def batch(world):
    """All of a world's trees in one batch."""
    data, dataset = tiny.load_world(world)
    return dataset[Assignment(tuple(whole(data.samples)))]


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A Qwen2.5-VL, which attends in windows."""
    return tiny.write_world(tmp_path_factory.mktemp("windows"), family="qwen2_5_vl")


@torch.library.custom_op("onelook_tests::varlen", mutates_args=())
def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor, k_starts: torch.Tensor,
    q_longest: int, k_longest: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """What torch's varlen_attn promises, which has no CPU kernel. It may read no more of a part than `longest` says."""
    parts = [tensor.split(q_starts.diff().tolist()) for tensor in (q, k, v)]
    assert q_starts.dtype == torch.int32 and torch.equal(q_starts, k_starts) and q_starts[-1] == len(q)
    assert q_longest == k_longest == max(map(len, parts[0]))
    attend = torch.nn.functional.scaled_dot_product_attention
    outs = [attend(*(x.transpose(0, 1) for x in part), scale=scale).transpose(0, 1) for part in zip(*parts)]
    return torch.cat(outs)


@varlen.register_fake
def _(q, *_):
    return torch.empty_like(q)


def test_every_supported_family_is_tested():
    assert set(MODEL_TYPES) == set(tiny.FAMILIES)


def test_lora_is_on_every_language_layer_and_nowhere_else(world, family):
    counts = {name: count for name, (count, _) in lora_table(tiny.lora_model(world)).items()}
    of_a_kind = 3 * [DEFAULT_TARGETS.split(",")]
    if family == "qwen3_5":  # two of the three layers have linear attention
        linear, mlp = ["in_proj_qkv", "in_proj_z", "out_proj"], ["gate_proj", "up_proj", "down_proj"]
        of_a_kind = [linear + mlp, linear + mlp, DEFAULT_TARGETS.split(",")]
    assert counts == Counter(chain(*of_a_kind))


def test_answers_equal_plain_generation_one_by_one(world, tmp_path):
    test_eval.test_answers_equal_plain_generation_one_by_one(world, tmp_path, None)


def test_leaving_out_tokens_after_the_last_layer_changes_nothing(world, batch):
    """Losses and gradients with dropout and LoRA on the vision tower, an evaluation, and answers from a cache."""
    data, dataset = tiny.load_world(world)
    (trees,) = plan_evaluation(data.samples, 9999)
    prompts = build_batch(data, Assignment(trees), dataset.settings, prompts_only=True)
    results = []
    for late in (False, True):
        model = tiny.lora_model(world, 0.1, targets=DEFAULT_TARGETS + ",vision,merger")
        if late:
            model.leave_out_late()
        losses, _ = model(batch)
        losses.sum().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            evaluated, right = model.eval()(batch)
        tokens, probabilities = zip(*generate(model, prompts, 8, {1}))
        results.append((losses.detach(), evaluated, torch.tensor(probabilities), right, tokens, gradients))
    (*early, right, tokens, gradients), (*late, right_late, tokens_late, gradients_late) = results
    torch.testing.assert_close(late, early, rtol=1e-5, atol=1e-6)
    assert torch.equal(right, right_late) and tokens == tokens_late
    assert tiny.relative_error(gradients_late, gradients) < 1e-5


def test_windows_matter_and_blocks_of_whole_images_too(windows):
    """Features change when either kind of block attends like the other, so the tests above cover both."""
    data, dataset = tiny.load_world(windows)
    batch, model = dataset[Assignment(tuple(whole(data.samples)))], tiny.lora_model(windows)
    assert len(batch.vision["cu_window_seqlens"]) > len(batch.grid) + 10
    expected, visual = model.encode_images(batch).embeds, model.base.model.visual
    for blocks in ([], [0, 1, 2]):
        visual.fullatt_block_indexes = blocks
        assert tiny.relative_error({"": model.encode_images(batch).embeds}, {"": expected}) > 0.01


def test_vision_attention_in_one_call_equals_part_by_part(world, family, batch, monkeypatch):
    """Stand-ins check what each CUDA kernel is called with. cuDNN's takes whole images and is not used for windows."""
    model = tiny.lora_model(world)
    expected = model.encode_images(batch)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    for name in ["onelook_flash_vision"] + ["onelook_cudnn_flash_vision"] * (family != "qwen2_5_vl"):
        model.base.model.visual.config._attn_implementation = name
        features = model.encode_images(batch)
        torch.testing.assert_close(features.embeds, expected.embeds, rtol=1e-5, atol=5e-5)
        assert len(features.deepstack) == (2 if family == "qwen3_vl" else 0)


@pytest.mark.parametrize("capability", [8, 9])
def test_cudnn_attention_is_for_hopper_and_whole_images(world, family, monkeypatch, capability):
    model = AutoModelForImageTextToText.from_pretrained(world / "model", dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    monkeypatch.setattr(type(model.model.visual), "device", torch.device("cuda"))
    model_file.prepare_base(model)
    whole_images = capability == 9 and family != "qwen2_5_vl"
    name = "onelook_cudnn_flash_vision" if whole_images else "onelook_flash_vision"
    assert model.model.visual.config._attn_implementation == name


def test_windows_do_not_recompile(windows, monkeypatch):
    """Compiled layers of a Qwen2.5-VL with images and windows of all sizes: no new graph after the first few steps."""
    data, dataset = tiny.load_world(windows)
    model, trees = tiny.lora_model(windows), whole(data.samples)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    model.base.model.visual.config._attn_implementation = "onelook_flash_vision"
    compile_layers(model.model, 1.0, backend="eager")
    graphs = []
    for step in range(12):
        batch = dataset[Assignment((trees[step % len(trees)], trees[(step * 3 + 1) % len(trees)]))]
        losses, _ = model(batch)
        losses.sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[3] == graphs[-1] > 0, graphs


@pytest.mark.parametrize("targets", [DEFAULT_TARGETS, r"layers\.[02]\.self_attn\..*_proj,gate_proj,vision"])
def test_a_saved_adapter_lists_its_layers_for_peft_vllm_and_sglang(world, tmp_path, targets):
    """Ends of module names in a list. vLLM and SGLang read a layer's last name; Qwen2.5-VL's vision tower has layers of
    the same names as its language model, which PEFT must not take."""
    ours = tiny.lora_model(world, targets=targets).model
    save_adapter(ours, tmp_path)
    named = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    chosen = {name for name, module in ours.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert isinstance(named, list) and named == sorted(named)
    assert {end.rpartition(".")[2] for end in named} == {name.rpartition(".")[2] for name in chosen}
    if targets == DEFAULT_TARGETS:
        assert named == sorted(DEFAULT_TARGETS.split(","))
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(world / "model"), tmp_path)
    assert {n for n, module in plain.get_base_model().named_modules() if hasattr(module, "lora_A")} == chosen
    expected = {name: weight for name, weight in ours.state_dict().items() if "lora_" in name}
    found = plain.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_saved_adapter_is_plain_peft_with_the_same_logits(world, tmp_path):
    ours = tiny.lora_model(world).eval()
    save_adapter(ours.model, tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(world / "model", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    reference = tiny.Reference(world, ours, tmp_path / "reference")
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    data, dataset = tiny.load_world(world)
    for index in (0, 29, 30, 33):
        batch = dataset[Assignment((grow_tree(data.samples, [index]),))]
        token_losses, _ = ours(batch)
        expected = plain(**reference.inputs(rows[index])).loss
        torch.testing.assert_close(token_losses.mean(), expected, rtol=1e-5, atol=1e-6)
        with plain.disable_adapter():
            assert abs(plain(**reference.inputs(rows[index])).loss - token_losses.mean()) > 1e-3


def test_a_run_trains_saves_and_answers(world, tmp_path):
    """A run and its evaluation, which takes the image settings of the checkpoint."""
    assert train.main(arguments(world, tmp_path / "out", max_steps=2, save_every=0, eval_every=0)) == 0
    assert evaluation.main(["--ckpt", str(tmp_path / "out"), "--workers=0", "--max-new-tokens=2"]) == 0
    (predictions,) = tmp_path.glob("out/eval/checkpoint-000002/predictions.jsonl")
    assert len(predictions.read_text().splitlines()) == 34


def test_pixel_limits_are_read_as_the_hub_s_folders_spell_them(windows, tmp_path):
    (tmp_path / "config.json").write_bytes((windows / "model" / "config.json").read_bytes())
    facts = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    facts |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    limits = image_settings(str(tmp_path))
    assert limits == ImageSettings(14, 2, 2, 3136, 12845056, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 0, 56)
    assert limits.grid(280, 420) == (20, 30)


REFUSED = {
    "is of type qwen3_5_moe, a mixture of experts": {"model_type": "qwen3_5_moe"},
    "is of type qwen3_vl_moe, a mixture of experts": {"model_type": "qwen3_vl_moe"},
    "is of type llava": {"model_type": "llava"},
    "has quantized weights": {"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "awq"}},
    "attends within a sliding window": {"model_type": "qwen2_vl", "use_sliding_window": True},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_that_is_not_supported_is_refused_by_name(tmp_path, reason):
    (tmp_path / "config.json").write_text(json.dumps(REFUSED[reason]))
    with pytest.raises(InputError, match=f"{reason}\n  this program trains dense .*\n  Qwen2-VL .qwen2_vl., "):
        resolve_model(str(tmp_path))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no config.json"):
        resolve_model(str(tmp_path))


def test_a_hub_model_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    asked = []
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **only: asked.append(only) or str(tmp_path))
    with pytest.raises(InputError, match="model Qwen/Qwen3-VL-30B-A3B-Instruct is of type qwen3_vl_moe"):
        resolve_model("Qwen/Qwen3-VL-30B-A3B-Instruct")
    assert asked == [{"allow_patterns": "config.json"}]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
POINTERS = ["config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "has a damaged config.json\n  copy or"),
        ("tokenizer.json", None, "has no tokenizer.json or vocab.json\n  copy or download all"),
        ("preprocessor_config.json", None, "has no preprocessor_config.json or processor_config.json"),
        ("model.safetensors", None, "has no model.safetensors or model.safetensors.index.json"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model-2-of-2.safetensors"}}', "has no model-2-of-2"),
        ("model.safetensors", "short", "has a damaged model.safetensors\n  copy or download it again"),
        ("model.safetensors.index.json", "{", "has a damaged model.safetensors.index.json\n  copy or"),
        ("model.safetensors.index.json", "{}", "has a damaged model.safetensors.index.json\n  copy or"),
        ("tokenizer_config.json", "{'a': 1}", "has a damaged tokenizer_config.json\n  copy or"),
        ("adapter_config.json", "{}", "also holds an adapter, .*, which would be added to its weights\n  move"),
        *((name, LFS, f"has a Git LFS pointer in place of {name}\n  run git lfs pull") for name in POINTERS),
    ],
)
def test_a_model_folder_that_is_not_whole_is_one_clear_error(world, tmp_path, name, text, message):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    (folder / name).write_text(text) if text else (folder / name).unlink()
    with pytest.raises(InputError, match=message) as refusal:
        resolve_model(str(folder))
    assert max(map(len, str(refusal.value).replace(str(folder), "").splitlines())) <= 100


def test_weights_that_are_cut_off_are_noticed_before_rows_are_read_and_a_plan_needs_none(world, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(world / "model")
    folder = shutil.copytree(world / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder, max_shard_size="1MB")
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "rows.json").write_text('{"image": "a.png"}\n{"image": "b.png"}\n')  # no file of the model
    (folder / "video_preprocessor_config.json").symlink_to("gone")
    resolve_model(str(folder), weights=False)
    with pytest.raises(InputError, match=f"damaged {path.name}"):
        resolve_model(str(folder))


def test_a_base_model_never_goes_on_with_random_weights(world, tmp_path):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "layers.1.mlp.up_proj" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 are missing, the first is model\..*layers.1.mlp.up_proj.weight\n  copy"):
        resolve_model(str(folder))
    with pytest.raises(InputError, match="one of 1 missing: copy"):
        load_base(folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("part", "settings", "problem"),
    [
        ("text_config", {"num_hidden_layers": 1}, "layers.1.* belongs to a layer that"),
        ("vision_config", {"depth": 1, "deepstack_visual_indexes": [0]}, "blocks.1.* belongs to a layer that"),
        ("text_config", {"intermediate_size": 96}, r"mlp.* is \[\d+, \d+\], not \[.*96.*\]"),
        ("text_config", {"vocab_size": 9999}, r"embed_tokens.weight is \[\d+, \d+\], not \[9999, "),
    ],
)
def test_weights_of_another_model_than_the_configuration_s_are_refused(world, tmp_path, part, settings, problem):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    kinds = config["text_config"].get("layer_types", ["full_attention"] * 3)
    config["text_config"]["layer_types"] = kinds[: settings.get("num_hidden_layers")]
    config[part] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"do not fit its config.json\n  model\..*{problem}"):
        resolve_model(str(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_s_weight_may_be_left_out_where_it_is_the_embeddings(world, tmp_path, tied):
    """Or the embeddings', as safetensors' save_model does it."""
    folder = shutil.copytree(world / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    config["text_config"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    embeddings = next(weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    others = {name: weight for name, weight in weights.items() if model_name(name) not in TIED}
    for left in (*TIED, None):
        save_file(others | ({left: embeddings} if left else {}), folder / "model.safetensors", {"format": "pt"})
        if tied and left:
            resolve_model(str(folder))
        else:
            with pytest.raises(InputError, match="1 are missing, the first is" if left else "2 are missing"):
                resolve_model(str(folder))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"hidden_act": "jump"}, "jump"),
        ({"num_attention_heads": 0}, "zero"),
    ],
)
def test_a_configuration_that_transformers_can_t_use_is_one_clear_error(world, tmp_path, settings, reason):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    for weights in (True, False):
        with pytest.raises(InputError, match=r"transformers can't use config.json of model .*\n  copy or") as refusal:
            resolve_model(str(folder), weights)
        lines = str(refusal.value).splitlines()
        assert reason in "".join(lines[2:]) and max(map(len, lines[2:])) <= 100


def test_a_cache_without_the_weights_is_one_clear_error_and_enough_for_a_plan(world, tmp_path, monkeypatch):
    """The cache of a model after --plan."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached, commit = tmp_path / "models--some--model", "0" * 40
    no_weights = shutil.ignore_patterns("*.safetensors")
    snapshot = shutil.copytree(world / "model", cached / "snapshots" / commit, ignore=no_weights)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert resolve_model("some/model", weights=False) == str(snapshot)
    with pytest.raises(InputError, match="has no model.safetensors or .*\n  on a .* internet: hf download some/model$"):
        resolve_model("some/model")


def test_a_model_that_the_hub_does_not_give_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="^model no/such can't be downloaded .*\n  on .*folder\n  ") as refusal:
        resolve_model("no/such")
    assert "HF_HUB_OFFLINE" in str(refusal.value) and max(map(len, str(refusal.value).splitlines())) <= 100


@needs_cuda
def test_a_float32_step_on_the_gpu_equals_samples_one_by_one(world, tmp_path):
    test_cuda.test_a_float32_step_on_the_gpu_equals_samples_one_by_one(world, tmp_path)


@needs_cuda
def test_vision_kernels_on_the_gpu_equal_transformers_sdpa(world, batch):
    device = torch.device("cuda")
    model = model_file.TreeModel(load_base(world / "model", torch.bfloat16, device), image_settings(world / "model"))
    visual, features = model.base.model.visual, []
    assert "flash" in visual.config._attn_implementation
    for name in (visual.config._attn_implementation, "sdpa"):
        visual.config._attn_implementation = name
        features.append({"": model.encode_images(batch.to(device)).embeds.float()})
    assert tiny.relative_error(*features) < 0.02
