"""Settings of merge.py: its command line and the check of it."""

import argparse
from pathlib import Path

from training.settings import Parser, choice, parse_words, path_problems, refuse


def build_parser() -> Parser:
    parser = Parser("merge.py", description="Add a checkpoint's LoRA to its base model's weights.")
    parser.add_argument("--ckpt", default="", help="checkpoint, or a run's folder for its best one")
    parser.add_argument("--adapter", default="", help="instead: LoRA adapter made elsewhere, a folder of PEFT's form")
    parser.add_argument("--out", required=True, help="new folder of the merged model")
    parser.add_argument("--model", default="", help="base model; empty: the adapter's")
    parser.add_argument("--dtype", type=choice("auto", "float32"), default="auto", help="auto: that of each weight")
    parser.add_argument("--rows", default="", help="rows to compare logits on; empty: those of the run")
    parser.add_argument("--images", default="", help="folder that their image names start from; empty: the run's")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    args, problems = parse_words(build_parser(), argv)
    refuse(problems)
    problems += path_problems(args, files=("rows",), folders=("images", "adapter"), made=("model", "out"))
    if bool(args.ckpt) == bool(args.adapter):
        problems.append("--ckpt or --adapter: give one of them")
    is_own = args.ckpt or (Path(args.adapter) / "state.pt").is_file()
    if args.adapter and not is_own and not args.rows:
        problems.append("--adapter: needs --rows (and --images) to compare logits on, as an adapter names none")
    refuse(problems)
    return args
