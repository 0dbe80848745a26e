"""Data sets of the hub: which of their columns become which fields of a row, where that was read, and their rows.

A field is one of docs/rows.md, kept under its name, or one of two that are only read here: `hint`, a text that goes
before the question, and `picture_id`, by which the pictures of another data set are found. Any other name is kept as a
field of the row that nothing reads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import PurePosixPath

import numpy as np

from common import InputError, printable

READ_ERRORS = OSError, ValueError, RuntimeError  # of the network, of names, of files, and of scripts that are not run
NEEDED = ("question", "answer", "image")
ROWS_AT_ONCE = 100  # that are taken from a parquet file, with their pictures
# The names that columns of these fields have in other data sets, the most common ones first: for the line that a
# message suggests.
USUAL = {
    "question": ("question", "query", "problem", "prompt", "instruction", "text"),
    "answer": ("answer", "answers", "label", "labels", "multiple_choice_answer", "response", "output", "solution"),
    "image": ("image", "images", "picture", "img", "photo", "figure", "jpg", "png"),
}


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub. `columns` has a column for each field."""

    name: str
    columns: dict[str, str] = field(default_factory=dict)
    source: str = ""  # the public page that names these columns
    subset: str = ""
    pictures_of: str = ""  # key of the data set whose pictures are shown, those of the same `picture_id`


_TRIPLET = {"image": "image", "question": "question", "answer": "answer"}
_DOCVQA = {"image": "image", "question": "question", "answers": "answers"}
_HUB = "https://huggingface.co/datasets"
SETS = {
    "kvasir-vqa": HubSet(
        "SimulaMet-HOST/Kvasir-VQA",
        {**_TRIPLET, "picture_id": "img_id", "source": "source"},
        "https://github.com/simula/datasets.simula.no, datasets/kvasir-vqa.md",
    ),
    "kvasir-vqa-x1": HubSet(
        "SimulaMet/Kvasir-VQA-x1",
        {"picture_id": "img_id", "question": "question", "answer": "answer", "complexity": "complexity"}
        | {"question_class": "question_class"},
        "https://github.com/simula/Kvasir-VQA-x1, README.md",
        pictures_of="kvasir-vqa",
    ),
    "vqa-rad": HubSet(
        "flaviagiammarino/vqa-rad",
        _TRIPLET,
        f"{_HUB}/flaviagiammarino/vqa-rad, README.md at 0be11a5",
    ),
    "slake": HubSet(
        "mdwiratathya/SLAKE-vqa-english",  # the authors' own, BoKelvin/SLAKE, has its pictures in an archive
        _TRIPLET,
        "https://github.com/eka-care/KARMA-OpenMedEvalKit, vqa_rad_dataset.py and slake_dataset.py",
    ),
    "path-vqa": HubSet(
        "flaviagiammarino/path-vqa",
        _TRIPLET,
        "https://github.com/futrime/vqa-benchmark-builder, path_vqa.py, has question and answer; the name of the image "
        f"column is unverified: {_HUB}/flaviagiammarino/path-vqa, README.md at 6ccbafa, has a triplet with an image",
    ),
    "scienceqa": HubSet(
        "derek-thomas/ScienceQA",
        {**_TRIPLET, "options": "choices", "hint": "hint", "question_type": "subject"},
        f"{_HUB}/derek-thomas/ScienceQA, README.md at 179a2d6",
    ),
    "chartqa": HubSet(
        "HuggingFaceM4/ChartQA",
        {"image": "image", "question": "query", "answers": "label", "question_type": "human_or_machine"},
        f"{_HUB}/HuggingFaceM4/ChartQA, README.md at b605b6e",
    ),
    "docvqa": HubSet(
        "pixparse/docvqa-single-page-questions",
        {**_DOCVQA, "id": "question_id"},
        f"{_HUB}/pixparse/docvqa-single-page-questions, README.md at 33136ef",
    ),
    "docvqa-lmms": HubSet(
        "lmms-lab/DocVQA",  # validation and test only
        {**_DOCVQA, "id": "questionId"},
        f"{_HUB}/lmms-lab/DocVQA, README.md at 59fed3c",
        subset="DocVQA",
    ),
}


def find_set(name: str, mapped: list[str], subset: str) -> HubSet:
    """The data set of a key of SETS, of a name on the hub, or of a folder whose path ends in one. `mapped` are the
    words of --map, FIELD=COLUMN, which take the place of the table's columns. Raises InputError for other words."""
    known = SETS.get(name.lower())
    if known is None:
        ends = PurePosixPath(name).parts[-2:]
        known = next((s for s in SETS.values() if s.name.lower() == "/".join(ends).lower()), HubSet(name))
        known = replace(known, name=name)
    pairs = dict(word.partition("=")[::2] for word in mapped)
    if wrong := [word for word in mapped if not all(word.partition("="))]:
        raise InputError(f"--map: {wrong[0]!r} is not FIELD=COLUMN, as in question=query")
    if not pairs:
        return replace(known, subset=subset or known.subset)
    elsewhere = "" if "image" in pairs else known.pictures_of
    return HubSet(known.name, pairs, "given by --map", subset or known.subset, elsewhere)


