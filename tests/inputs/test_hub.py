"""Data sets of the hub become pictures and rows: small parquet files with the columns of each set."""

import io
import json
import os
import subprocess
import tracemalloc
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_files import write_set
from PIL import Image

from common import InputError
from inputs import hub, hub_sets
from inputs.hub_sets import SETS, HubSet, load_splits, read_values
from inputs.row_files import read_rows


def picture(shade: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 2 * shade, 200)).save(file, kind)
    return file.getvalue()


def inside(content: bytes | None) -> dict | None:
    """A picture as parquet files of the hub hold it."""
    return {"bytes": content, "path": "a.png"}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Names on the hub are folders here: `datasets` looks there first, as it does for its users."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def rows_of(name: str, folder="out") -> list[dict]:
    with open(f"{folder}/{name}.jsonl", encoding="utf-8") as file:
        return list(map(json.loads, file))


def export(name: str, *words: str, out: str = "out") -> None:
    assert hub.main([name, f"--out={out}", *words]) == 0


def kvasir(count: int, per_picture: int = 3) -> list[dict]:
    return [
        {"image": inside(picture(n // per_picture)), "img_id": f"c{n // per_picture}", "source": "Polyps"}
        | {"question": f"What is {n}?", "answer": f"it is {n}"}
        for n in range(count)
    ]


# ------------------------------------------------------------------------------------------------- pictures and splits


def test_pictures_that_were_read_do_not_stay_in_memory(tmp_path):
    """Python's and Arrow's memory at its highest, while a file of 32 MB in 16 groups of rows is read."""
    pictures = [{"bytes": os.urandom(2**20), "path": None} for _ in range(32)]
    table = pa.Table.from_pylist([{"image": each, "question": "What?", "answer": "this"} for each in pictures])
    (tmp_path / "set" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "set" / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    del pictures, table
    own = HubSet("set", {"question": "question", "answer": "answer", "image": "image"})
    before, arrow = pa.total_allocated_bytes(), []
    tracemalloc.start()
    for _ in read_values(load_splits(own)["train"], own):
        arrow.append(pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1] + max(arrow)
    tracemalloc.stop()
    print(f"{peak / 2**20:.1f} MB at the most")
    assert len(arrow) == 32 and peak < 40 * 2**20


def test_a_picture_in_every_row_is_one_file_and_all_its_questions_are_on_one_side(tmp_path, capsys):
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=kvasir(60))
    export("kvasir-vqa", "--val-fraction=0.2", "--test-fraction=0.5")
    parts = {name: rows_of(name) for name in ("train", "val", "test")}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 18, "val": 12, "test": 30}
    shown = [{row["image"] for row in rows} for rows in parts.values()]
    assert sum(map(len, shown)) == len(set.union(*shown)) == len(os.listdir("out/pictures")) == 20
    for row in sum(parts.values(), []):
        number = int(row["question"].split()[-1][:-1])
        assert row.keys() == {"image", "img_id", "question", "answer", "source"}
        assert row["answer"] == f"it is {number}" and row["img_id"] == f"c{number // 3}"
        with open(f"out/pictures/{row['image']}", "rb") as file:
            assert file.read() == picture(number // 3)
    printed = capsys.readouterr().out
    assert printed.endswith("--plan --train out/train.jsonl --val out/val.jsonl \\\n  --images out/pictures\n")
    assert "train.jsonl: 18 rows, 6 pictures" in printed and "pictures/: 20 files" in printed
    readme = open("out/README.md").read()
    assert all(line in readme for line in printed.splitlines()[:4]) and SETS["kvasir-vqa"].source in readme
    assert (
        "0.2 of the pictures for validation and 0.5 for testing" in readme and "| `picture_id` | `img_id` |" in readme
    )


def test_the_command_to_go_on_with_fits_a_terminal_and_can_be_pasted(tmp_path):
    (tmp_path / "data/kvasir vqa").mkdir(parents=True)
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / "data/kvasir vqa" / name).touch()
    command = hub.plan_command(Path("data/kvasir vqa"))
    assert all(len(f"  {line}") <= 100 for line in command.splitlines())
    words = subprocess.run(["sh", "-c", f"printf '%s\n' {command}"], capture_output=True, text=True, check=True).stdout
    flags = {"--train": "train.jsonl", "--val": "val.jsonl", "--images": "pictures"}
    named = [word for flag, name in flags.items() for word in (flag, f"data/kvasir vqa/{name}")]
    assert words.splitlines() == ["python", "train.py", "--plan", *named]


def test_the_same_seed_divides_alike_and_another_one_does_not(tmp_path):
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=kvasir(60))
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        export("SimulaMet-HOST/Kvasir-VQA", f"--seed={seed}", out=out)
    for part in ("val", "test"):
        assert rows_of(part, "a") == rows_of(part, "b") != rows_of(part, "c")


def test_a_single_split_is_divided_even_where_it_is_called_train(tmp_path):
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", train=kvasir(30))
    export("kvasir-vqa", "--val-fraction=0.2", "--test-fraction=0.1")
    assert [len(rows_of(part)) for part in ("train", "val", "test")] == [21, 6, 3]


def test_a_set_without_a_split_for_training_is_divided_whole(tmp_path):
    rows = [{"image": inside(picture(n)), "question": "?", "answers": ["yes"], "questionId": str(n)} for n in range(12)]
    secret = [row | {"answers": []} for row in rows]
    write_set(tmp_path, SETS["docvqa-lmms"].name, validation=rows[:9], test=rows[9:10] + secret[10:])
    export("docvqa-lmms", "--subset=default", "--val-fraction=0.2", "--test-fraction=0.1")
    assert [len(rows_of(part)) for part in ("train", "val", "test")] == [7, 2, 1]
    assert [line["where"] for line in rows_of("bad_rows")] == ["test:1", "test:2"]


def test_rows_and_pictures_are_what_training_reads(tmp_path):
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=kvasir(9))
    export("kvasir-vqa", "--val-fraction=0", "--test-fraction=0")
    (tmp_path / "rows.jsonl").write_text(open("out/train.jsonl").read())
    rows, bad = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 9 and not bad and set(os.listdir("out")) == {"README.md", "pictures", "train.jsonl"}
    assert all(os.path.isfile(f"out/pictures/{image}") for row in rows for image in row.images)
    assert {field for row in rows for field in row.unread.fields} == set()


