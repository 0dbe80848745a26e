"""Merged weights, tensor names that vLLM reads, and the model card."""

import json
import re
import shutil
import stat

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from runs import arguments
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sweep_full_disk import disk_of
from transformers import AutoModelForImageTextToText, AutoTokenizer

import eval as evaluation
import merge
import train
from common import InputError
from evaluation.comparison import read_predictions
from inputs.images import image_settings
from modeling.lora import save_adapter
from modeling.merging import copy_files, set_end_tokens, set_pixel_limits
from training.model_card import model_card


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert train.main(arguments(world, output, max_steps=20, epochs=9, lr=0.005, eval_every=10, save_every=0)) == 0
    return output


def test_merged_weights_answer_like_the_adapter_in_plain_transformers(world, run, tmp_path, capsys):
    assert merge.main([f"--ckpt={run}", f"--out={tmp_path / 'merged'}"]) == 0
    assert "logits of merged weights" in capsys.readouterr().out
    base = AutoModelForImageTextToText.from_pretrained(world / "model")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {
        path.name for path in (world / "model").iterdir()
    }
    data, _ = tiny.load_world(world)
    reference = tiny.Reference(world, tiny.lora_model(world), tmp_path / "any")
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    for row in (rows[0], rows[20], rows[29], rows[32]):
        inputs = reference.inputs(row)
        with torch.no_grad():
            before = base(**inputs).logits
            tuned = PeftModel.from_pretrained(base, run / "checkpoint-000020")
            with_adapter, after = tuned(**inputs).logits, merged(**inputs).logits
            base = tuned.unload()
        torch.testing.assert_close(after, with_adapter, rtol=1e-4, atol=1e-4)
        assert (before - after).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------- the folder's files

HUB = {  # as the hub's folders spell them, which the installed transformers would not write
    "config.json": """{"architectures": ["Any"],  "torch_dtype": "bfloat16",
 "text_config": {"dtype" : "torch.bfloat16", "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}},
   "bnb_4bit_compute_dtype": "bfloat16", "é": null}""",
    "chat_template.json": '{"chat_template":  "{{ x }}"}',
    "vocab.json": "{}\r\n",
    "video_preprocessor_config.json": '{"max_pixels": 7, "size": {"longest_edge": 7}}',
    "LICENSE": "Apache",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "README.md": "---\nlicense: other\nlicense_name: research\nlanguage: en\n---\n# The base model",
}
LEFT_OUT = ["model.safetensors", "model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin",
            "pytorch_model.bin.index.json", "optimizer.pt", "model.gguf", ".gitattributes",
            ".cache/huggingface/a"]  # fmt: skip


def write_files(folder, files: dict) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")


