"""Settings of a training run: the command line, a settings file below it, and the check of both at once."""

import argparse
import json
import math
import os
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from common import InputError, is_rank0, is_text, printable, quote
from modeling.precision import PRECISIONS
from modeling.targets import AUTO
from training.gpus import GPUS

DEFAULT_MODEL = "Qwen/Qwen3-VL-8B-Instruct"
# Settings that may differ in a resumed run: they don't change what it learns.
FREE_SETTINGS = {"config", "output", "resume", "train", "val", "images", "model", "workers", "log_every", "eval_every"}
FREE_SETTINGS |= {"save_every", "keep", "compile", "memory_budget", "skip_bad", "allow_outside_images", "patience"}
FREE_SETTINGS |= {"plan", "gpu", "time_limit", "tensorboard", "wandb", "vision_cache", "max_tokens"}
FREE_SETTINGS |= {"init_from"}  # the identity has a hash of its weights
WERE_SWITCHES = {"compile"}  # true or false in settings files of older versions
DEMO = """No --train given: this is the demo. It downloads nothing and takes minutes on a CPU.
It draws images with questions about them and trains a tiny Qwen3-VL on most of them.
The others are answered before and after training, and a table compares both.
PyTorch is imported first, which takes some seconds."""


class Wrong(str):
    """What is wrong with a value. It stands in the value's place until all problems can be reported together."""


