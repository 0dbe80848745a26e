"""Settings of a training run: the command line, a settings file below it, and the check of both at once."""

import argparse
import json
import math
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

from common import InputError
from modeling.targets import DEFAULT_TARGETS
from training.gpus import GPUS

DEFAULT_MODEL = "Qwen/Qwen3-VL-8B-Instruct"
# what may differ in a resumed run without changing what it learns
FREE_SETTINGS = {"config", "output", "resume", "train", "val", "images", "model", "workers", "log_every", "eval_every"}
FREE_SETTINGS |= {"save_every", "keep", "compile", "memory_budget", "skip_bad", "allow_outside_images", "patience"}
FREE_SETTINGS |= {"plan", "gpu", "time_limit", "tensorboard", "wandb", "vision_cache"}
FREE_SETTINGS |= {"init_from"}  # its weights are told by their fingerprint


class Wrong(str):
    """What is wrong with a value. Kept in the value's place until all problems can be told together."""


def number(kind: type, low: float, high: float = math.inf):
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            return Wrong(f"{text!r} is not {'a whole number' if kind is int else 'a number'}")
        return value if low <= value <= high and value != math.inf else Wrong(f"{text} is not between {low} and {high}")

    return convert


def choice(*names: str):
    return lambda text: text if text in names else Wrong(f"{text!r} is none of {', '.join(names)}")


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit, so that the other problems are told too."""

    def error(self, message: str):
        raise InputError(message.removeprefix("argument "))


def _budget(text: str):
    return text if text == "auto" else number(float, 0, 1)(text)


def _targets(text: str):
    for part in text.split(","):
        try:
            re.compile(f"({part})")  # as `target_pattern` has it
        except re.error as error:
            return Wrong(f"{part!r} is no regular expression: {error}")
    return text if all(text.split(",")) else Wrong(f"{text!r} has an empty part")


def _template(text: str):
    return text if text.count("{question}") == 1 else Wrong(f"{text!r} must hold {{question}}, once")


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
        help="rows to train on, JSON arrays or JSON lines; empty: the embedded demo")  # fmt: skip
    add("--train-weights", nargs="+", type=number(float, 0.001), default=[], metavar="W",
        help="for each file of --train, how often an epoch asks its questions, 0.5: half; empty: once")  # fmt: skip
    add("--val", default="", help="rows to evaluate on during training; empty: none")
    add("--val-fraction", type=share, default=0.0,
        help="share of the images of --train held out to evaluate on, with all their rows; 0: none")  # fmt: skip
    add("--images", default="",
        help="folder that image names start from; empty: the folder of --train (of its first file)")  # fmt: skip
    add("--min-pixels", type=count, default=0, help="pixels of an image at least, after resizing; 0: the model's own")
    add("--max-pixels", type=count, default=0, help="pixels of an image at most, after resizing; 0: the model's own")
    add("--system", default="", help="system prompt of rows that have none; empty: none")
    add("--prompt", type=_template, default="{question}",
        help="text of a user's turn, {question} being the row's; {question} alone: the row's as it is")  # fmt: skip
    add("--skip-bad", action=switch, default=False, help="go on without rows that can't be used")
    add("--allow-outside-images", action=switch, default=False, help="images outside --images")
    add("--workers", type=count, default=4, help="processes a rank that decode images; 0: in the training process")
    add("--vision-cache", default="", metavar="DIR",
        help="folder that keeps the vision tower's features from epoch to epoch; empty: none")  # fmt: skip
    add = parser.add_argument_group("model").add_argument
    add("--model", default=DEFAULT_MODEL, help="hub name or folder: Qwen3-VL, Qwen2.5-VL or Qwen2-VL")
    add("--dtype", type=choice("auto", "bfloat16", "float32"), default="auto",
        help="of the frozen weights and of autocast; auto: bfloat16 on CUDA, float32 elsewhere")  # fmt: skip
    add("--compile", action=switch, default=True, help="compile layers on CUDA: faster, leaner")
    add("--memory-budget", type=_budget, default="auto", help="share of activations kept, 0 to 1; auto: what fits")
    add("--lora-r", type=positive, default=16, help="rank of the LoRA matrices")
    add("--lora-alpha", type=number(float, 0), default=32.0, help="LoRA output is scaled by alpha / r")
    add("--rslora", action=switch, default=False, help="scale by alpha / sqrt(r) (rsLoRA)")
    add("--dora", action=switch, default=False,
        help="train magnitudes of weights too (DoRA), by PEFT's code, not compiled: slower, more memory")  # fmt: skip
    add("--lora-targets", type=_targets, default=DEFAULT_TARGETS,
        help="language-model layers, by name or regular expression; vision, merger: the vision tower's")  # fmt: skip
    add("--init-from", default="", help="adapter folder whose weights LoRA starts from, at step 0; empty: new ones")
    add("--lora-dropout", type=share, default=0.05, help="dropout before LoRA; 0: none")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=3, help="passes over the questions")
    add("--batch-size", type=positive, default=96, help="questions an optimizer step, over all GPUs")
    add("--questions-per-image", type=count, default=0, help="branches a tree at most; 0: all, 1: no sharing")
    add("--max-tokens", type=positive, default=8192, help="tokens a micro-batch at most; bounds memory")
    add("--lr", type=number(float, 0), default=1e-4, help="peak learning rate")
    add("--schedule", type=choice("cosine", "linear", "constant"), default="cosine", help="learning rate after warm-up")
    add("--warmup", type=number(float, 0), default=0.03, help="steps, or below 1 a share of all steps; 0: none")
    add("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's; 0: none")
    add("--max-grad-norm", type=number(float, 0), default=1.0, help="gradient clipping; 0: none")
    add("--seed", type=count, default=0, help="of the LoRA weights, the order and dropout")
    add("--max-steps", type=count, default=0, help="optimizer steps at most; 0: all epochs")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="", help="folder of the run; empty: the next free runs/NAME-N")
    add("--eval-every", type=count, default=200, help="steps between evaluations; 0: only at the end")
    add("--patience", type=count, default=0,
        help="evaluations in a row, none of them the best so far, that end the run; 0: none")  # fmt: skip
    add("--save-every", type=count, default=200, help="steps between checkpoints; 0: only at the end")
    add("--keep", type=positive, default=3, help="newest checkpoints kept, besides the best one")
    add("--resume", default="none", help="none, auto (newest checkpoint in --output) or a checkpoint folder")
    add("--log-every", type=positive, default=10, help="steps between lines of metrics.jsonl")
    add("--tensorboard", action=switch, default=False, help="write the same numbers to OUTPUT/tensorboard")
    add("--wandb", default="", help="Weights & Biases project that gets the same numbers; empty: none")
    add = parser.add_argument_group("plan").add_argument
    add("--plan", action=switch, default=False,
        help="print what the run would do, take and need, and exit; needs no GPU and no weights")  # fmt: skip
    add("--gpu", type=choice(*GPUS), default="h100",
        help="GPU that --plan plans for")  # fmt: skip
    add("--time-limit", type=number(float, 0), default=0.0, help="hours that --plan compares the run to; 0: none")
    parser.add_argument("--config", default="", help="TOML file of settings by these names; the command line overrides")
    return parser


def parse_settings(argv: list[str], defaults: dict | None = None) -> argparse.Namespace:
    """Settings from `defaults`, below the --config file, below the command line. Raises InputError of all problems."""
    parser = build_parser()
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", nargs="?", default="")
    config, problems = peek.parse_known_args(argv)[0].config, []
    from_file = {}
    if config:
        try:
            from_file = tomllib.loads(Path(config).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            problems.append(f"--config {config}: {error}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    below = []
    for name, value in [*(defaults or {}).items(), *from_file.items()]:
        action = actions.get(name.replace("-", "_"))
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        is_list = isinstance(value, list) and action is not None and action.nargs == "+"
        if is_list and not any(isinstance(one, bool | dict | list) for one in value):
            below += [action.option_strings[0], *map(str, value)] if value else []
        elif action is None or isinstance(value, dict | list):
            problems.append(f"--config {config}: no setting {name} = {value!r}")
        elif is_switch != isinstance(value, bool):
            kind = "true or false" if is_switch else "a value, not true or false"
            problems.append(f"--config {config}: {name} = {value!r}: must be {kind}")
        elif is_switch:
            below.append(action.option_strings[0 if value else 1])  # --name, --no-name
        else:
            below.append(f"{action.option_strings[0]}={value}")
    settings, wrong = parse_words(parser, below + argv)
    problems += wrong
    for flag in (action.option_strings[0] for action in actions.values() if action.nargs == "+"):
        if sum(word.partition("=")[0] == flag for word in argv) > 1:
            problems.append(f"{flag}: given twice; name everything behind one {flag}")
    problems += _check_packages(settings) if settings else []
    if settings and settings.train:
        problems += _check_paths(settings)
    if settings and settings.resume == "auto" and settings.output and settings.output == from_file.get("output"):
        folder = Path(config).parent
        if not Path(settings.output).exists() and any(folder.glob("checkpoint-*")):
            problems.append(f"--resume auto: {settings.output} is gone, the run lies in {folder}: --output {folder}")
    refuse(problems)
    return settings


def parse_words(parser: Parser, words: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Settings and all that is wrong with them; None where argparse can't go on."""
    try:
        settings, unknown = parser.parse_known_args(words)
    except InputError as error:  # a flag without its value
        return None, [str(error)]
    problems = [f"{word}: no such flag" for word in unknown]
    for name, value in vars(settings).items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Wrong):
                problems.append(f"--{name.replace('_', '-')}: {one}")
    return settings, problems