def in_a_cache(folder, links) -> None:
    """The folder as the hub's cache has it: links to files that only their owner may read."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        link = links / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o400)
        link.symlink_to(path)


@pytest.mark.parametrize("to_float32", [False, True])
def test_all_but_weights_is_copied_byte_for_byte_apart_from_named_types(tmp_path, to_float32):
    write_files(tmp_path / "blobs", HUB | dict.fromkeys(LEFT_OUT, "old"))
    in_a_cache(tmp_path / "blobs", tmp_path / "model")
    copy_files(tmp_path / "model", tmp_path / "out", to_float32)
    found = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found.keys() == HUB.keys() - {"README.md"} and not any(path.is_symlink() for path in found.values())
    assert {stat.S_IMODE(path.stat().st_mode) for path in found.values()} == {0o644}
    expected = HUB["config.json"]
    if to_float32:
        expected = expected.replace('"torch_dtype": "bfloat16"', '"torch_dtype": "float32"')
        expected = expected.replace('"dtype" : "torch.bfloat16"', '"dtype" : "float32"')
    assert found["config.json"].read_bytes() == expected.encode()
    assert all(path.read_bytes() == HUB[name].encode() for name, path in found.items() if name != "config.json")


def test_weights_keep_names_files_and_types_of_the_base_model(tmp_path, capsys):
    """A base as on the hub: names of an older transformers, two files that are links to a cache, two types."""
    world, folder = tiny.write_world(tmp_path / "world", tiny.mixed_rows()[25:], "qwen2_5_vl"), tmp_path / "blobs"
    save_adapter(tiny.lora_model(world, targets="q_proj,up_proj,vision").model, tmp_path / "adapter")
    shutil.copytree(world / "model", folder)
    weights = load_file(folder / "model.safetensors")
    wide = "model.layers.1.mlp.up_proj.weight"  # stays float32
    base = {n: w if n == wide or w.dim() < 2 else w.bfloat16() for n, w in weights.items()}
    files = {name: f"model-{1 + ('layers.2' in name)}-of-2.safetensors" for name in base}
    (folder / "model.safetensors").unlink()
    for file in set(files.values()):
        metadata = {"format": "pt", "made": "by hand"}
        save_file({n: w for n, w in base.items() if files[n] == file}, folder / file, metadata)
    index = {"metadata": {"total_size": sum(w.nbytes for w in base.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    in_a_cache(folder, tmp_path / "model")
    words = [f"--adapter={tmp_path / 'adapter'}", f"--model={tmp_path / 'model'}", f"--rows={world / 'rows.jsonl'}"]
    words.append(f"--images={world / 'images'}")
    assert merge.main([*words, f"--out={tmp_path / 'merged'}"]) == 0
    pairs = lora_pairs(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    deltas = {f"{old_name(layer)}.weight": 2 * (b @ a) for layer, a, b in pairs}  # alpha 8, rank 4
    assert deltas.keys() < base.keys()
    for file in set(files.values()):
        with safe_open(tmp_path / "merged" / file, "pt") as merged, safe_open(folder / file, "pt") as old:
            assert set(merged.keys()) == set(old.keys()) and merged.metadata() == old.metadata()
        for name, weight in load_file(tmp_path / "merged" / file).items():
            summed = base[name].float() + deltas.pop(name, torch.zeros(()))
            assert weight.dtype == base[name].dtype and torch.equal(weight, summed.to(weight.dtype)), name
    assert not deltas
    written = (tmp_path / "merged" / "model.safetensors.index.json").read_text()
    assert written == (folder / "model.safetensors.index.json").read_text()
    assert merge.main([*words, f"--out={tmp_path / 'wide'}", "--dtype=float32"]) == 0
    sizes = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert sizes == sum(4 * weight.numel() for weight in base.values())


def old_name(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def lora_pairs(weights: dict) -> list[tuple]:
    """(layer, A, B) of each layer."""
    match = [(re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name), name) for name in weights]
    return [(m[1], weights[name], weights[name.replace("lora_A", "lora_B")]) for m, name in match if m]


LIMITS = {
    "Qwen3-VL's": ({"max_pixels": None, "size": {"longest_edge": 9, "shortest_edge": 1}, "patch_size": 16},
                   {"max_pixels": None, "size": {"longest_edge": 20, "shortest_edge": 10}, "patch_size": 16}),
    "Qwen2-VL's": ({"min_pixels": 1, "max_pixels": 9}, {"min_pixels": 10, "max_pixels": 20}),
    "both": ({"min_pixels": 1, "max_pixels": 9, "size": {"min_pixels": 1, "max_pixels": 9}},
             {"min_pixels": 10, "max_pixels": 20, "size": {"min_pixels": 10, "max_pixels": 20}}),
    "none": ({"patch_size": 14}, {"patch_size": 14, "size": {"shortest_edge": 10, "longest_edge": 20}}),
}  # fmt: skip


MTP = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.mlp.gate_proj.weight", "mtp.norm.weight")


def test_weights_that_only_other_programs_load_are_kept(tmp_path, capsys):
    """Qwen3.5's folders hold layers for multi-token prediction too, `mtp`, which transformers does not load."""
    world = tiny.write_world(tmp_path / "world", tiny.mixed_rows()[25:], "qwen3_5")
    save_adapter(tiny.lora_model(world).model, tmp_path / "adapter")
    path = world / "model" / "model.safetensors"
    base = load_file(path) | {name: torch.randn(8, 8) for name in MTP}
    save_file(base, path, {"format": "pt"})
    capsys.readouterr()
    words = [f"--adapter={tmp_path / 'adapter'}", f"--model={world / 'model'}", f"--rows={world / 'rows.jsonl'}"]
    assert merge.main([*words, f"--images={world / 'images'}", f"--out={tmp_path / 'merged'}"]) == 0
    assert "mtp" not in (told := capsys.readouterr()).out + told.err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.keys() and all(torch.equal(merged[name], base[name]) for name in MTP)
    pairs = lora_pairs(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    changed = {f"{layer}.weight": base[f"{layer}.weight"] + 2 * (b @ a) for layer, a, b in pairs}
    assert {name.split(".")[4] for name in changed} == {"linear_attn", "self_attn", "mlp"}
    for name, weight in merged.items():
        assert torch.equal(weight, changed.get(name, base[name])), name


@pytest.mark.parametrize("kind", LIMITS)
def test_pixel_limits_are_written_by_the_names_that_a_file_uses(tmp_path, kind):
    before, after = LIMITS[kind]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(before))
    both = {"video_processor": before, "processor_class": "Any"}
    (tmp_path / "processor_config.json").write_text(json.dumps(both | {"image_processor": before}))
    set_pixel_limits(tmp_path, (10, 20))
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == after
    assert json.loads((tmp_path / "processor_config.json").read_text()) == both | {"image_processor": after}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    set_pixel_limits(tmp_path, (10, 20))
    assert (tmp_path / "processor_config.json").read_text() == json.dumps(both)