def number(kind: type, low: float, high: float = math.inf, over: bool = False):
    """A function that reads a number from `low` to `high`, or one that is `over` low. It returns Wrong for others."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            return Wrong(f"{quote(text)} is not {'a whole number' if kind is int else 'a number'}")
        if kind is float and not math.isfinite(value):
            return Wrong(f"{quote(text)} is not a finite number")
        bounds = f"over {low}" if over else f"at least {low}" if high == math.inf else f"from {low} to {high}"
        fits = low <= value <= high and not (over and value == low)
        return value if fits else Wrong(f"must be {bounds}, not {text}")

    return convert


def choice(*names: str):
    def convert(text: str):
        return text if text in names else Wrong(f"{quote(text)} is none of {', '.join(names)}{nearest(text, names)}")

    return convert


def nearest(word: str, names: Iterable[str]) -> str:
    """A question after the name that a misspelt word may stand for, to end a message with; empty where none is near."""
    plain = word.lower().replace("_", "-").strip("-–—")  # a text editor may have made one dash of two
    by_plain = {name.lstrip("-"): name for name in names}
    begun = [name for name in by_plain if plain and name.startswith(plain)]
    close = begun if len(begun) == 1 else get_close_matches(plain, by_plain)  # the nearest one first
    close.sort(key=lambda name: name.split("-")[0] != plain.split("-")[0])  # eval-steps: eval-every, not max-steps
    return f"; did you mean {by_plain[close[0]]}?" if close else ""


def path_problem(path: str, is_folder: bool) -> str:
    """Why a path can't be used as a folder, or as a file; empty where it can."""
    if not os.path.exists(path):
        return f"{path} does not exist"
    if is_folder:
        return "" if os.path.isdir(path) else f"{path} is no folder"
    return "" if os.path.isfile(path) else f"{path} is {'a folder, no' if os.path.isdir(path) else 'no ordinary'} file"


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit: other problems are reported along with it."""

    def error(self, message: str):
        raise InputError(message.removeprefix("argument "))

    def print_help(self, file=None):
        if is_rank0():
            super().print_help(file)


def _budget(text: str):
    value = text if text == "auto" else number(float, 0, 1)(text)
    return Wrong(f"must be auto or a number from 0 to 1, not {quote(text)}") if isinstance(value, Wrong) else value


def _targets(text: str):
    for part in text.split(","):
        try:
            re.compile(f"({part})")  # as `target_pattern` has it
        except re.error as error:
            return Wrong(f"{quote(part)} is not a regular expression: {error}")
    return text if all(text.split(",")) else Wrong(f"{quote(text)} has an empty part")


def template(text: str):
    return text if text.count("{question}") == 1 else Wrong(f"{quote(text)} must hold {{question}}, once")


def path_problems(args: argparse.Namespace, files: Iterable = (), folders: Iterable = (), made: Iterable = ()):
    """What is wrong with the paths of these settings, where they are given. Folders of `made` need not exist: the
    program makes them, or they are names on the hub."""
    problems = []
    for name in (*files, *folders, *made):
        value = getattr(args, name) or []
        for path in [value] if isinstance(value, str) else value:
            problem, exists = path_problem(path, is_folder=name not in files), os.path.exists(path)
            hint = nearest(path, ("none", "auto")) if name == "resume" and not exists else ""
            is_home = path.startswith("~") and not exists  # a folder of that name would be made in this one
            if is_home:
                problem = f"{path}: a shell expands ~ only where a word begins: write the folder out"
            if problem and (name not in made or exists or is_home):
                problems.append(f"--{name.replace('_', '-')}: {problem}{hint}")
    return problems


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "train.py",
        description="Fine-tune Qwen-VL with LoRA on visual question answering. Without --train: the embedded demo.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, positive, share = number(int, 0), number(int, 1), number(float, 0, 1)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--train", nargs="+", default=[], metavar="FILE",
        help="rows to train on, JSON lines, JSON arrays, CSV or TSV; empty: the embedded demo")  # fmt: skip
    add("--train-weights", nargs="+", type=number(float, 0.001), default=[], metavar="W",
        help="how often an epoch asks the questions of each file of --train (0.5: half); empty: once")  # fmt: skip
    add("--val", default="", help="rows to evaluate on during training; empty: none")
    add("--val-fraction", type=share, default=0.0,
        help="share of the images to hold out from --train, with all their rows, and evaluate on; 0: none")  # fmt: skip
    add("--images", default="",
        help="folder that image names start from; empty: the folder of --train (of its first file)")  # fmt: skip
    add("--min-pixels", type=count, default=0, help="fewest pixels of an image after resizing; 0: the model's own")
    add("--max-pixels", type=count, default=0, help="most pixels of an image after resizing; 0: the model's own")
    add("--system", default="", help="system prompt of rows that have none; empty: none")
    add("--prompt", type=template, default="{question}",
        help="text of a user turn, with {question} for the row's text; {question}: that text alone")  # fmt: skip
    add("--image-first", action=switch, default=False,
        help="move images before the text of their user turn, so that all questions about them share them")  # fmt: skip
    add("--skip-bad", action=switch, default=False, help="go on without rows that can't be used")
    add("--allow-outside-images", action=switch, default=False, help="allow images outside --images")
    add("--workers", type=count, default=4, help="processes per rank that decode images; 0: the training process does")
    add("--vision-cache", default="", metavar="DIR",
        help="folder that keeps the vision tower's features from epoch to epoch; empty: none")  # fmt: skip
    add = parser.add_argument_group("model").add_argument
    add("--model", default=DEFAULT_MODEL, help="hub name or folder: Qwen3.5, Qwen3-VL, Qwen2.5-VL or Qwen2-VL")
    add("--dtype", type=choice("auto", "bfloat16", "float32"), default="auto",
        help="precision of the frozen weights and of autocast; auto: bfloat16 on CUDA, float32 elsewhere")  # fmt: skip
    add("--base-precision", type=choice(*PRECISIONS), default="bf16",
        help="numbers of the frozen language model's linear layers; bf16: as --dtype says; fp8-backward and fp8: "
        "FP8 products, on Hopper GPUs; fp8-weights: kept in FP8, which halves their memory")  # fmt: skip
    add("--compile", type=choice("auto", "on", "off"), default="auto",
        help="compile layers on CUDA: faster, and less memory; auto: where that saves more time than it takes, or "
        "memory does not suffice otherwise")  # fmt: skip
    add("--memory-budget", type=_budget, default="auto", help="share of activations kept, 0 to 1; auto: what fits")
    add("--lora-r", type=positive, default=16, help="rank of the LoRA matrices")
    add("--lora-alpha", type=number(float, 0, over=True), default=32.0, help="LoRA output is scaled by alpha / r")
    add("--rslora", action=switch, default=False, help="scale by alpha / sqrt(r) (rsLoRA)")
    add("--dora", action=switch, default=False,
        help="train magnitudes of weights too (DoRA), by PEFT's code, not compiled: slower, more memory")  # fmt: skip
    add("--lora-targets", type=_targets, default=AUTO,
        help="language-model layers, by name or regular expression; vision, merger: the vision tower's; "
        "auto: attention and MLP")  # fmt: skip
    add("--init-from", default="", help="adapter folder with the weights that LoRA starts from; empty: new ones")
    add("--lora-dropout", type=number(float, 0, 0.99), default=0.05, help="dropout before LoRA; 0: none")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=3, help="passes over the questions")
    add("--batch-size", type=positive, default=96, help="questions per optimizer step, over all GPUs")
    add(
        "--questions-per-image",
        type=count,
        default=0,
        help="most branches of a tree; 0: all questions of its image, 1: no sharing",
    )
    add("--max-tokens", type=positive, default=8192, help="most tokens of a micro-batch; bounds memory")
    add("--lr", type=number(float, 0, over=True), default=1e-4, help="peak learning rate")
    add("--schedule", type=choice("cosine", "linear", "constant"), default="cosine", help="learning rate after warm-up")
    add("--warmup", type=number(float, 0), default=0.03, help="steps, or below 1 a share of all steps; 0: none")
    add("--weight-decay", type=number(float, 0), default=0.0, help="weight decay of AdamW; 0: none")
    add(
        "--max-grad-norm", type=number(float, 0), default=1.0, help="norm that gradients are clipped to; 0: no clipping"
    )
    add("--seed", type=count, default=0, help="seed of the LoRA weights, the order of questions and dropout")
    add("--max-steps", type=count, default=0, help="optimizer steps after which the run ends; 0: all epochs")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="", help="folder of the run; empty: the next free runs/NAME-N")
    add("--eval-every", type=count, default=200, help="steps between evaluations; 0: only at the end")
    add("--patience", type=count, default=0,
        help="end the run after so many evaluations in a row without a new best; 0: never")  # fmt: skip
    add("--save-every", type=count, default=200, help="steps between checkpoints; 0: only at the end")
    add("--keep", type=positive, default=3, help="newest checkpoints to keep, besides the best one")
    add("--resume", default="none", help="none, auto (newest checkpoint in --output) or a checkpoint folder")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add("--tensorboard", action=switch, default=False, help="write the same numbers to OUTPUT/tensorboard")
    add("--wandb", default="", help="Weights & Biases project that gets the same numbers; empty: none")
    add = parser.add_argument_group("plan").add_argument
    add("--plan", action=switch, default=False,
        help="print the run's steps, time and memory, and exit; needs no GPU and no weights")  # fmt: skip
    add("--gpu", type=choice(*GPUS), default="h100",
        help="GPU that --plan plans for")  # fmt: skip
    add("--time-limit", type=number(float, 0), default=0.0, help="hours that --plan checks the run against; 0: none")
    parser.add_argument("--config", default="", help="TOML file of settings by these names; the command line overrides")
    return parser


def answer_early(parse: Callable[[list[str]], argparse.Namespace]) -> argparse.Namespace | None:
    """Parse the command line before slow imports: rank 0 answers --help and wrong settings at once, and exits.
    Returns the settings on rank 0, and None on the others.

    Until the program watches signals, Ctrl-C ends it without a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if is_rank0():  # torchrun ends the others with it
        try:
            return parse(sys.argv[1:])
        except InputError as error:
            print(printable(f"error: {error}"))
            sys.exit(2)
    return None