def test_splits_of_the_data_set_are_kept_and_pictures_in_two_of_them_are_told(tmp_path, capsys):
    rows = [{"image": inside(picture(n)), "question": f"{n}?", "answer": "yes"} for n in range(12)]
    write_set(tmp_path, "flaviagiammarino/vqa-rad", train=rows[:10], test=rows[9:])
    export("vqa-rad", "--val-fraction=0.2")
    assert [len(rows_of(name)) for name in ("train", "val", "test")] == [8, 2, 3]
    both = {row["image"] for row in rows_of("train")} & {row["image"] for row in rows_of("test")}
    assert ("1 pictures are in train.jsonl and in test.jsonl" in capsys.readouterr().out) == bool(both)
    export("vqa-rad", "--val-fraction=0", out="whole")
    assert len(rows_of("train", "whole")) == 10 and not os.path.exists("whole/val.jsonl")
    assert "warning: 1 pictures are in train.jsonl and in test.jsonl" in capsys.readouterr().out


def test_a_broken_picture_is_told_and_its_rows_are_left_out(tmp_path, capsys):
    rows = kvasir(12)
    for row in rows[3:6]:
        row["image"] = inside(picture(1)[:60])
    rows[7]["image"] = {"bytes": None, "path": "elsewhere.png"}
    rows[8]["answer"] = " "
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=rows)
    export("kvasir-vqa", "--val-fraction=0", "--test-fraction=0")
    assert [row["question"] for row in rows_of("train")] == [f"What is {n}?" for n in (0, 1, 2, 6, 9, 10, 11)]
    assert len(os.listdir("out/pictures")) == 3
    reasons = {line["where"]: line["reason"] for line in rows_of("bad_rows")}
    assert list(reasons) == ["raw:3", "raw:4", "raw:5", "raw:7", "raw:8"]
    assert "unreadable or truncated" in reasons["raw:4"] and "not inside the data set" in reasons["raw:7"]
    assert "no answer" in reasons["raw:8"]
    printed, readme = capsys.readouterr().out, open("out/README.md").read()
    for text in (printed, readme):
        assert "left out: 5 rows" in text and "raw:3: its picture is unreadable" in text and "raw:5: " in text


def test_nothing_is_left_behind_where_no_row_can_be_used(tmp_path):
    rows = [row | {"answer": ""} for row in kvasir(3)]
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=rows)
    with pytest.raises(InputError, match="no row can be used\n.*3 rows.*\n.*raw:0: no answer"):
        export("kvasir-vqa", out="new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SimulaMet-HOST"]


