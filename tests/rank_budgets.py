"""A program for runs.Run: what each rank compiles, where each would plan another length of the run. Every rank writes
its decisions to a file."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

import dist_utils
from dist_utils import Ranks
from modeling.memory import kept_bytes
from training import rehearsal


def main(argv: list[str], stop: dist_utils.Stop) -> int:
    ranks = dist_utils.start()
    text = SimpleNamespace(num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    vars(text).update(num_attention_heads=4, num_key_value_heads=2)
    config = SimpleNamespace(model_type="qwen3_vl", text_config=text)
    model = SimpleNamespace(base=SimpleNamespace(config=config), model=None)
    prepared = SimpleNamespace(bounds=SimpleNamespace(tokens=4096, branches=8))
    on_cuda, decisions = Ranks(ranks.rank, ranks.world_size, torch.device("cuda")), []
    rehearsal.activation_room = lambda _: 9 * kept_bytes(config, 4096)
    for compiled, budget, of_rank_0, of_rank_1 in (
        ("on", "auto", 1000, 9000), ("on", 0.75, 1000, 9000), ("auto", "auto", 10, 9000), ("auto", "auto", 9000, 10)
    ):  # fmt: skip
        args = SimpleNamespace(compile=compiled, memory_budget=budget, dora=False, base_precision="bf16")
        rehearsal.training_seconds = lambda *_, own=(of_rank_0, of_rank_1)[ranks.rank]: own
        decisions.append(rehearsal.plan_attempts(args, prepared, model, on_cuda))
    (Path(argv[0]) / f"{ranks.rank}.json").write_text(json.dumps(decisions))
    dist_utils.leave()
    return 0