def announce_demo(args: argparse.Namespace | None) -> None:
    """Say what a run without --train does, before slow imports. `args`: what `answer_early` returned."""
    if args and not args.train and not args.plan:
        print(DEMO, flush=True)


def parse_settings(argv: list[str], defaults: dict | None = None) -> argparse.Namespace:
    """Settings from the command line, over the --config file, over `defaults`. Raises InputError with all problems."""
    parser, peek = build_parser(), argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", nargs="?", default="")
    config = peek.parse_known_args(argv)[0].config
    from_file, problems = _read_toml(config) if config else ({}, [])
    for values in (defaults or {}, from_file):
        problems += _set_defaults(parser, values, config)
    settings, wrong = parse_words(parser, argv)
    problems += wrong
    for flag in (action.option_strings[0] for action in parser._actions if action.nargs == "+"):
        if sum(word.partition("=")[0] == flag for word in argv) > 1:
            problems.append(f"{flag}: given twice; name everything behind one {flag}")
    if settings:
        problems += _check_packages(settings)
        problems += _check_paths(settings) if settings.train else []
        problems += _check_moved(settings, config, from_file)
    refuse(problems)
    return settings


def _read_toml(config: str) -> tuple[dict, list[str]]:
    """A settings file's values, and what is wrong with the file."""
    if problem := path_problem(config, is_folder=False):
        return {}, [f"--config: {problem}"]
    try:
        return tomllib.loads(Path(config).read_text(encoding="utf-8-sig")), []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return {}, [f"--config {config}: {error}"]