def pictures_set(hub_set: HubSet) -> HubSet | None:
    """The data set with the pictures that `hub_set` shows, beside it where it is a folder; None: it has its own."""
    if not hub_set.pictures_of:
        return None
    pictures, own = SETS[hub_set.pictures_of], next(s for s in SETS.values() if s.pictures_of == hub_set.pictures_of)
    beside = hub_set.name[: -len(own.name)] + pictures.name
    return replace(pictures, name=beside)


def check_columns(hub_set: HubSet, found: list[str], split: str) -> None:
    """Raise InputError where a column is missing, with the columns found and the --map line that would fit."""
    missing = [f"{field}={column}" for field, column in hub_set.columns.items() if column not in found]
    unnamed = _unnamed(hub_set.columns, hub_set)
    if not missing and not unnamed:
        return
    problem = f"no column for {', '.join(missing)}" if missing else f"no column is named for {', '.join(unnamed)}"
    line = " ".join(f"{field}={column}" for field, column in _suggested(hub_set, found).items())
    raise InputError(
        f"{hub_set.name}, split {split}: {problem}\n  columns found: {', '.join(found)}\n  this may fit: --map {line}"
    )


def _unnamed(columns: dict[str, str], hub_set: HubSet) -> list[str]:
    """Fields that are needed and have no column."""
    instead = {"answer": "answers", "image": "picture_id" if hub_set.pictures_of else "image"}
    return [name for name in NEEDED if name not in columns and instead.get(name) not in columns]


def _suggested(hub_set: HubSet, found: list[str]) -> dict[str, str]:
    """Columns that are there, and for fields that are needed those of a usual name, or COLUMN where there is none."""
    fits = {field: column for field, column in hub_set.columns.items() if column in found}
    by_name = {column.lower(): column for column in reversed(found)}
    for name in _unnamed(fits, hub_set):
        fits[name] = next((by_name[word] for word in USUAL[name] if word in by_name), "COLUMN")
    first = [name for name in ("question", "answer", "answers", "image") if name in fits]
    return {name: fits[name] for name in [*first, *fits]}


# ------------------------------------------------------------------------------------------------------------- reading


def load_splits(hub_set: HubSet, fields: Iterable[str] = ()) -> dict:
    """The splits of a data set, each an iterable of rows that downloads as it goes, its columns checked. `fields`: the
    only ones whose columns are read.

    Raises InputError where `datasets` is missing, the data set can't be found, or a column is not there.
    """
    found = find_spec("datasets")
    if not (found and found.origin):  # a folder datasets/ has no origin
        raise InputError("the package datasets reads the hub and is not installed here: pip install datasets")
    import datasets

    try:
        builder = datasets.load_dataset_builder(hub_set.name, hub_set.subset or None)
        if hasattr(builder.config, "fragment_scan_options"):  # of parquet files, which else stay in memory once read
            from pyarrow.dataset import ParquetFragmentScanOptions

            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
            builder.config.batch_size = ROWS_AT_ONCE
        splits = builder.as_streaming_dataset()
    except READ_ERRORS as error:
        raise InputError(f"{hub_set.name}: {error}") from None
    for split, rows in splits.items():
        check_columns(hub_set, rows.column_names or [], split)
    wanted = list(dict.fromkeys(hub_set.columns[name] for name in fields or hub_set.columns))
    left = dict.fromkeys(column for rows in splits.values() for column in rows.column_names if column not in wanted)
    if left and not fields:
        print(printable(f"columns that are not exported: {', '.join(left)}"))
    return {split: rows.select_columns(wanted).decode(False) for split, rows in splits.items()}


def reading(rows: Iterable[dict], name: str) -> Iterator[dict]:
    """The rows of a data set. Raises InputError for what the network or its files do meanwhile."""
    try:
        yield from rows
    except READ_ERRORS as error:
        raise InputError(f"{name} can't be read to its end: {error}") from None


def read_values(rows, hub_set: HubSet) -> Iterator[dict]:
    """The values of each row by field. A class is given as its name, and a float32 by the digits that it has."""
    kinds = {name: (rows.features or {}).get(column) for name, column in hub_set.columns.items()}
    for row in reading(rows, hub_set.name):
        yield {name: _written(row[column], kinds[name]) for name, column in hub_set.columns.items()}


def _written(value, kind):
    """A value of this kind, or of a list of it, as a row says it."""
    if isinstance(value, list):
        return [_written(each, getattr(kind, "feature", kind)) for each in value]
    if isinstance(value, int) and hasattr(kind, "int2str"):
        return None if value == -1 else kind.names[value]  # -1: not known, as in hidden tests
    if isinstance(value, float) and getattr(kind, "dtype", "") == "float32":
        return float(str(np.float32(value)))  # as Python's float of 64 bits, 0.1 is 0.10000000149011612
    return value
