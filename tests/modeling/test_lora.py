"""--lora-targets, --rslora, --dora and --init-from: what LoRA is put on, and what it starts from."""

import json
import re
import shutil
import weakref
from collections import Counter
from contextlib import suppress

import pytest
import tiny
import torch
from peft.tuners.lora import Linear as LoraLinear
from runs import Run, adapter, arguments, lines
from safetensors.torch import save_file
from steps import assert_exact, run_step, whole
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import merge
import train
from common import InputError
from data import build_batch
from model import load_base
from modeling.attention import block_mask
from modeling.lora import add_lora, lora_table, merge_lora
from modeling.memory import compile_layers
from modeling.targets import DEFAULT_TARGETS
from training.checkpoints import read_state
from trees import Assignment

ALL = "q_proj,vision,merger"
LAYERS = {"qwen3_vl": "linear_fc1", "qwen2_5_vl": "gate_proj", "qwen2_vl": "fc1"}


@pytest.fixture(scope="module")
def start(world, tmp_path_factory):
    """A checkpoint to start from."""
    output = tmp_path_factory.mktemp("start") / "out"
    train.main(arguments(world, output, **{"max-steps": 1, "lora-r": 4}))
    return output / "checkpoint-000001"


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize(
    "more",
    [
        {"targets": ALL},
        {"targets": "vision"},
        {"targets": r"layers\.[02]\.self_attn\..*_proj,gate_proj"},
        {"rslora": True},
        {"dora": True},
        {"targets": ALL, "rslora": True, "dora": True},
    ],
)
def test_loss_and_gradients_equal_one_by_one_whatever_is_trained(world, tmp_path, more):
    """Three micro-batches, of which the last has no image: its vision gradients are 0, not missing."""
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    trees = whole(tiny.load_world(world)[0].samples)
    text = [tree for tree in trees if tree.samples == (30,)]
    shown = [tree for tree in trees if tree not in text]
    expected = tiny.Reference(world, tiny.lora_model(world, **more), tmp_path / "adapter").loss_and_gradients(rows)
    assert_exact(run_step(world, [shown[::2], shown[1::2], text], **more), expected)
    assert any("visual" in name for name in expected[1]) == ("vision" in more.get("targets", ""))
    assert any("magnitude" in name for name in expected[1]) == more.get("dora", False)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_vision_tower_of_each_family_is_trained_exactly(tmp_path, family):
    rows = tiny.mixed_rows()[14:]
    world = tiny.write_world(tmp_path / "world", rows, family)
    ours = tiny.lora_model(world, targets=ALL)
    expected = tiny.Reference(world, ours, tmp_path / "adapter").loss_and_gradients(rows)
    assert_exact(run_step(world, [whole(tiny.load_world(world)[0].samples)], targets=ALL), expected)
    kinds = lora_table(ours)
    assert kinds["visual.blocks.attn.qkv"][0] == kinds[f"visual.blocks.mlp.{LAYERS[family]}"][0] == 3
    assert kinds["visual.merger.mlp"][0] == 2 and kinds["q_proj"][0] == 3 and "k_proj" not in kinds


def test_a_frozen_tower_runs_without_gradient_and_a_trained_one_with_it(world):
    data, dataset = tiny.load_world(world)
    batch = dataset[Assignment((whole(data.samples)[0],))]
    frozen, trained = tiny.lora_model(world), tiny.lora_model(world, targets="vision")
    assert not frozen.encode_images(batch).embeds.requires_grad and trained.encode_images(batch).embeds.requires_grad
    assert trained.base.model.visual.training and not trained.eval().base.model.visual.training


@pytest.mark.parametrize("targets", ["q_proj", "q_proj,merger", "vision"])
def test_a_trained_tower_has_an_attention_with_a_backward(world, targets):
    base = load_base(world / "model", torch.float32, torch.device("cpu"))
    base.model.visual.config._attn_implementation = "onelook_cudnn_flash_vision"  # as on a Hopper GPU
    add_lora(base, "", 4, 8, 0.0, targets)
    chosen = base.model.visual.config._attn_implementation
    assert chosen == ("onelook_cudnn_flash_vision" if targets == "q_proj" else "onelook_flash_vision")