def _set_defaults(parser: Parser, values: dict, config: str) -> list[str]:
    """Make values the defaults of their flags, which the command line overrides. Returns what is wrong with them.

    argparse converts a default that is text as if it stood on the command line; elements of a list it leaves alone.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    problems, spelled = [], {}
    for name, value in values.items():
        if (first := spelled.setdefault(name.replace("-", "_"), name)) != name:
            problems.append(f"--config {config}: {first} and {name} are the same setting: leave one of them out")
        action = actions.get(name.replace("-", "_"))
        if name in WERE_SWITCHES and isinstance(value, bool):
            value = "on" if value else "off"
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        takes_list = action is not None and action.nargs == "+"
        is_list = isinstance(value, list) and takes_list
        elements = value if is_list else [value]
        unreadable = bool | dict | list if is_list else dict | list
        if action is None or any(isinstance(element, unreadable) for element in elements):
            known = [] if action else [known.replace("_", "-") for known in actions]
            problems.append(f"--config {config}: no setting {name} = {quote(value)}{nearest(name, known)}")
        elif is_switch != isinstance(value, bool):
            kind = "true or false" if is_switch else "a value, not true or false"
            problems.append(f"--config {config}: {name} = {quote(value)}: must be {kind}")
        elif is_switch:
            parser.set_defaults(**{action.dest: value})
        elif not takes_list:
            parser.set_defaults(**{action.dest: str(value)})
        elif elements:
            parser.set_defaults(**{action.dest: [(action.type or str)(str(element)) for element in elements]})
    return problems


def parse_words(parser: Parser, words: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Settings, and all that is wrong with them. None in their place where argparse can't go on."""
    flags = parser._option_string_actions
    try:
        settings, unknown = parser.parse_known_args(words)
    except InputError as error:  # a flag without its value, or a misspelt one that is needed
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in flags]
        return None, [*_unknown(unknown, flags), str(error)]
    problems = _unknown(unknown, flags)
    for name, value in vars(settings).items():
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, Wrong):
                problems.append(f"--{name.replace('_', '-')}: {element}")
            elif isinstance(element, str) and not is_text(element):
                problems.append(f"--{name.replace('_', '-')}: {ascii(element)} holds bytes that are not UTF-8")
    return settings, problems


def _unknown(words: list[str], flags: Iterable[str]) -> list[str]:
    """What is wrong with words that argparse did not take. The values of an unknown flag are not named beside it."""
    problems, takes_values = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        if word.startswith(("-", "–", "—")):
            problems.append(f"{flag}: no such flag{nearest(flag, flags)}")
            takes_values = not equals
        elif not takes_values:
            problems.append(f"{quote(word)} belongs to no flag")
    return problems


def refuse(problems: list[str]) -> None:
    if problems:
        raise InputError("wrong settings:\n" + "\n".join(f"  {problem}" for problem in problems))


def _check_packages(settings: argparse.Namespace) -> list[str]:
    specs = {name: find_spec(name) for name in ("tensorboard", "wandb") if getattr(settings, name)}
    missing = [name for name, spec in specs.items() if not (spec and spec.origin)]  # a folder wandb/ has no origin
    return [f"--{name}: not installed here: pip install {name}" for name in missing]


