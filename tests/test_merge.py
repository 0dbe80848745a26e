"""Merged weights, tensor names that vLLM reads, and the model card."""

import json
import re
import stat

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from runs import arguments
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import merge
import train
from common import InputError
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


def test_a_merge_that_changes_the_answers_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "merge_lora", lambda model: None)
    with pytest.raises(InputError, match="not merged, logits of merged weights and of the adapter are 1e\\+02% as far"):
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


def test_a_folder_that_can_t_be_made_is_an_error_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "load_base", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out: can't write to .*file"):
        merge.main([f"--ckpt={run}", f"--out={tmp_path / 'file' / 'merged'}"])


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