def test_two_processes_train_the_vision_tower_like_one(world, tmp_path):
    """Steps of two questions: some show no image, some show one on one rank only."""
    settings = {"lora-targets": "q_proj,vision", "batch-size": 2, "max-steps": 17, "eval-every": 0, "save-every": 0}
    runs = [arguments(world, tmp_path / f"{ranks}", **settings, **{"lora-dropout": 0.0}) for ranks in (1, 2)]
    for ranks, argv in zip((1, 2), runs):
        assert Run(argv, tmp_path / f"{ranks}.log", ranks).wait() == [0] * ranks, (
            tmp_path / f"{ranks}.log"
        ).read_text()
    one, two = ([line["loss"] for line in lines(tmp_path / f"{ranks}", "train")] for ranks in (1, 2))
    assert len(one) == 17 and two == pytest.approx(one, rel=1e-3)
    moved = [name for name, weight in adapter(tmp_path / "2", 17).items() if "lora_B" in name and weight.any()]
    assert any("visual" in name for name in moved) and any("q_proj" in name for name in moved)


# -------------------------------------------------------------------------------------------------------- shared inputs


class LowProducts(TorchDispatchMode):
    """Counts LoRA's products drop(x) A' by their width: r, or the sum of all r of layers that share an input."""

    def __init__(self):
        super().__init__()
        self.widths = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation == torch.ops.aten.mm.default and out.shape[1] <= 16:  # the head's are wider
            self.widths[out.shape[1]] += 1
        return out


def low_products(model, batch) -> dict[int, int]:
    with torch.no_grad(), LowProducts() as products:
        model(batch)
    return products.widths


def loss_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses, _ = model(batch)
    losses.sum().backward()
    return {"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def use_forward_of_peft(model) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            del layer.forward


def all_kept(model) -> set:
    """What groups of layers keep of their inputs and products."""
    groups = [module.shared_input for module in model.modules() if hasattr(module, "shared_input")]
    return {(group.is_open, group.x, tuple(group.products)) for group in groups}


NOTHING = {(False, None, ())}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("family", "targets", "widths"),
    [
        ("", DEFAULT_TARGETS, {10: 1, 12: 2, 8: 3, 4: 6}),  # k of the first layer has an r of 2
        ("", "k_proj,v_proj,up_proj", {6: 1, 8: 2, 4: 3}),
        ("qwen2_5_vl", "vision,q_proj,k_proj", {6: 1, 8: 2 + 3, 4: 3 * 3}),  # gate and up of the tower too
        ("qwen3_5", r".*in_proj_(qkv|z|a|b),.*self_attn.(k|v)_proj", {16: 2, 6: 1}),
    ],
)
def test_layers_that_share_an_input_share_a_product_and_keep_results_and_gradients(
    world, tmp_path, family, targets, widths, dropout
):
    if family:
        world = tiny.write_world(tmp_path / "world", tiny.mixed_rows()[14:], family)
    model = tiny.lora_model(world, dropout, targets=targets)
    k = next(layer for name, layer in model.named_modules() if name.endswith("k_proj"))
    shapes = ((k.in_features, 2), (2, k.out_features))
    k.lora_A["default"], k.lora_B["default"] = (nn.Linear(*shape, bias=False) for shape in shapes)
    model.double()  # in float32, sums of a wider product differ by up to 5e-6
    data, dataset = tiny.load_world(world)
    batch = dataset[Assignment(tuple(whole(data.samples)))]
    ours, products = loss_and_gradients(model, batch), low_products(model, batch)
    assert products == widths and all_kept(model) == NOTHING
    use_forward_of_peft(model)
    theirs = loss_and_gradients(model, batch)
    error = tiny.relative_error(ours, theirs)
    print(f"relative error {error:.1e}")
    assert error < 1e-12 and sum(low_products(model, batch).values()) > sum(widths.values())


