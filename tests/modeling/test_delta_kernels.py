"""Qwen3.5's recurrence as one operation around flash-linear-attention, whose kernels have no CPU version: a stand-in of
the same kind, an autograd.Function, takes their place and checks what it is called with."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from steps import whole
from test_cuda_hybrid import trees_with_padding
from torch.utils.flop_counter import FlopCounterMode

from data import recurrent_paths
from model import autocast
from modeling import delta
from modeling.memory import compile_layers
from training.costs import linear_attention
from trees import Assignment, grow_tree

SHAPES = {  # tokens of each tree's trunk and branches
    "unequal": [(13, [1, 6, 9]), (0, [7]), (6, [2, 11]), (5, []), (3, [4])],
    "one branch": [(9, [3])],
    "no branches": [(7, []), (0, [4])],
}
CPU = torch.device("cpu")


def make_inputs(shapes, dtype: torch.dtype, padding: int = 5) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random query, key, value, decay and beta of trees, as leaves, and their paths."""
    tree, branch = trees_with_padding(shapes, padding)
    paths = recurrent_paths(tree, branch)
    names = "order", "root_starts", "branch_starts", "root_of"
    torch.manual_seed(0)
    query, key, value = (torch.randn(len(tree), heads, d, dtype=dtype) for heads, d in ((2, 8), (2, 8), (4, 6)))
    decay, beta = (torch.rand(len(tree), 4, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    inputs = [x.requires_grad_() for x in (query, key, value, -decay, beta.to(dtype))]
    return inputs, [*(paths[name] for name in names), *map(torch.tensor, paths["starts_on_cpu"])]


def make_gradients(out: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
    """Random gradients of outputs and states."""
    torch.manual_seed(1)
    return [torch.randn_like(out), torch.randn_like(states)]


def token_by_token(_, starts, query, key, value, decay, beta, states=None):
    """The delta rule as it is defined, in whatever precision."""
    groups, (heads, width) = value.shape[2] // key.shape[2], value.shape[2:]
    query, key = (x.repeat_interleave(groups, dim=2) for x in (query, key))
    out, ends, bounds = [], [], starts.tolist()
    for number, (start, end) in enumerate(zip(bounds, bounds[1:])):
        state = query.new_zeros(heads, key.shape[3], width) if states is None else states[number]
        for t in range(start, end):
            state = state * decay[0, t].exp()[:, None, None]
            read = torch.einsum("hk,hkv->hv", key[0, t], state)
            state = state + torch.einsum("hk,hv->hkv", key[0, t], beta[0, t][:, None] * (value[0, t] - read))
            out.append(torch.einsum("hk,hkv->hv", query[0, t], state))
        ends.append(state)
    return torch.stack(out)[None], torch.stack(ends)


class StandIn(torch.autograd.Function):
    """The reference rule as one autograd.Function, with the library's decorators."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, calls, starts, starts_on_cpu, states, *inputs):
        calls.append(("forward", torch.is_autocast_enabled("cpu"), starts, starts_on_cpu, states))
        ctx.calls, ctx.starts_on_cpu, ctx.has_states = calls, starts_on_cpu, states is not None
        ctx.save_for_backward(*inputs, *([] if states is None else [states]))
        return delta.reference_sequences(None, starts_on_cpu, *inputs, states)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *gradients):
        ctx.calls.append(("backward", torch.is_autocast_enabled("cpu")))

        def run_again():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(delta.reference_sequences(None, ctx.starts_on_cpu, *leaves), leaves, gradients)

        with ThreadPoolExecutor(1) as thread:  # in which torch's functions record, as they do not in an operation
            *of_inputs, of_states = (*thread.submit(run_again).result(), *([] if ctx.has_states else [None]))
        return None, None, None, of_states, *of_inputs


@pytest.fixture
def calls(monkeypatch) -> list:
    """Calls of the stand-in for the library, which the code takes for installed with its kernels."""
    calls = []

    def chunk_gated_delta_rule(q, k, v, g, beta, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, **more):
        assert not more and output_final_state
        assert cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
        assert all(x.is_contiguous() for x in (q, k, v)) and g.dtype == torch.float32
        assert q.shape[:2] == (1, cu_seqlens[-1]) and v.shape[2] == 2 * k.shape[2]
        return StandIn.apply(calls, cu_seqlens, cu_seqlens_cpu, initial_state, q, k, v, g, beta)

    kernels = ModuleType("fla.ops.gated_delta_rule")
    kernels.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name, module in {"fla": ModuleType("fla"), "fla.ops": ModuleType("fla.ops"), kernels.__name__: kernels}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(delta, "has_kernels", lambda _: True)
    yield calls
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_backward_pass_over_trees_equals_autograd(shapes):
    inputs, paths = make_inputs(shapes, torch.float64)
    results = delta.forward_through_trees(token_by_token, inputs, paths)
    gradients = make_gradients(*results)
    expected = torch.autograd.grad(results, inputs, gradients)
    found = delta.backward_through_trees(token_by_token, gradients, inputs, paths)
    for x, ours, theirs in zip(inputs, found, expected):
        assert ours.shape == x.shape and ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["", "aot_eager", "inductor"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_operation_equals_the_reference_path(calls, shapes, backend):
    """In bfloat16, whose gradients are sums in float32 that may round to a neighbour."""
    inputs, paths = make_inputs(shapes, torch.bfloat16)

    def run(*arguments):
        return delta.tree_delta_rule(*arguments)

    expected = delta.forward_through_trees(delta.reference_sequences, inputs, paths)
    gradients = make_gradients(*expected)
    expected += torch.autograd.grad(expected, inputs, gradients)
    results = (torch.compile(run, backend=backend, fullgraph=True, dynamic=True) if backend else run)(*inputs, paths)
    results += torch.autograd.grad(results, inputs, gradients)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[:2], expected[:2]))
    for ours, theirs in zip(results[2:], expected[2:]):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() < 1e-3 * theirs.norm()
    sides = 1 if shapes is SHAPES["no branches"] else 2
    # The forward pass ran twice, as it says. Autocast was on throughout: it is off here and in compiled code.
    assert [call[:2] for call in calls] == [("forward", True)] * 2 * sides + [("backward", True)] * sides


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_the_compiler_knows_what_the_operations_give(calls, shapes):
    inputs, paths = make_inputs(shapes, torch.bfloat16)
    torch.library.opcheck(delta.tree_delta_rule, (*inputs, paths))
    gradients = make_gradients(*delta.tree_delta_rule(*inputs, paths))
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(delta.tree_delta_rule_backward, (gradients, inputs, paths))


def test_only_arguments_are_kept_for_the_backward_pass(calls):
    inputs, paths = make_inputs(SHAPES["unequal"], torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        delta.tree_delta_rule(*inputs, paths)
    assert kept == [x.data_ptr() for x in (*inputs, *paths)]


# -------------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("kernels"), family="qwen3_5")


def run_model(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients."""
    model.zero_grad()
    with autocast(CPU, torch.bfloat16):
        losses, _ = model(batch)
    losses.sum().backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_library_gets_trunks_and_branches_as_sequences_of_two_calls(world, calls, monkeypatch):
    model = tiny.lora_model(world).to(torch.bfloat16)
    trees = whole(tiny.load_world(world)[0].samples)
    batch = tiny.load_world(world)[1][Assignment(tuple(trees))]
    losses, _ = model(batch)
    sequences = [(len(starts) - 1, None if states is None else len(states)) for *_, starts, _, states in calls]
    assert sequences == [(len(trees), None), (len(batch.samples), len(batch.samples))] * 2  # in two layers
    monkeypatch.setattr(delta, "has_kernels", lambda _: False)
    assert torch.equal(losses, model(batch)[0])


def test_what_lora_shares_between_projections_is_given_up_before_the_recurrence(world, monkeypatch):
    model, through_trees = tiny.lora_model(world), delta.through_trees
    layers = delta.linear_layers(model.base.model.language_model)

    def check_and_run(*args, **paths):
        assert not any(layer.shared_input.is_open or layer.shared_input.products for layer in layers)
        return through_trees(*args, **paths)

    monkeypatch.setattr(delta, "through_trees", check_and_run)
    model(tiny.load_world(world)[1][Assignment(tuple(whole(tiny.load_world(world)[0].samples)))])


def test_a_layer_is_one_graph_with_the_gradients_of_eager_code(world, calls):
    """Of three layers, the two with the recurrence share a graph. The library keeps what it derives from the starts by
    their identity: where that got lost, each layer would derive it anew, and the CPU would wait for the GPU."""
    trees = whole(tiny.load_world(world)[0].samples)
    trees.append(grow_tree(tiny.load_world(world)[0].samples, [0]))
    batches = [tiny.load_world(world)[1][Assignment(tuple(part))] for part in (trees, trees[1:3], trees[-1:])]
    model = tiny.lora_model(world, dropout=0.1).to(torch.bfloat16)
    expected = [run_model(model, batch) for batch in batches]
    compile_layers(model.model, 1.0, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for batch, (losses, gradients) in zip(batches, expected):
        calls.clear()
        found, ours = run_model(model, batch)
        assert torch.equal(found, losses) and tiny.relative_error(ours, gradients) < 1e-3
        forward = [call for call in calls if call[0] == "forward"]
        assert len(forward) == 2 * len(calls) // 3 == 8  # twice, of trunks and of branches, in two layers
        for tensors in zip(*(call[2:4] for call in forward)):
            assert len({id(starts) for starts in tensors}) == 2
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_the_compiler_need_not_look_for_the_library(monkeypatch):
    monkeypatch.setattr(delta, "find_spec", torch.compiler.disable(lambda name: name))  # as in older versions of torch

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        return x + delta.has_kernels(torch.device("cuda"))

    assert run(torch.zeros(1)) == 1


def test_the_operation_counts_as_many_products_as_the_plan(calls):
    """Where all chunks are full. The compiler picks what it computes again by this."""
    inputs, paths = make_inputs([(64, [64, 128])], torch.bfloat16, padding=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        delta.tree_delta_rule(*inputs, paths)
    text = SimpleNamespace(layer_types=["linear_attention"], hidden_size=1, linear_num_key_heads=2)
    vars(text).update(linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6)
    assert counter.get_total_flops() == pytest.approx(linear_attention(text, [64, 64, 128])[-1], rel=1e-3)
