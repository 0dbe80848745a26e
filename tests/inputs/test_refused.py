"""Rows that can't be used: the console is short whatever they hold and says what helps, bad_rows.jsonl has all."""

import json

import pytest
from examples import flat

from common import InputError
from inputs.refused import REASONS, stop_or_skip_bad
from inputs.rows import BadRow


def listed(data, images, output=None) -> str:
    with pytest.raises(InputError) as caught:
        usable = {sample.file for sample in data.samples}
        stop_or_skip_bad(data.bad, list(map(str, data.files)), usable, False, output, str(images))
    return str(caught.value)


def test_each_reason_has_three_examples_and_its_count(load, world, tmp_path):
    rows = [flat(image="a.png"), *(flat(image=f"gone {n}'s.png") for n in range(40)), flat(True), flat(False), flat([])]
    rows += [{"image": "a.png", "question": "Q?"}, flat("x", "Q?", image=["a.png"], weight="heavy")]
    message = listed(load(rows), world / "images", tmp_path).split("\n  ")
    assert message[0].startswith("45 rows can't be used (--skip-bad")
    missing = [f"""rows.jsonl:{n + 2}: image "gone {n}'s.png" is missing in {world / "images"}""" for n in range(3)]
    assert message[1:5] == [*missing, "  and 37 more of this kind, 40 in all"]
    assert [line.split(": ")[0] for line in message[5:-1]] == [f"rows.jsonl:{n}" for n in range(42, 47)]
    assert message[-1] == f"all of them: {tmp_path / 'bad_rows.jsonl'}"
    assert len((tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()) == 45


def test_many_reasons_are_counted_and_not_listed(load, tmp_path):
    data = load([flat()])
    data.bad = [BadRow(f"rows.jsonl:{n}", f"reason {chr(97 + n // 2)}") for n in range(2, 52)]
    message = listed(data, tmp_path)
    assert message.count("reason ") == 2 * REASONS and f"and 10 rows for {25 - REASONS} other reasons" in message


LONG = "iVBORw0KGgo" * 2_000
LONG_ROWS = {
    "base64 picture": flat(image=f"data:image/png;base64,{LONG}"),
    "long file name": flat(image=LONG),
    "long list": flat(image=[LONG] * 9),
    "long weight": flat(weight=LONG),
    "long object as image": flat(image={"bytes": LONG}),
    "long role": {"messages": [{"role": LONG, "content": "Q?"}]},
    "long turn": {"conversations": [{"from": LONG, "value": "Q?"}]},
    "long part": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": LONG}]}]},
    "long field name": {LONG: 1},
    "many fields": {f"field {n}": 1 for n in range(999)},
    "many turns": {"messages": [{"role": "user", "content": "Q?"}] * 999},
    "not JSON": '{"image": "' + LONG,
    "not a row": [LONG],
}


@pytest.mark.parametrize("name", LONG_ROWS)
def test_sixty_rows_of_long_values_print_little_and_are_kept_whole(load, world, tmp_path, name):
    row = LONG_ROWS[name]
    line = row if isinstance(row, str) else json.dumps(row)
    message = listed(load([flat(), *[line] * 60]), world / "images", tmp_path)
    assert message.startswith("60 rows") and len(message) < 2500 and "iVBORw0KGgo" * 12 not in message
    written = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(written) == 60 and json.loads(written[0])["row"] == row


@pytest.mark.parametrize(
    ("names", "folder", "fits"),
    [
        (["a.png", "b.png"], "data/rows", "data/rows/images"),  # --images left out: the folder of the rows
        (["a.png", "b.png"], "data", "data/pictures"),
        (["a.png", "b.png"], "data/annotations", "data/pictures"),
        (["pictures/a.png", "pictures/b.png"], "data/pictures", "data"),  # the folder doubled
        (["data/pictures/a.png"], "data/pictures", ""),
        (["a", "b"], "data", "data/pictures"),  # names without their extension
    ],
)
def test_the_folder_that_missing_images_are_in_is_named(load, world, tmp_path, names, folder, fits):
    for place in ("data/pictures", "data/annotations", "data/rows/images"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    full = tmp_path / ("data/rows/images" if "rows" in folder else "data/pictures")
    for name in ("a.png", "b.png"):
        (full / name).write_bytes((world / "images" / name).read_bytes())
    data = load([flat(), *(flat(image=name) for name in names)], images=tmp_path / folder)
    assert f"\n    --images {tmp_path / fits} would find them" in listed(data, tmp_path / folder)


def test_a_folder_with_some_of_the_images_is_named_with_their_number(load, world, tmp_path):
    (tmp_path / "images" / "more").mkdir(parents=True)
    (tmp_path / "images" / "more" / "3.png").write_bytes((world / "images" / "a.png").read_bytes())
    data = load([flat(), *(flat(image=f"{n}.png") for n in range(10))], images=tmp_path / "images")
    remedy = f"--images {tmp_path / 'images' / 'more'} would find 1 of 10 that were looked for"
    assert remedy in listed(data, tmp_path / "images")
    (nowhere,) = (
        line for line in listed(load([flat(image="gone.png"), flat()]), tmp_path).split("\n") if "gone" in line
    )
    assert nowhere.count("--images") == 0


def test_bad_rows_jsonl_is_whole_or_not_there(load, tmp_path, monkeypatch):
    data = load([flat(), flat(image="gone.png"), flat(True)])
    (tmp_path / "bad_rows.jsonl").write_text("of an earlier start")
    data.bad[1].row = object()  # can't be written, as on a full disk
    with pytest.raises(TypeError):
        stop_or_skip_bad(data.bad, data.files, {0}, True, tmp_path, "")
    assert (tmp_path / "bad_rows.jsonl").read_text() == "of an earlier start"
    assert [path.name for path in tmp_path.glob("*bad_rows*")] == ["bad_rows.jsonl"]