def test_a_disabled_or_merged_adapter_has_no_products_and_keeps_nothing(world):
    model, (data, dataset) = tiny.lora_model(world), tiny.load_world(world)
    batch = dataset[Assignment((whole(data.samples)[0],))]
    with model.model.disable_adapter():
        assert low_products(model, batch) == {} and all_kept(model) == NOTHING
    assert low_products(model, batch) == {12: 3, 8: 3, 4: 6}
    merge_lora(model.model)
    assert low_products(model, batch) == {} and all_kept(model) == NOTHING


@pytest.fixture
def mlp(world) -> nn.Module:
    return tiny.lora_model(world).base.model.language_model.layers[0].mlp


def test_memory_that_runs_out_between_layers_leaves_no_product_or_activation(mlp, monkeypatch):
    def run_out(_x):
        raise torch.OutOfMemoryError

    x = torch.ones(1, 3, mlp.hidden_size, requires_grad=True) * 2
    kept = weakref.ref(x)
    with monkeypatch.context() as patch, suppress(torch.OutOfMemoryError):
        patch.setattr(mlp.up_proj, "forward", run_out)
        mlp(x)
        pytest.fail("did not run out")
    del x
    assert all_kept(mlp) == NOTHING and kept() is None


def test_compiled_code_shares_products_too(mlp):
    products = []

    def count(graph, _inputs):
        products.append(sum("matmul" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(mlp, fullgraph=True, backend=count)  # whole: keeping products breaks no graph
    x = torch.randn(1, 3, mlp.hidden_size)
    assert torch.equal(compiled(x), mlp(x)) and all_kept(mlp) == NOTHING
    assert products == [2]  # of gate and up, and of down


def test_layers_compiled_with_flex_attention_keep_nothing_and_are_compiled_once(world, monkeypatch):
    """Without gradients: FlexAttention has none on a CPU."""
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world, dropout=0.1)
    batch = build_batch(data, Assignment((whole(data.samples)[0],)), dataset.settings, pad_to=128)
    monkeypatch.setattr("model.tree_mask", lambda batch, _dense: block_mask(batch.tree, batch.branch))
    compile_layers(model.model, 1.0, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for _ in range(3):
            model(batch)
            assert all_kept(model) == NOTHING
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs == 2  # of the last layer, and of all others


def test_a_layer_never_gets_the_product_of_another_input_or_of_earlier_weights(mlp):
    x, a = torch.randn(1, 3, mlp.hidden_size), mlp.up_proj.lora_A["default"].weight
    # Both layers twice in a pass, with inputs of their own.
    mlp.own_forward = lambda x: torch.stack([mlp.gate_proj(x), mlp.up_proj(2 * x), mlp.gate_proj(-x), mlp.up_proj(x)])

    @torch.no_grad()
    def results():
        found = [mlp(x), mlp.gate_proj(x)]  # the second outside of a pass: up does not take its part
        a.mul_(2)
        found += [mlp.up_proj(x), mlp(x)]
        a.div_(2)
        return found

    ours = results()
    use_forward_of_peft(mlp)
    for own, theirs in zip(ours, results()):
        assert torch.allclose(own, theirs, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj,v_proj", {"q_proj": 3, "v_proj": 3}),
        (r"layers\.0\.(self_attn|mlp)\.\w+_proj", dict.fromkeys(DEFAULT_TARGETS.split(","), 1)),
        ("vision", {"visual.blocks.attn.qkv": 1, "visual.blocks.attn.proj": 1, "visual.blocks.mlp.linear_fc1": 1,
                    "visual.blocks.mlp.linear_fc2": 1}),
        ("merger", {f"visual.{name}.linear_fc{n}": 1 for name in ("merger", "deepstack_merger_list") for n in (1, 2)}),
    ],
)  # fmt: skip
def test_targets_name_layers(world, targets, expected):
    assert {kind: count for kind, (count, _) in lora_table(tiny.lora_model(world, targets=targets)).items()} == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj,query", "'query' names nothing; linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"),
        ("mlp", "'mlp' names model.language_model.layers.0.mlp too"),
        ("qkv", "'qkv' names nothing"),
        ("q_proj,visual.blocks.0.attn.qkv", "'visual.blocks.0.attn.qkv' names nothing"),
    ],
)
def test_a_target_that_is_no_linear_layer_of_the_language_model_is_refused_before_weights_are_read(
    world, monkeypatch, tmp_path, targets, message
):
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("read weights"))
    for more in ([], ["--plan"]):
        with pytest.raises(InputError, match=f"^--lora-targets: {re.escape(message)}"):
            train.main([*arguments(world, tmp_path / "out", **{"lora-targets": targets}), *more])


