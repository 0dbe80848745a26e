"""Settings of checkpoints that another version of this program wrote: the one place that knows how versions differ."""

import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from common import quote
from inputs.images import ImageSettings
from training.settings import build_parser

ADDED = {"image_settings"}  # to the settings in state.pt, beside the flags
# Raised with every change to which trees form a step, or to the place that a dropout mask is drawn from. 1, which no
# checkpoint names: steps were packed before ranks shared them, and masks drawn for each micro-batch.
PLAN_VERSION = 2


def flag_defaults() -> dict:
    """The default of every flag. It is what runs did before the flag existed: a new flag has to see to that. Where a
    default is changed later, older checkpoints name the old one themselves."""
    return {action.dest: action.default for action in build_parser()._actions if action.dest != "help"}


def image_defaults() -> dict:
    return {field.name: field.default for field in fields(ImageSettings) if field.default is not MISSING}


def with_defaults(settings: dict) -> dict:
    """A run's settings from state.pt, with the default of each that did not exist then. Raises TypeError or KeyError
    when they are no settings."""
    known = {field.name for field in fields(ImageSettings)}
    images = {name: value for name, value in settings["image_settings"].items() if name in known}
    images = asdict(ImageSettings(**(image_defaults() | images)))
    return flag_defaults() | settings | {"image_settings": images}


def unknown_settings(settings: dict) -> list[str]:
    """Settings of a newer version that this one does not know, unless they are off: lines for a message."""
    known = {field.name for field in fields(ImageSettings)}
    found = {name: value for name, value in settings.items() if name not in flag_defaults().keys() | ADDED}
    found |= {f"image {name}": value for name, value in settings["image_settings"].items() if name not in known}
    return [f"{name} = {quote(value)}" for name, value in found.items() if value]


def plan_difference(folder: Path, before: dict) -> str:
    """Why no run can go on from a checkpoint whose identity is `before`; empty where its version planned as this one
    does."""
    if before.get("plan version") == PLAN_VERSION:
        return ""
    return (
        f"{folder} can't be resumed: another version began its run, which forms steps of other trees and draws other "
        "dropout masks. Finish it with that version, or start a new run from its weights: another --output and "
        f"--init-from {folder}. eval.py and merge.py take it as before"
    )


def setting_differences(before: dict, now: dict) -> list[str]:
    """Why a run whose identity is `now` can't go on from a checkpoint whose identity is `before`: lines for a message.

    What `before` does not know counts as its default. What `now` does not know counts as off, unless it has a value.
    """
    defaults = flag_defaults() | {f"image {name}": value for name, value in image_defaults().items()}
    now, defaults = json.loads(json.dumps([now, defaults]))  # tuples become lists, as in the file
    before = defaults | before
    lines = [
        f"{name}: was {quote(before.get(name))}, is now {quote(now[name])}"
        for name in now
        if before.get(name) != now[name]
    ]
    # A run that is resumed may lack the adapter that it started from, and so "first weights".
    unknown = before.keys() - now.keys() - defaults.keys() - {"first weights"}
    lines += [f"{name} = {quote(before[name])}: only a newer version knows it" for name in unknown if before[name]]
    return sorted(lines)
