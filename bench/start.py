"""Seconds from the command to step 1 by part: train.py, unmodified, with nothing compiled before and started again.

    python bench/start.py --work job --starts 3 --json start.json             # a folder that bench/job.py made
    python bench/start.py --work job --gpus 2
    python bench/start.py --work job --try autotune_pointwise=False           # a setting of torch's compiler

Each cold start has folders of its own for what Triton, Inductor and CUDA keep, and a warm start follows in the same
ones. Image headers that were checked before, and weights in the page cache, are those of the machine. Flags that are
not listed here go to train.py.
"""

import argparse
import ast
import importlib
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from step import device_name, write_json

ROOT = Path(__file__).parents[1]
# Names for --try. Others are read as the whole name of a setting, or in upper case of an environment variable.
CANDIDATES = {
    "autotune_pointwise": "torch._inductor.config.triton.autotune_pointwise",  # False: one form of a kernel, not timed
    "deterministic": "torch._inductor.config.deterministic",  # True: nothing is timed on the GPU
    "compile_threads": "torch._inductor.config.compile_threads",  # processes that compile kernels, 32 at most
    "static_launcher": "torch._inductor.config.use_static_cuda_launcher",
    "bundle_autograd_cache": "torch._functorch.config.bundled_autograd_cache",  # True: one file for a graph
    "guard_nn_modules": "torch._dynamo.config.guard_nn_modules",
    "pattern_matcher": "torch._inductor.config.pattern_matcher",
    "epilogue_fusion": "torch._inductor.config.epilogue_fusion",
    "comprehensive_padding": "torch._inductor.config.comprehensive_padding",
    "tile_reductions": "torch._inductor.config.triton.tile_reductions",
    "dynamic_scale_rblock": "torch._inductor.config.dynamic_scale_rblock",
}
GRAPH_FIELDS = (
    "compile_id",
    "co_name",
    "is_forward",
    "dynamo_time_before_restart_s",
    "entire_frame_compile_time_s",
    "backend_compile_time_s",
)
GRAPH_FIELDS += ("code_gen_time_s", "inductor_compile_time_s", "triton_compile_time_us", "duration_us")
COUNTERS = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
COUNTERS += ("benchmarking.InductorBenchmarker.benchmark_gpu",)
AUTOGRAD_COUNTERS = "autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"
PARTS = "imports", "rows", "model", "rehearsal", "evaluation", "ready", "step 1"


# ---------------------------------------------------------------------------------------------------------- in a rank


def child(words: list[str]) -> None:
    """Run train.py in this process, with the settings of --try, and write what compiling took to START_FOLDER."""
    for name, value in json.loads(os.environ["START_TRIES"]).items():
        set_config(name, value)
    sys.argv = ["train.py", *words]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        path = Path(os.environ["START_FOLDER"], f"rank-{os.environ.get('RANK', 0)}.json")
        path.write_text(json.dumps(compiling(), default=str))


def set_config(name: str, value) -> None:
    """Set torch.x.config.y.z, whose module is the longest part of its name that can be imported."""
    module, _, rest = name.partition(".config.")
    *groups, last = rest.split(".")
    holder = importlib.import_module(f"{module}.config")
    for group in groups:
        holder = getattr(holder, group)
    assert hasattr(holder, last), f"--try: this torch has no {name}"
    setattr(holder, last, value)


def compiling() -> dict:
    """The graphs that this process compiled, with their seconds, and how often caches helped."""
    utils = torch._dynamo.utils
    graphs = [{name: getattr(one, name, None) for name in GRAPH_FIELDS} for one in utils.get_compilation_metrics()]
    counts = {name: utils.counters["inductor"][name] for name in COUNTERS}
    counts |= {name: utils.counters["aot_autograd"][name] for name in AUTOGRAD_COUNTERS}
    names, seconds = utils.compile_times(repr="csv", aggregate=True)
    return {"graphs": graphs, "counts": counts, "phases": dict(zip(names, map(float, seconds)))}


# ---------------------------------------------------------------------------------------------------------- measuring