def test_a_plan_is_refused_for_what_it_does_not_count(world):
    for more, what in ((["--dora"], "DoRA"), (["--lora-targets=q_proj,merger"], "a trained vision tower")):
        with pytest.raises(InputError, match=f"not those of {what}"):
            train.main([*arguments(world, ""), "--plan", *more])


@pytest.mark.parametrize("more", [{"dora": True, "rslora": True}, {"lora-targets": ALL}], ids=["dora", "vision"])
def test_a_run_is_resumed_merged_and_handed_over_whatever_is_trained(world, tmp_path, more, capsys):
    output, settings = tmp_path / "out", {"max-steps": 4, "lr": 0.005, "keep": 9} | more
    argv = [word.replace("=True", "") for word in arguments(world, output, **settings)]
    train.main(argv)
    undisturbed = adapter(output, 4)
    shutil.rmtree(output / "checkpoint-000004")
    train.main([*argv, "--resume=auto"])
    assert all(torch.equal(adapter(output, 4)[name], weight) for name, weight in undisturbed.items())
    assert merge.main([f"--ckpt={output / 'checkpoint-000004'}", f"--out={tmp_path / 'merged'}"]) == 0
    share = float(re.search(r"are ([\d.e-]+)% as far apart", capsys.readouterr().out)[1])
    assert share < 0.1
    scores = {}
    for option in ("--merge", "--no-merge"):
        words = [f"--ckpt={output / 'checkpoint-000004'}", "--max-new-tokens=1", "--workers=0", option]
        evaluation.main([*words, f"--output={tmp_path / option}"])
        predictions = (tmp_path / option / "predictions.jsonl").read_text().splitlines()
        scores[option] = [json.loads(line)["loss"] for line in predictions]
    assert scores["--merge"] == pytest.approx(scores["--no-merge"], rel=1e-3)
    card = (output / "checkpoint-000004/README.md").read_text()
    assert "vllm serve" not in card and "merge it first" in card


def test_rslora_scales_by_the_root_of_r(world):
    plain, stabilized = (tiny.lora_model(world, rslora=rslora) for rslora in (False, True))
    scales = [{m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} for model in (plain, stabilized)]
    assert scales == [{8 / 4}, {8 / 2}]


# ---------------------------------------------------------------------------------------------------------- --init-from


def test_a_run_starts_from_another_adapter_s_weights_at_step_0(world, start, tmp_path):
    output = tmp_path / "out"
    settings = {"lora-r": 4, "init-from": start, "lr": 1e-60, "max-steps": 2, "eval-every": 0, "save-every": 1}
    train.main(arguments(world, output, **settings))
    weights = adapter(start.parent, 1)
    assert all(torch.equal(adapter(output, 2)[name], weight) for name, weight in weights.items())
    state = read_state(output / "checkpoint-000002")
    assert state["step"] == 2 and state["settings"]["init_from"] == str(start)
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {2.0}