def test_a_data_set_that_breaks_off_is_named_and_leaves_nothing(tmp_path):
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=kvasir(9))
    (file,) = tmp_path.rglob("*.parquet")
    file.write_bytes(b"PAR1" + bytes(300) + file.read_bytes()[304:])  # its columns, which stand at the end, are read
    with pytest.raises(InputError, match="^SimulaMet-HOST/Kvasir-VQA can't be read to its end: "):
        export("kvasir-vqa", out="new")
    assert not os.path.exists("new") and not list(tmp_path.glob(".onelook*"))


def test_a_folder_that_is_there_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(InputError, match="--out out is there already"):
        export("kvasir-vqa")


def test_shares_that_leave_nothing_are_refused(tmp_path):
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=kvasir(9))
    with pytest.raises(InputError, match="--test-fraction 0.1 of 3 images holds out none: .* 0, which takes none"):
        export("kvasir-vqa")
    for val, test in ((-0.1, 0), (0.5, 0.5)):
        with pytest.raises(InputError, match="less than 1 together"):
            export("kvasir-vqa", f"--val-fraction={val}", f"--test-fraction={test}")


# --------------------------------------------------------------------------------------------------------- known sets


def test_x1_shows_the_pictures_of_kvasir_vqa(tmp_path, capsys):
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=kvasir(9) + [kvasir(12)[-1] | {"image": inside(b"broken")}])
    row = {"complexity": 2, "question": "Any?", "answer": "None seen.", "original": "[]", "question_class": ["count"]}
    row["image"] = "https://a/c2.jpg"
    train = [row | {"img_id": f"c{n % 5}"} for n in range(10)]
    write_set(tmp_path, "SimulaMet/Kvasir-VQA-x1", train=train, test=[row | {"img_id": "c2"}])
    export("kvasir-vqa-x1", "--val-fraction=0.3")
    assert capsys.readouterr().out.count("not exported: ") == 1  # nothing of the set that has the pictures
    rows = rows_of("train") + rows_of("val") + rows_of("test")
    assert [len(rows_of(name)) for name in ("train", "val", "test")] == [4, 2, 1]
    for row in rows:
        with open(f"out/pictures/{row['image']}", "rb") as file:
            assert file.read() == picture(int(row["img_id"][1:]))
        assert row["complexity"] == 2 and row["question_class"] == ["count"] and "original" not in row
    reasons = {line["where"]: line["reason"] for line in rows_of("bad_rows")}
    assert "no picture of the id 'c4'" in reasons["train:4"] and "its picture is unreadable" in reasons["train:3"]
    assert len(reasons) == 4