def start(args, settings: list[str], caches: Path) -> dict:
    """Start train.py once, for two steps. Returns seconds by part, and what `compiling` says of rank 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"] * (args.gpus > 1)
        files = {"model": "model", "train": "train.jsonl", "val": "val.jsonl", "images": "pictures"}
        words = [word for flag, file in files.items() for word in (f"--{flag}", str(args.work.resolve() / file))]
        words += ["--output", str(folder / "run"), "--max-steps", "2", "--log-every", "1", *settings]
        environment = {"START_FOLDER": name, "START_TRIES": json.dumps(args.tries), **args.environment}
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
            environment[variable] = str(caches / variable.lower())
        command = [sys.executable, *launcher, __file__, "--child", *words]
        started = time.perf_counter()
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, **output)
        lines, step = [], []
        reader = Thread(target=lambda: lines.extend((time.perf_counter() - started, line) for line in process.stdout))
        reader.start()
        while process.poll() is None:
            if not step and has_step(folder / "run" / "metrics.jsonl"):
                step.append(time.perf_counter() - started)
            time.sleep(0.05)
        reader.join()
        told = "".join(line for _, line in lines)
        if process.returncode:
            raise SystemExit(f"error: train.py ended with {process.returncode}\n{told[-3000:]}")
        ready, line = next((at, line) for at, line in lines if line.startswith("ready after "))
        parts = {part: float(seconds) for part, seconds in re.findall(r"(\w+) ([\d.]+)[,)]", line)}
        main = sum(parts.values())
        parts = {"imports": ready - main, **parts, "ready": ready, "step 1": step[0] if step else lines[-1][0]}
        return {"parts": parts, **json.loads((folder / "rank-0.json").read_text())}


def has_step(metrics: Path) -> bool:
    return metrics.is_file() and '"event": "train"' in metrics.read_text()


def print_table(rows: list[dict], gpus: int) -> None:
    kinds = list(dict.fromkeys(row["caches"] for row in rows))
    of_kind = {kind: [row for row in rows if row["caches"] == kind] for kind in kinds}
    print(f"seconds on {gpus} rank(s), medians of {len(rows) // len(kinds)}" + "".join(f"{kind:>9}" for kind in kinds))
    for part in PARTS:
        medians = [statistics.median(row["parts"].get(part, 0.0) for row in of_kind[kind]) for kind in kinds]
        print(f"  {part:<32}" + "".join(f"{seconds:>9.1f}" for seconds in medians))
    for kind in kinds:
        last = of_kind[kind][-1]
        counts = ", ".join(f"{name.rpartition('.')[2]} {count}" for name, count in last["counts"].items() if count)
        print(f"{kind}: {len(last['graphs'])} compilations, {counts or 'nothing in the caches'}")
        for graph in last["graphs"]:
            way = {True: "forward", False: "backward"}.get(graph["is_forward"], "")
            seconds = (graph["duration_us"] or 0) / 1e6
            print(f"  {graph['compile_id']!s:<8}{graph['co_name'] or '':<34}{way:<9}{seconds:>8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of model, rows and pictures: see bench/job.py")
    parser.add_argument("--gpus", type=int, default=1, help="ranks")
    parser.add_argument("--starts", type=int, default=3, help="cold starts, each followed by a warm one")
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="NAME=VALUE",
        help=f"a setting of torch's compiler, by its whole name or one of {', '.join(CANDIDATES)}; in upper case an "
        "environment variable; may be repeated")  # fmt: skip
    parser.add_argument("--name", default="start")
    parser.add_argument("--json", default="", help="file for the results")
    args, settings = parser.parse_known_args()
    tries = dict(text.split("=", 1) for text in args.tries)
    args.environment = {name: value for name, value in tries.items() if name.isupper()}
    args.tries = {CANDIDATES.get(n, n): ast.literal_eval(v) for n, v in tries.items() if not n.isupper()}
    rows = []
    for _ in range(args.starts):
        with tempfile.TemporaryDirectory() as caches:
            for kind in ("cold", "warm"):
                rows.append({"caches": kind, **start(args, settings, Path(caches))})
                parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in rows[-1]["parts"].items())
                print(f"{kind}: {parts}", flush=True)  # at once: a machine may be taken away before the last start
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(device_name(device), *(f"{name}={value}" for name, value in tries.items()))
    print_table(rows, args.gpus)
    if args.json:
        write_json(Path(args.json), args.name, device, {"gpus": args.gpus, "tries": tries, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
