"""Export a data set of the hub, with its pictures inside, to the pictures and rows that train.py reads.

    python -m inputs.hub kvasir-vqa --out data/kvasir-vqa
    python -m inputs.hub NAME --out DIR --map question=query answer=label image=image

The package `datasets` streams it, so that neither rows nor pictures are ever in memory together. The data sets that are
known by a short name, and their columns, are in hub_sets.py; docs/data-sets.md describes what is written.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from common import PARTIAL, InputError, printable, replacing, writing
from inputs.album import Album, is_absent, usable
from inputs.fields import Fields
from inputs.hub_sets import SETS, HubSet, find_set, load_splits, pictures_set, read_values, reading
from inputs.options import take_options
from inputs.rows import BadRow, parse_row

READ_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
)  # of `datasets`: network, names, files, and scripts that it does not run
# Names of splits, and the files that their rows go to. A split of another name keeps it.
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


@dataclass
class Exported:
    """What was written of a data set. Lists have an element for each row, in the order in which they were read."""

    splits: list[str] = field(default_factory=list)
    pictures: list[tuple[str, ...]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # names without .jsonl
    bad: list[BadRow] = field(default_factory=list)  # rows that were left out, at SPLIT:NUMBER, counted from 0
    divided: str = ""  # how rows were divided by picture; empty: as the data set has them


# ---------------------------------------------------------------------------------------------------------------- rows


def make_row(values: dict, album: Album, has_pictures: bool) -> dict:
    """A row as docs/rows.md has it. `has_pictures`: the data set's own; otherwise the album has them by their ids.

    Raises ValueError for a picture and for options that can't be used.
    """
    values = dict(values)
    picture, picture_id = values.pop("image", None), values.pop("picture_id", None)
    pictures = picture if isinstance(picture, list) else [] if is_absent(picture) else [picture]
    if has_pictures:
        images = [album.add(each, picture_id) for each in pictures]
    elif picture_id in album.by_id:
        images = [usable(album.by_id[picture_id])]
    else:
        raise ValueError(f"there is no picture of the id {picture_id!r}")
    row = {"image": images[0] if len(images) == 1 else images, "img_id": picture_id, **values}
    row = {name: value for name, value in row.items() if value is not None and value != []}
    hint, options = row.pop("hint", None), take_options(Fields(row)) or {}
    if isinstance(row.get("question"), str):  # a model can't choose from what it is not shown
        texts = [hint, row["question"], *options.values()]
        row["question"] = "\n".join(str(text) for text in texts if text)
    return row


def write_rows(splits: dict, hub_set: HubSet, album: Album, file: Path) -> Exported:
    """Write all rows of all splits to one file, one per line, without those that train.py would refuse."""
    done, names = Exported(), {}
    with open(file, "w", encoding="utf-8") as out:
        for split, rows in splits.items():
            values = tqdm(read_values(rows, hub_set), split, unit=" rows", disable=None)
            for number, value in enumerate(values):
                where = f"{split}:{number}"
                try:
                    row = make_row(value, album, not hub_set.pictures_of)
                    parsed = parse_row(where, row)
                except ValueError as error:
                    texts = {name: each for name, each in value.items() if name != "image"}
                    done.bad.append(BadRow(where, str(error), texts))
                    continue
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                done.splits.append(split)
                images = tuple(parsed.images)
                done.pictures.append(names.setdefault(images, images))  # one object for all rows: memory
    return done


# ------------------------------------------------------------------------------------------------------------ dividing


def divide(done: Exported, val: float, test: float, seed: int) -> None:
    """Choose the file of each row: that of its split, or by picture where the data set has no such split.

    `val` and `test` are shares of the pictures. A set without a split for training, or with no other, is divided
    whole; where only one for validation is missing, that is taken from training.
    """
    done.files = [PARTS.get(split.lower(), split) for split in done.splits]
    own = set(done.files)
    if "train" not in own or len(own) == 1:
        done.files = ["train"] * len(done.files)
        done.divided = f"all rows, {val:g} of the pictures for validation and {test:g} for testing"
        _take_out("test", test, done, seed, "--test-fraction")
        _take_out("val", val / (1 - test), done, seed, "--val-fraction")
    elif "val" not in own and val:
        done.divided = f"the rows for training, {val:g} of their pictures for validation"
        _take_out("val", val, done, seed, "--val-fraction")


def _take_out(part: str, fraction: float, done: Exported, seed: int, flag: str) -> None:
    from inputs.holdout import hold_out  # imports torch, which takes seconds

    chosen = [index for index, file in enumerate(done.files) if file == "train"]
    if fraction and chosen:
        held = hold_out([done.pictures[i] for i in chosen], fraction, seed, flag, "0, which takes none")[1]
        for index in held:
            done.files[chosen[index]] = part


def write_files(file: Path, folder: Path, files: list[str]) -> None:
    """Divide a file of rows, the name of whose file is `files` for each line, into files of the folder."""
    outs = {name: open(folder / f"{name}.jsonl", "w", encoding="utf-8") for name in dict.fromkeys(files)}
    try:
        with open(file, encoding="utf-8", newline="\n") as lines:
            for line, name in zip(lines, files, strict=True):
                outs[name].write(line)
    finally:
        for out in outs.values():
            out.close()
    file.unlink()


# ----------------------------------------------------------------------------------------------------------- reporting


def summary(done: Exported, album: Album) -> list[str]:
    """What was written and what was not, a line each."""
    parts = {name: [] for name in sorted(set(done.files))}
    for images, name in zip(done.pictures, done.files):
        parts[name].append(images)
    shown = {name: {image for images in rows for image in images} for name, rows in parts.items()}
    lines = [f"{name}.jsonl: {len(rows):,} rows, {len(shown[name]):,} pictures" for name, rows in parts.items()]
    total = sum(1 for name, _ in album.names.values() if name)
    lines.append(f"pictures/: {total:,} files, each content once")
    if alone := done.pictures.count(()):
        lines.append(f"{alone:,} rows show no picture: they are text alone")
    if done.divided:
        lines.append(f"divided by picture: {done.divided}")
    for name in sorted(shown.keys() - {"train"}):
        if common := len(shown[name] & shown.get("train", set())):
            both = f"train.jsonl and in {name}.jsonl, as the data set has them"
            lines.append(f"warning: {common:,} pictures are in {both}")
    return lines + left_out(done)


def left_out(done: Exported) -> list[str]:
    """What was wrong with rows, as train.py tells it."""
    from inputs.refused import by_reason  # imports torch, which takes seconds

    lines = [f"  {line}" for line in by_reason(done.bad, None, Path())]
    return [f"left out: {len(done.bad):,} rows, all of them in bad_rows.jsonl", *lines] if lines else []


def readme(hub_set: HubSet, lines: Iterable[str], seed: int) -> str:
    columns = "\n".join(f"| `{name}` | `{column}` |" for name, column in hub_set.columns.items())
    listed = "\n".join(f"- {line.strip()}" for line in lines)
    return f"""# {hub_set.name}{f", {hub_set.subset}" if hub_set.subset else ""}