def refuse(problems: list[str]) -> None:
    if problems:
        raise InputError("wrong settings:\n" + "\n".join(f"  {problem}" for problem in problems))


def _check_packages(settings: argparse.Namespace) -> list[str]:
    specs = {name: find_spec(name) for name in ("tensorboard", "wandb") if getattr(settings, name)}
    missing = [name for name, spec in specs.items() if not (spec and spec.origin)]  # a folder wandb/ has no origin
    return [f"--{name}: not installed here: pip install {name}" for name in missing]


def _check_paths(settings: argparse.Namespace) -> list[str]:
    problems = []
    settings.images = settings.images or str(Path(settings.train[0]).parent)
    for name in ("train", "val", "images"):
        value = getattr(settings, name)
        paths = value if isinstance(value, list) else [value] if value else []
        exists = Path.is_dir if name == "images" else Path.is_file
        problems += [f"--{name}: {path} does not exist" for path in paths if not exists(Path(path))]
        whole = [str(Path(path).resolve()) for path in paths]
        setattr(settings, name, whole if isinstance(value, list) else "".join(whole))
    files, weights = len(settings.train), len(settings.train_weights)
    if weights not in (0, files):
        problems.append(f"--train-weights: {weights} for {files} files of --train")
    if settings.init_from:
        there = (Path(settings.init_from) / "adapter_model.safetensors").is_file()
        if not there and settings.resume == "none":
            problems.append(f"--init-from: {settings.init_from} holds no adapter_model.safetensors")
    if settings.resume == "auto" and not settings.output:
        problems.append("--resume auto: say where with --output")
    if settings.resume not in ("none", "auto") and not Path(settings.resume).is_dir():
        problems.append(f"--resume: {settings.resume} is not a folder")
    if settings.val and settings.val_fraction:
        problems.append("--val-fraction: --val names rows to evaluate on already")
    if settings.patience and not (settings.val or settings.val_fraction):
        problems.append("--patience: there is nothing to evaluate on, give --val or --val-fraction")
    low, high = settings.min_pixels, settings.max_pixels
    if isinstance(low, int) and isinstance(high, int) and high and low > high:
        problems.append(f"--min-pixels {low} is over --max-pixels {high}")
    for name in ("model", "resume", "init_from", "vision_cache"):  # the same folder from wherever they are read
        value = getattr(settings, name)
        if Path(value).is_dir() if name == "model" else value not in ("", "none", "auto"):
            setattr(settings, name, str(Path(value).resolve()))
    return problems


def lora_arguments(args: argparse.Namespace) -> dict:
    """Keyword arguments of modeling.lora.add_lora."""
    how = {"r": args.lora_r, "alpha": args.lora_alpha, "dropout": args.lora_dropout, "targets": args.lora_targets}
    return how | {"rslora": args.rslora, "dora": args.dora}


def count_steps(args: argparse.Namespace, an_epoch: int, epochs: int) -> int:
    return min(epochs * an_epoch, args.max_steps or epochs * an_epoch)


def count_epochs(args, an_epoch: int) -> int:
    """Epochs that are begun: --max-steps may end the run before the last."""
    return math.ceil(count_steps(args, an_epoch, args.epochs) / an_epoch)


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether an evaluation or a checkpoint follows step `step` of `steps`, from 1: every so many, and at the end."""
    return step == steps or (every > 0 and step % every == 0)


def to_toml(settings: argparse.Namespace) -> str:
    """The settings as a file that --config reads: JSON's strings, numbers and booleans are TOML's too, but for the
    characters that only one of them wants escaped."""
    items = {name: value for name, value in vars(settings).items() if name != "config"}
    lines = (f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in items.items())
    return "".join(lines).replace("\x7f", "\\u007f")