SCIENCE = {"question": "Which?", "choices": ["west", "east"], "answer": 1, "hint": "A map.", "subject": "geography"}
SCIENCE |= {"task": "closed choice", "lecture": "", "solution": "It is east."}
CASES = {  # a row of each set, and what becomes of it without its picture
    "slake": ({"question": "What organ?", "answer": "Liver"}, {"question": "What organ?", "answer": "Liver"}),
    "path-vqa": ({"question": "Where?", "answer": "in the canals"}, {"question": "Where?", "answer": "in the canals"}),
    "scienceqa": (
        SCIENCE,
        {"question": "A map.\nWhich?\nwest\neast", "answer": 1, "options": ["west", "east"]}
        | {"question_type": "geography"},
    ),
    "chartqa": (
        {"query": "How many?", "label": ["14"], "human_or_machine": 1},
        {"question": "How many?", "answers": ["14"], "question_type": 1},
    ),
    "docvqa": (
        {"question_id": 7, "question": "Who?", "answers": ["Dr. A", "A"], "data_split": "val"},
        {"question": "Who?", "answers": ["Dr. A", "A"], "id": 7},
    ),
    "docvqa-lmms": (
        {"questionId": "7", "question": "Who?", "answers": ["Dr. A", "A"], "docId": 3},
        {"question": "Who?", "answers": ["Dr. A", "A"], "id": "7"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_columns_of_each_set_become_fields(tmp_path, name):
    columns, expected = CASES[name]
    rows = [{"image": inside(picture(n, "JPEG")), **columns} for n in range(3)]
    write_set(tmp_path, SETS[name].name, train=rows[:1], validation=rows[1:2], test=rows[2:])
    if SETS[name].subset:  # a folder has none but "default"
        with pytest.raises(InputError, match=SETS[name].subset):
            export(name)
    export(name, *(["--subset=default"] if SETS[name].subset else []))
    for number, part in enumerate(("train", "val", "test")):
        (row,) = rows_of(part)
        with open(f"out/pictures/{row.pop('image')}", "rb") as file:
            assert file.read() == picture(number, "JPEG")
        assert row == expected
    (parsed,), bad = read_rows(tmp_path / "out/train.jsonl")
    assert not bad and parsed.fields["answer"] == {"scienceqa": "east"}.get(name, parsed.fields["answer"])


def test_every_known_set_cites_where_its_columns_were_read():
    assert set(CASES) | {"kvasir-vqa", "kvasir-vqa-x1", "vqa-rad"} == set(SETS)
    assert all(known.source.startswith("https://") for known in SETS.values())


def test_a_class_is_written_by_its_name(tmp_path):
    features = {"image": datasets.Image(), "query": datasets.Value("string"), "label": [datasets.Value("string")]}
    features["human_or_machine"] = datasets.ClassLabel(names=["human", "machine"])
    row = {"image": inside(picture(1)), "query": "How many?", "label": ["14"], "human_or_machine": 1}
    folder = tmp_path / SETS["chartqa"].name
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_list([row], features=datasets.Features(features))
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    export("chartqa", "--val-fraction=0", "--test-fraction=0")
    assert rows_of("train")[0]["question_type"] == "machine"


def test_a_class_that_is_not_known_is_no_answer_and_a_list_of_classes_has_their_names(tmp_path):
    kind = datasets.ClassLabel(names=["no", "yes"])
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": kind, "tags": [kind]}
    row = {"image": inside(picture(1)), "question": "Is it?", "tags": [1, 0]}
    rows = [row | {"answer": number} for number in (1, -1, 0)]
    (tmp_path / "some/set").mkdir(parents=True)
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    data.to_parquet(tmp_path / "some/set/train-00000-of-00001.parquet")
    words = "question=question", "answer=answer", "image=image", "tags=tags", "--val-fraction=0", "--test-fraction=0"
    export("some/set", "--map", *words)
    assert [(row["answer"], row["tags"]) for row in rows_of("train")] == [
        (each, ["yes", "no"]) for each in ("yes", "no")
    ]
    (bad,) = rows_of("bad_rows")
    assert bad["where"] == "train:1" and "no answer" in bad["reason"]


def test_a_float32_is_written_by_its_own_digits(tmp_path):
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("float32")}
    features |= {"box": datasets.Array2D((1, 2), "float32")}
    row = {"image": inside(picture(1)), "question": "How many?", "box": [[0.1, 0.5]]}
    rows = [row | {"answer": value} for value in (0.1, 2e-5, 3.0, None)]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    (tmp_path / "some/set").mkdir(parents=True)
    data.to_parquet(tmp_path / "some/set/train-00000-of-00001.parquet")
    words = "question=question", "answer=answer", "image=image", "box=box", "--val-fraction=0", "--test-fraction=0"
    export("some/set", "--map", *words)
    assert [row["answer"] for row in rows_of("train")] == [0.1, 2e-5, 3.0]
    assert rows_of("train")[0]["box"] == [[0.1, 0.5]]


def test_a_row_without_a_picture_is_text_and_is_counted(tmp_path, capsys):
    rows = [{"image": inside(picture(1)), **SCIENCE}, {"image": None, **SCIENCE, "hint": ""}]
    write_set(tmp_path, SETS["scienceqa"].name, train=rows)
    export("scienceqa", "--val-fraction=0", "--test-fraction=0")
    assert [row.get("image") is None for row in rows_of("train")] == [False, True]
    assert rows_of("train")[1]["question"] == "Which?\nwest\neast"
    assert "1 rows show no picture" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- other columns


def test_any_other_set_is_mapped_by_hand(tmp_path, capsys):
    row = {"query": "?", "label": "yes", "photo_2": inside(picture(9)), "note": ""}
    rows = [{"photo": inside(picture(n)), "level": n} | row for n in range(4)]
    write_set(tmp_path, "some/set", train=rows, validation=rows[:1], hard=rows[:2])
    export("some/set", "--map", "question=query", "answer=label", "image=photo", "difficulty=level")
    assert [len(rows_of(name)) for name in ("train", "val", "hard")] == [4, 1, 2]
    assert [row["difficulty"] for row in rows_of("train")] == [0, 1, 2, 3]
    assert {*rows_of("train")[0]} == {"image", "question", "answer", "difficulty"}
    assert "columns that are not exported: photo_2, note\n" in capsys.readouterr().out


@pytest.mark.parametrize("options", ['["west", "east"]', {"A": "west", "B": "east"}, ["west", "east"]])
def test_a_question_shows_its_options_in_whatever_form_they_come(tmp_path, options):
    row = {"image": inside(picture(1)), "question": "Which?", "answer": "B", "choices": options}
    write_set(tmp_path, "some/set", train=[row], test=[row])
    words = "question=question", "answer=answer", "image=image", "options=choices"
    export("some/set", "--map", *words, "--val-fraction=0")
    assert rows_of("train")[0]["question"] == "Which?\nwest\neast"


def test_an_open_question_among_others_with_options_has_an_empty_list_of_them(tmp_path):
    row = {"image": inside(picture(1)), "question": "Which?", "answer": "west"}
    rows = [row | {"choices": options} for options in (["west", "east"], [], None)]
    write_set(tmp_path, "some/set", train=rows, test=rows[:1])
    words = "question=question", "answer=answer", "image=image", "options=choices"
    export("some/set", "--map", *words, "--val-fraction=0")
    assert [row["question"] for row in rows_of("train")] == ["Which?\nwest\neast", "Which?", "Which?"]


def test_several_pictures_of_a_row_stay_together(tmp_path):
    rows = [{"images": [inside(picture(n)), inside(picture(n + 1))], "q": "?", "a": "yes"} for n in range(0, 8, 2)]
    write_set(tmp_path, "some/set", train=rows)
    export("some/set", "--map", "question=q", "answer=a", "image=images", "--val-fraction=0.25", "--test-fraction=0")
    assert [len(row["image"]) for row in rows_of("train")] == [2, 2, 2] and len(rows_of("val")) == 1


def test_pictures_of_another_set_can_be_mapped_too(tmp_path):
    rows = [{"id": f"c{n}", "question": "?", "answer": "yes", "picture": inside(picture(9))} for n in range(3)]
    write_set(tmp_path, "SimulaMet/Kvasir-VQA-x1", train=rows)
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=kvasir(9))
    words = ["--val-fraction=0", "--test-fraction=0", "--map", "question=question", "answer=answer"]
    with pytest.raises(InputError, match="--map question=question answer=answer image=picture$"):
        export("kvasir-vqa-x1", *words, "image=x")
    export("kvasir-vqa-x1", *words, "picture_id=id")
    export("kvasir-vqa-x1", *words, "image=picture", out="own")
    assert [len({row["image"] for row in rows_of("train", out)}) for out in ("out", "own")] == [3, 1]


@pytest.mark.parametrize(
    ("name", "words", "problem", "line"),
    [
        ("some/set", [], "no column is named for question, answer, image", "question=Query answer=label image=photo"),
        ("some/set", ["question=Query", "answer=x", "image=photo"], "no column for answer=x",
         "question=Query answer=label image=photo"),
        ("flaviagiammarino/vqa-rad", [], "no column for image=image, question=question, answer=answer",
         "question=Query answer=label image=photo"),
        ("HuggingFaceM4/ChartQA", [], "no column for image=image, question=query, question_type=human_or_machine",
         "question=Query answers=label image=photo"),
    ],
)  # fmt: skip
def test_a_mismatch_prints_the_columns_and_a_line_that_fits(tmp_path, name, words, problem, line):
    write_set(tmp_path, name, train=[{"photo": inside(picture(1)), "Query": "?", "label": "yes"}])
    with pytest.raises(InputError) as error:
        export(name, *(["--map", *words] if words else []))
    assert f"{name}, split train: {problem}\n" in str(error.value)
    assert "columns found: photo, Query, label" in str(error.value)
    assert str(error.value).endswith(f"this may fit: --map {line}")
    export(name, "--map", *line.split(), "--val-fraction=0", "--test-fraction=0")  # the line does fit
    assert rows_of("train")[0].keys() - {"image", "question"} == {"answers" if "answers" in line else "answer"}
    assert "Columns: given by --map" in open("out/README.md").read()


def test_wrong_words_of_map_and_unknown_sets_are_refused(tmp_path):
    for word in ("question", "question=", "=query"):
        with pytest.raises(InputError, match="is not FIELD=COLUMN"):
            export("some/set", "--map", word)
    with pytest.raises(InputError, match="nobody/nothing"):
        export("nobody/nothing")


def test_datasets_is_asked_for_in_one_line_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(hub_sets, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        export("kvasir-vqa")
    assert "pip install datasets" in str(error.value) and "\n" not in str(error.value)