def _check_paths(settings: argparse.Namespace) -> list[str]:
    """Make paths absolute, so that they mean the same wherever settings.toml is read. Returns what is wrong with them,
    and with flags that need or exclude each other."""
    settings.images = settings.images or str(Path(settings.train[0]).parent)
    needed = ["images"] + ["resume"] * (settings.resume not in ("none", "auto"))
    needed += ["init_from"] * (settings.resume == "none")
    problems = path_problems(settings, ("train", "val"), needed, ("model", "output", "vision_cache"))
    for name in ("train", "val", "images"):
        value = getattr(settings, name)
        paths = value if isinstance(value, list) else [value] if value else []
        absolute = [_absolute(path, problems) for path in paths]
        setattr(settings, name, absolute if isinstance(value, list) else "".join(absolute))
    problems += _check_combinations(settings)  # they name paths as the user wrote them
    for name in ("model", "resume", "init_from", "vision_cache"):
        value = getattr(settings, name)
        is_path = Path(value).is_dir() if name == "model" else value not in ("", "none", "auto")
        if is_path:
            setattr(settings, name, _absolute(value, problems))
    return problems


def _absolute(path: str, problems: list[str]) -> str:
    """The path with its folders' links followed. A file keeps its name: the hub's cache links names to hashes."""
    linked = Path(path)
    absolute = str(linked.parent.resolve() / linked.name if os.path.isfile(path) else linked.resolve())
    if is_text(path) and not is_text(absolute):
        problems.append(f"{path} lies in {ascii(absolute)}, whose name holds bytes that are not UTF-8")
    return absolute


def _check_combinations(settings: argparse.Namespace) -> list[str]:
    files, weights = len(settings.train), len(settings.train_weights)
    low, high, resume = settings.min_pixels, settings.max_pixels, settings.resume
    adapter = Path(settings.init_from) / "adapter_model.safetensors"
    checks = {
        f"--train-weights: {weights} for {files} files of --train": weights not in (0, files),
        f"--init-from: {settings.init_from} holds no adapter_model.safetensors": (
            settings.resume == "none" and Path(settings.init_from or "-").is_dir() and not adapter.is_file()
        ),
        f"--resume: {resume} is a run, not one of its checkpoints; --output {resume} --resume auto goes on with it": (
            any(Path(resume).glob("checkpoint-*/state.pt"))
        ),
        "--resume auto: say where with --output": settings.resume == "auto" and not settings.output,
        f"--base-precision {settings.base_precision}: --dora needs the weights in bf16": (
            settings.dora and settings.base_precision != "bf16"
        ),
        "--val-fraction: --val names rows to evaluate on already": settings.val and settings.val_fraction,
        "--patience: there is nothing to evaluate on, give --val or --val-fraction": (
            settings.patience and not (settings.val or settings.val_fraction)
        ),
        f"--min-pixels {low} is over --max-pixels {high}": (
            isinstance(low, int) and isinstance(high, int) and high and low > high  # not where one of them is Wrong
        ),
    }
    return [problem for problem, is_wrong in checks.items() if is_wrong]


def _check_moved(settings: argparse.Namespace, config: str, from_file: dict) -> list[str]:
    """A run's folder that was moved still names its old place in settings.toml: resuming there would start anew."""
    output = settings.output
    if settings.resume != "auto" or not output or output != from_file.get("output") or Path(output).exists():
        return []
    folder = Path(config).parent
    if not any(folder.glob("checkpoint-*")):
        return []
    return [f"--resume auto: {output} is gone, the run lies in {folder}: --output {folder}"]


def lora_arguments(args: argparse.Namespace) -> dict:
    """Keyword arguments of modeling.lora.add_lora."""
    names = {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_targets"}
    names |= {"rslora": "rslora", "dora": "dora"}
    return {argument: getattr(args, name) for argument, name in names.items()}


def count_steps(args: argparse.Namespace, steps_per_epoch: int, epochs: int) -> int:
    """Optimizer steps of a run of so many epochs."""
    return min(epochs * steps_per_epoch, args.max_steps or epochs * steps_per_epoch)


def count_epochs(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Epochs that are begun: --max-steps may end the run before the last."""
    return math.ceil(count_steps(args, steps_per_epoch, args.epochs) / steps_per_epoch)


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether an evaluation or a save follows step `step` of `steps`, from 1: every so many steps, and at the end."""
    return step == steps or (every > 0 and step % every == 0)


def to_toml(settings: argparse.Namespace) -> str:
    """The settings as a file that --config reads, without --resume, which every start is asked for anew. JSON's
    strings, numbers and booleans are TOML's too, except that TOML wants DEL escaped."""
    items = {name: value for name, value in vars(settings).items() if name not in ("config", "resume")}
    lines = (f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in items.items())
    return "".join(lines).replace("\x7f", "\\u007f")