def test_a_merged_folder_holds_what_the_run_used_and_a_card(world, tmp_path, monkeypatch):
    model = shutil.copytree(world / "model", tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": 5, "top_k": 1}')
    (model / "README.md").write_text(HUB["README.md"])
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    words = {"system": "Be brief.", "prompt": "{question}\nAnswer in a word.", "min_pixels": 1024, "max_pixels": 4096}
    assert train.main(arguments(world, tmp_path / "run", model=model, max_steps=2, eval_every=0, **words)) == 0
    assert merge.main([f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}"]) == 0
    merged, card = tmp_path / "merged", (tmp_path / "merged" / "README.md").read_text()
    limits = image_settings(merged)
    assert (limits.min_pixels, limits.max_pixels) == (1024, 4096)
    names = ["<|endoftext|>", "<|im_end|>"]  # the tokenizer's end, and the template's
    ends = [5, *AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(names)]
    assert json.loads((merged / "generation_config.json").read_text()) == {"eos_token_id": ends, "top_k": 1}
    for text in (f'base_model: "{model}"', "license: other\nlicense_name: research\n---", '"Be brief."', "4,096 pixels",
                 'put as "{question}\\nAnswer in a word."', "vllm serve THIS_FOLDER"):  # fmt: skip
        assert text in card
    assert "language: en" not in card
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (model / name).read_bytes()


def test_eval_puts_questions_to_a_merged_model_as_its_run_did(world, tmp_path, capsys):
    """Its numbers are the checkpoint's, without the run's --system, --prompt and --image-first on the command line."""
    run, merged, data = tmp_path / "run", tmp_path / "merged", world / "rows.jsonl"
    words = {"system": "Be brief.", "prompt": "{question} Answer in a word.", "max_steps": 2, "eval_every": 0}
    assert train.main([*arguments(world, run, **words), "--image-first"]) == 0
    assert merge.main([f"--ckpt={run}", f"--out={merged}"]) == 0
    rows = [f"--data={data}", f"--images={world / 'images'}", "--max-new-tokens=2", "--workers=0"]
    capsys.readouterr()
    losses = []
    for name, chosen in {"a": ["--ckpt", run], "b": ["--model", merged], "c": ["--model", merged, "--system="]}.items():
        assert evaluation.main([*map(str, chosen), *rows, f"--output={tmp_path / name}"]) == 0
        losses.append([prediction["loss"] for prediction in read_predictions(tmp_path / name / "predictions.jsonl")])
    told = re.findall(r"questions are put as .*onelook.json says: (.*)", capsys.readouterr().out)
    prompt = "prompt '{question} Answer in a word.', image_first True"
    assert told == [f"system 'Be brief.', {prompt}", prompt]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] != pytest.approx(losses[0], rel=1e-3)


def test_end_tokens_are_written_where_they_are_not_named_yet(tmp_path):
    path = tmp_path / "generation_config.json"
    set_end_tokens(tmp_path, [3, 4])
    assert json.loads(path.read_text()) == {"eos_token_id": [3, 4]}
    path.write_text('{"eos_token_id":   [4, 3]}')
    set_end_tokens(tmp_path, [3, 4])
    assert path.read_text() == '{"eos_token_id":   [4, 3]}'


def test_an_adapter_made_elsewhere_is_merged(world, run, tmp_path, capsys):
    (tmp_path / "made").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "checkpoint-000020" / name, tmp_path / "made")
    words = [f"--adapter={tmp_path / 'made'}", f"--out={tmp_path / 'merged'}"]
    with pytest.raises(InputError, match="--adapter: needs --rows"):
        merge.main(words)
    words += [f"--rows={world / 'rows.jsonl'}", f"--images={world / 'images'}"]
    assert merge.main(words) == 0 and "logits of merged weights" in capsys.readouterr().out
    assert merge.main([f"--ckpt={run / 'checkpoint-000020'}", f"--out={tmp_path / 'ours'}"]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "merged"))
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert "made elsewhere, does not tell how" in (tmp_path / "merged" / "README.md").read_text()
    for words in ([], ["--ckpt=a", "--adapter=b"]):
        with pytest.raises(InputError, match="--ckpt or --adapter: give one"):
            merge.main([*words, f"--out={tmp_path / 'no'}"])
    with pytest.raises(InputError, match="--out: ~/merged: a shell expands ~"):
        merge.main(["--ckpt=a", "--out=~/merged"])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_merge_that_changes_the_answers_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "merge_lora", lambda model: None)
    with pytest.raises(InputError, match="not merged, logits of merged weights and adapter are 1e\\+02% as far"):
        merge.main([f"--ckpt={run}", f"--out={tmp_path / 'merged'}"])
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_rounding_would_swallow_is_refused(world, tmp_path):
    """The base is bfloat16 and LoRA hardly trained: the sum changes in float32 only."""
    model = AutoModelForImageTextToText.from_pretrained(world / "model", dtype=torch.bfloat16)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for path in (world / "model").iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    words = arguments(world, tmp_path / "run", model=folder, max_steps=1, lr=1e-6, eval_every=0)
    assert train.main(words) == 0
    with pytest.raises(InputError, match="once rounded to torch.bfloat16"):
        merge.main([f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}"])
    assert merge.main([f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}", "--dtype=float32"]) == 0


def test_rows_on_which_the_adapter_changes_nothing_are_reported(world, run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        merge, "load_adapter", lambda base, _ckpt: PeftModel(base, LoraConfig(target_modules=["q_proj"]))
    )
    with pytest.raises(InputError, match="the adapter changes no logits on these rows, name others"):
        merge.main([f"--ckpt={run}", f"--out={tmp_path / 'merged'}"])
    assert not list(tmp_path.iterdir())


def test_rows_that_can_t_be_used_to_compare_logits_are_an_error_with_the_reason(run, tmp_path):
    with pytest.raises(InputError, match=r"no usable row .*\n  rows.jsonl:1: image 'a.png' is missing"):
        merge.main([f"--ckpt={run}", f"--out={tmp_path / 'merged'}", f"--images={tmp_path}"])


def test_a_folder_that_can_t_be_made_is_an_error_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "load_base", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out: can't write to .*file"):
        merge.main([f"--ckpt={run}", f"--out={tmp_path / 'file' / 'merged'}"])


def test_two_merges_to_one_folder_are_refused_and_others_partial_folders_stay(run, tmp_path, hold, monkeypatch):
    monkeypatch.setattr(merge, "load_base", lambda *_: pytest.fail("loaded"))
    ours, others = tmp_path / ".onelook-00000000-a[b]", tmp_path / ".onelook-00000000-my-a[b]"
    for folder in (ours, others):
        folder.mkdir()
    hold(tmp_path / ".onelook-lock-a[b]")
    with pytest.raises(InputError, match=r"--out .*a\[b\] is in use by another process"):
        merge.main([f"--ckpt={run}", f"--out={tmp_path}/a[b]"])
    assert ours.exists()
    with merge.reserving(tmp_path / "b"):
        assert ours.exists() and others.exists()
    (tmp_path / ".onelook-lock-a[b]").unlink()
    with merge.reserving(tmp_path / "a[b]"):
        assert not ours.exists() and others.exists()
    assert [path for path in tmp_path.iterdir()] == [others]


@pytest.mark.parametrize("free", [0, 500_000])  # bytes
def test_a_merge_that_the_disk_does_not_take_is_one_clear_error_and_leaves_nothing(run, small_disk, monkeypatch, free):
    def write(*args, real=merge.write_weights):
        with disk_of(small_disk, free):
            real(*args)

    monkeypatch.setattr(merge, "write_weights", write)
    with pytest.raises(InputError, match="--out: .*merged was not written: .*No space left"):
        merge.main([f"--ckpt={run}", f"--out={small_disk / 'merged'}"])
    assert not list(small_disk.iterdir())


def test_an_existing_folder_is_not_overwritten(run, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        merge.main([f"--ckpt={run}", f"--out={tmp_path}"])


def test_a_checkpoint_has_the_names_and_the_configuration_that_vllm_reads(run):
    """vLLM (vllm/lora/lora_model.py, utils.py and peft_helper.py; vllm/model_executor/models/qwen3_vl.py): a name is
    base_model.model.MODULE.lora_A.weight or lora_B, MODULE's prefix model.language_model. stands for its
    language_model.model., its last part must be a projection; no modules_to_save, no bias, no DoRA."""
    folder = run / "checkpoint-000020"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = [re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name) for name in file.keys()]
    modules = {match[1].replace("model.language_model.", "language_model.model.", 1) for match in names}
    layers = {
        re.fullmatch(r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.(\w+)", module)[2] for module in modules
    }
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * len(modules)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 16 and config["lora_alpha"] == 32 and config["target_modules"] == sorted(layers)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}  # others may read them too
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"


def test_the_card_names_data_settings_and_score_and_escapes_them(world, run):
    text = (run / "checkpoint-000020" / "README.md").read_text()
    best = json.loads((run / "best.json").read_text())
    assert f"exact match {100 * best['exact_match']:.1f}%, at step {best['step']}" in text
    assert (
        f'base_model: "{world / "model"}"' in text and "33 questions, fingerprint" in text and "| lr | 0.005 |" in text
    )
    images = {"min_pixels": 1, "max_pixels": 2}
    settings = {
        "model": "some/model",
        "lora_r": 48,
        "system": 'say "a | b"',
        "prompt": "{question}?",
        "dora": False,
        "lora_targets": "q_proj",
        "image_settings": images,
    }
    card = model_card({"step": 7, "best": {}, "identity": {"train rows": "9", "odd": "a|b\nc"}, "settings": settings})
    assert (
        "| odd | a\\|b c |" in card
        and "--max-lora-rank 64" in card
        and 'were put as "{question}?".' in card
        and "validation" not in card
    )