Exported by `python -m inputs.hub`, seed {seed}. The data set's own license holds for these files.

{listed}

| field | column |
|---|---|
{columns}

Columns: {hub_set.source}. Files of pictures are named after their content (the first 16 digits of its SHA-256).
"""


# ------------------------------------------------------------------------------------------------------------- command


def export(hub_set: HubSet, out: Path, val: float, test: float, seed: int) -> list[str]:
    """Write the data set to a new folder, whole or not at all. Returns lines that say what was written.

    Raises InputError for a folder that is not empty, a data set that can't be read as it is mapped, and one without
    any row that can be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is there already: name a new folder")
    splits, pictures = load_splits(hub_set), pictures_set(hub_set)
    others = load_splits(pictures, ("image", "picture_id")) if pictures else {}
    with writing(f"--out: can't write to {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as folder:
            folder.mkdir()
            album = Album(folder / "pictures")
            try:
                for split, rows in others.items():
                    values = reading(rows, pictures.name)
                    read_pictures(tqdm(values, f"pictures of {split}", unit=" rows", disable=None), pictures, album)
                rows = folder / f"{PARTIAL}rows"
                done = write_rows(splits, hub_set, album, rows)
            finally:
                album.checker.end()
            if not done.splits:
                raise InputError("\n".join([f"{hub_set.name}: no row can be used", *left_out(done)]))
            divide(done, val, test, seed)
            write_files(rows, folder, done.files)
            lines = summary(done, album)
            write_report(folder, hub_set, done, lines, seed)
    return lines


def read_pictures(rows: Iterable[dict], pictures: HubSet, album: Album) -> None:
    """Save the pictures of a data set whose rows are not wanted. What is wrong with one is told with the rows."""
    for row in rows:
        picture_id = row[pictures.columns["picture_id"]]
        if picture_id not in album.by_id:
            try:
                album.add(row[pictures.columns["image"]], picture_id)
            except ValueError as error:
                album.by_id.setdefault(picture_id, ("", str(error)))


def write_report(folder: Path, hub_set: HubSet, done: Exported, lines: list[str], seed: int) -> None:
    from inputs.refused import write_bad_rows

    (folder / "README.md").write_text(readme(hub_set, lines, seed), encoding="utf-8")
    write_bad_rows(folder / "bad_rows.jsonl", done.bad, [hub_set.name])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m inputs.hub", description="Export a data set of the hub with pictures.")
    add = parser.add_argument
    add("name", help=f"{', '.join(SETS)}; or any name on the hub, or a folder downloaded from it, with --map")
    add("--out", required=True, type=Path, help="new folder for pictures/, *.jsonl and README.md")
    add("--map", nargs="+", default=[], metavar="FIELD=COLUMN", help="columns of question, answer, image and more")
    add("--subset", default="", help="the data set's subset (its config), where it has several")
    add("--val-fraction", type=float, default=0.1, help="share of pictures for val.jsonl where no split is that")
    add("--test-fraction", type=float, default=0.1, help="share for test.jsonl of a data set with one split; 0: none")
    add("--seed", type=int, default=0, help="of the choice of these pictures")
    return parser


def plan_command(out: Path) -> str:
    """The command that plans a run on what was exported, to be pasted into a shell: two lines, which fit a terminal."""
    words = ["python", "train.py", "--plan"]
    for part in ("train", "val"):
        file = out / f"{part}.jsonl"
        words += [f"--{part}", str(file)] if file.exists() else []
    return shlex.join(words) + " \\\n  " + shlex.join(["--images", str(out / "pictures")])


def main(argv: list[str]) -> int:
    """Export. Returns the exit code; raises InputError for what can't be exported."""
    args = build_parser().parse_args(argv)
    val, test = args.val_fraction, args.test_fraction
    if min(val, test) < 0 or val + test >= 1:
        raise InputError("--val-fraction and --test-fraction must be 0 or more, and less than 1 together")
    hub_set = find_set(args.name, args.map, args.subset)
    for line in export(hub_set, args.out, val, test, args.seed):
        print(printable(line))
    print(f"next:\n  {plan_command(args.out)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(printable(f"error: {error}"))