def test_questions_of_another_form_than_those_of_the_first_weights_are_told(world, start, tmp_path, capsys):
    settings = {"lora-r": 4, "init-from": start, "max-steps": 1}
    train.main(arguments(world, tmp_path / "same", **settings))
    assert "another form" not in capsys.readouterr().out
    train.main(arguments(world, tmp_path / "other", **settings | {"prompt": "Q: {question}", "max-pixels": 8192}))
    told = capsys.readouterr().out
    assert f"warning: {start} was trained on questions of another form\n  prompt: was '{{question}}', is now" in told
    assert "max_pixels: was 65536, is now 8192\n" in told and "min_pixels: was" not in told


def test_a_checkpoint_overrides_init_from_whose_weights_are_known_by_their_fingerprint(world, start, tmp_path):
    moved, output = shutil.copytree(start, tmp_path / "moved"), tmp_path / "out"
    settings = {"lora-r": 4, "init-from": start, "keep": 9, "max-steps": 4}
    train.main(arguments(world, output, **settings))
    undisturbed = adapter(output, 4)
    shutil.rmtree(output / "checkpoint-000004")
    train.main(arguments(world, output, **settings | {"init-from": moved, "resume": "auto"}))
    assert all(torch.equal(adapter(output, 4)[name], weight) for name, weight in undisturbed.items())
    save_file(
        {name: weight + 1 for name, weight in adapter(start.parent, 1).items()}, moved / "adapter_model.safetensors"
    )
    for other in (moved, ""):
        with pytest.raises(InputError, match="first weights: was"):
            train.main(arguments(world, output, **settings | {"init-from": other, "resume": "auto"}))
    (moved / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="does not fit:\n  it is damaged: "):
        train.main(arguments(world, tmp_path / "new", **settings | {"init-from": moved}))
    (moved / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="does not fit:\n  it holds no adapter_config.json"):
        train.main(arguments(world, tmp_path / "new", **settings | {"init-from": moved}))
    shutil.rmtree(moved)
    shutil.rmtree(output / "checkpoint-000004")
    resumed = settings | {"init-from": moved, "resume": "auto"}
    assert train.main(arguments(world, output, **resumed)) == 0
    shutil.copytree(start, moved)  # it is there again, and still what the checkpoints go back to
    assert train.main(arguments(world, output, **resumed)) == 0
    shutil.rmtree(moved)
    with pytest.raises(InputError, match="does not fit:\n  it holds no adapter_model.safetensors"):
        train.main(arguments(world, tmp_path / "new", **resumed))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora-r": 8}, "r is 4 there, 8 here"),
        ({"lora-alpha": 7}, "lora_alpha is 32.0 there, 7.0 here"),
        ({"lora-targets": "q_proj"}, "only there: base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A"),
        (
            {"lora-targets": DEFAULT_TARGETS + ",merger"},
            "only here: base_model.model.model.visual.deepstack_merger_list",
        ),
        ({"rslora": True}, "use_rslora is False there, True here"),
    ],
)
def test_init_from_with_other_lora_is_refused_with_the_difference(world, start, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("read weights"))
    settings = {"lora-r": 4, "init-from": start} | more
    argv = [word.replace("=True", "") for word in arguments(world, tmp_path / "out", **settings)]
    with pytest.raises(InputError, match=re.escape(message)):
        train.main(argv)


def test_init_from_with_changed_base_weights_is_refused(world, start, tmp_path):
    moved = shutil.copytree(start, tmp_path / "pissa")
    config = json.loads((moved / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="init_lora_weights is 'pissa' there"):
        train.main(arguments(world, tmp_path / "out", **{"lora-r": 4, "init-from": moved}))


def test_a_folder_that_is_not_there_is_no_name_of_the_hub(world, tmp_path):
    for name in ("/no/such/folder", "./gone", "a/b/c"):
        with pytest.raises(InputError, match="there is no such folder"):
            train.main(arguments(world, tmp_path / "out", model=name))
