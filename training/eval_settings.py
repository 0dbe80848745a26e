"""Settings of eval.py: its command line and the check of it."""

import argparse
import os

from inputs.picture_checks import check_files
from training.settings import DEFAULT_MODEL, Parser, choice, number, parse_words, path_problems, refuse, template

FILES = ("data", "compare", "image")
NOT_WITH_QUESTION = ("data", "images", "with_base", "options", "closed_set", "by", "output", "compare")


def build_parser() -> Parser:
    parser = Parser("eval.py", description="Answer questions with a checkpoint or a base model, and score the answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)  # fmt: skip
    count, positive, switch = number(int, 0), number(int, 1), argparse.BooleanOptionalAction
    own = "0: the checkpoint's or the model's own"
    add = parser.add_argument_group("what is answered").add_argument
    add("--ckpt", default="", help="checkpoint, or a run's folder for its best one; empty: the base model")
    add("--adapter", default="", help="LoRA adapter made elsewhere: a folder of PEFT's form; empty: none")
    add("--with-base", action=switch, default=False, help="also answer with the base model, and compare")
    add("--model", default="", help=f"base model; empty: the adapter's, or {DEFAULT_MODEL}")
    add("--data", default="", help="rows to answer; empty: the validation rows of the checkpoint's run")
    add("--images", default="", help="folder that image names start from; empty: the folder of --data")
    add("--question", help="one question instead of --data; prints its answer and confidence")
    add("--image", action="append", default=[], help="image that --question is about; may be repeated")
    add("--system", help="system prompt of rows that have none; left out: the run's, or none")
    add("--prompt", type=template, help="text of a user turn, with {question}; left out: the run's")
    add("--min-pixels", type=count, default=0, help=f"fewest pixels of an image after resizing; {own}")
    add("--max-pixels", type=count, default=0, help=f"most pixels of an image after resizing; {own}")
    add("--skip-bad", action=switch, default=False, help="go on without rows that can't be used")
    add("--allow-outside-images", action=switch, default=False, help="allow images outside --images")
    add = parser.add_argument_group("how").add_argument
    add("--max-new-tokens", type=positive, default=256, help="longest answer in tokens")
    add("--options", action=switch, default=False, help="also score the options of rows that name some, by likelihood")
    add("--closed-set", type=count, default=0, help="also score the answers that the training rows give to a question, "
        "where these are at most so many; 0: off")  # fmt: skip
    add("--merge", action=switch, default=True, help="add LoRA to the weights first, which is faster; not where they "
        "are in FP8")  # fmt: skip
    add("--max-tokens", type=positive, default=16384, help="most tokens per batch; bounds memory")
    add("--dtype", type=choice("auto", "bfloat16", "float32"), default="auto", help="auto: bfloat16 on CUDA")
    add("--base-precision", type=choice("auto", "bf16", "fp8", "fp8-weights"), default="auto",
        help="numbers of the language model's linear layers, as in train.py; auto: those of the forward pass in "
        "training, bf16 for a base model")  # fmt: skip
    add("--workers", type=count, default=4, help="processes per rank that decode images; 0: none but the rank's own")
    add = parser.add_argument_group("results").add_argument
    add("--output", default="", help="folder of the results; empty: RUN/eval/checkpoint-STEP, or runs/eval-base")
    add(
        "--numeric-tolerance",
        type=number(float, 0, 1),
        default=0.05,
        help="relative error up to which a number is right",
    )
    add("--by", action="append", default=[], metavar="FIELD", help="field of the rows, such as complexity: also "
        "score the rows of each of its values; may be repeated")  # fmt: skip
    add("--compare", nargs="+", metavar="FILE", help="only compare predictions files: each after the first "
        "with the first")  # fmt: skip
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Settings from the command line. Raises InputError that lists everything wrong with them."""
    args, problems = parse_words(build_parser(), argv)
    refuse(problems)
    problems += path_problems(args, files=FILES, folders=("images", "adapter"), made=("model", "output"))
    if args.with_base and not (args.ckpt or args.adapter):
        problems.append("--with-base: needs --ckpt or --adapter")
    if args.ckpt and args.adapter:
        problems.append("--adapter: not with --ckpt, which names an adapter too")
    if args.closed_set and not args.ckpt:
        problems.append("--closed-set: needs --ckpt, whose run names the training rows")
    if args.image and args.question is None:
        problems.append("--image: needs --question")
    if args.question is not None:
        flags = [f"--{name.replace('_', '-')}" for name in NOT_WITH_QUESTION if getattr(args, name)]
        problems += [f"{flag}: not with --question, which answers one question and writes nothing" for flag in flags]
        pictures = list(filter(os.path.isfile, args.image))
        checks = dict(zip(pictures, check_files(pictures, decode=True), strict=True))
        problems += [f"--image: {path}: {reason}" for path, reason in checks.items() if isinstance(reason, str)]
    refuse(problems)
    return args
