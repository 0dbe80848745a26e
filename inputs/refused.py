"""Rows that can't be used: bad_rows.jsonl has all of them, the console a few for each reason and what would help."""

import json
import os
import re
from itertools import islice
from pathlib import Path

from common import InputError, replacing, writing
from inputs.images import find_image
from inputs.rows import BadRow

EXAMPLES = 3  # rows listed for each reason
REASONS = 20  # listed
LONGEST = 500  # characters of a reason
# What differs between rows that have the same thing wrong with them: quoted values, objects, lists and numbers.
VALUES = re.compile(r"""\{.*\}|\[.*\]|(?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*"|\d[\d,.]*""", re.DOTALL)
TRIED, FOLDERS = 20, 100  # missing images that are looked for, and folders of each kind that they are looked for in


def stop_or_skip_bad(
    bad: list[BadRow], files: list[str], usable: set[int], skip_bad: bool, output: Path | None, images_dir: str
) -> None:
    """Write every bad row to output/bad_rows.jsonl. `usable` has the numbers of the files with usable rows.

    Raises InputError that lists the bad rows unless `skip_bad` is set, and in any case for a file without usable rows.
    """
    file = output / "bad_rows.jsonl" if output else None
    if file:
        with writing(f"the list of rows that can't be used is not written, {file}"):
            write_bad_rows(file, bad, files)
    if not bad:
        return
    listed = "".join(f"\n  {line}" for line in by_reason(bad, file, Path(images_dir)))
    if empty := [path for number, path in enumerate(files) if number not in usable]:
        raise InputError(f"{', '.join(map(str, empty))}: no usable row{listed}")
    if not skip_bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad):,} rows"
        raise InputError(f"{rows} can't be used (--skip-bad goes on without them):{listed}")


def refuse_without_images(images_dir: str) -> None:
    """Raise InputError: --images names this folder, but no row that can be used shows an image."""
    raise InputError(f"--images {images_dir} is given, but no row shows an image: name it as `image`, or omit --images")


def write_bad_rows(file: Path, bad: list[BadRow], files: list[str]) -> None:
    """Write a line for each row with its place, its reason and what it holds; `files` are named by their numbers."""
    if not bad:
        file.unlink(missing_ok=True)  # an earlier start may have written it, before the rows were corrected
        return
    with replacing(file) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as out:
        for row in bad:
            line = {"file": str(files[row.file]), "where": row.where, "reason": row.reason, "row": row.row}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def by_reason(bad: list[BadRow], file: Path | None, images_dir: Path) -> list[str]:
    """Lines for the console: reason by reason, the first rows, how many more there are, and what would help."""
    groups = {}
    for row in bad:
        groups.setdefault(VALUES.sub("", row.reason[:LONGEST]), []).append(row)
    lines = []
    for rows in islice(groups.values(), REASONS):
        lines += [f"{row.where}: {_cut(row.reason)}" for row in rows[:EXAMPLES]]
        if len(rows) > EXAMPLES:
            lines.append(f"  and {len(rows) - EXAMPLES:,} more of this kind, {len(rows):,} in all")
        if missing := [row.missing for row in rows if row.missing]:
            lines += _where_images_are(missing, images_dir)
    if left := list(islice(groups.values(), REASONS, None)):
        lines.append(f"and {sum(map(len, left)):,} rows for {len(left):,} other reasons")
    return lines + ([f"all of them: {file}"] if file and len(bad) > len(lines) else [])


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _where_images_are(names: list[str], images_dir: Path) -> list[str]:
    """The folder near `images_dir` that has most of the missing images, as a remedy in one line; none: no line."""
    root = Path(os.path.abspath(images_dir))
    tried = names[:: -(-len(names) // TRIED)]
    folders = dict.fromkeys([root.parent, root.parent.parent, *_subfolders(root), *_subfolders(root.parent)])
    found = {folder: sum(_has(folder, name) for name in tried) for folder in folders if folder != root}
    best = max(found, key=found.get, default=None)
    if not best or not found[best]:
        return []
    share = "them" if found[best] == len(tried) == len(names) else f"{found[best]} of {len(tried)} that were looked for"
    return [f"  --images {best} would find {share}"]


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry) for entry in islice(entries, 100 * FOLDERS) if entry.is_dir())[:FOLDERS]
    except OSError:  # a folder that may not be read offers nothing
        return []


def _has(folder: Path, name: str) -> bool:
    try:
        return bool(find_image(name, folder, allow_outside=False))
    except ValueError:
        return False
