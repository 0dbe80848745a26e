"""What docs/ says is so: commands run, flags and defaults are the program's, rows parse, named tests exist."""

import argparse
import csv
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hub_files import write_set
from pictures import png

import eval as evaluation
import merge
import train
from inputs import hub
from inputs.hub_sets import SETS
from inputs.row_files import read_rows
from training import eval_settings, merge_settings, settings
from training.settings import FREE_SETTINGS, Wrong

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PARSERS = {f"{name}.py": module.build_parser for name, module in
           {"train": settings, "eval": eval_settings, "merge": merge_settings}.items()}  # fmt: skip
OF_OTHERS = {"--nproc_per_node", "--max-restarts", "--help", "--repo-type", "--local-dir"}


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.M)[0]


# ---------------------------------------------------------------------------------------------------------------- flags


def flags_of(program: str) -> dict[str, argparse.Action]:
    actions = PARSERS[program]()._actions
    return {action.option_strings[0]: action for action in actions if action.option_strings and action.dest != "help"}


def flag_rows(program: str) -> dict[str, list[str]]:
    rows = [line for line in section(text_of("flags.md"), program).splitlines() if line.startswith("| `--")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.parametrize("program", PARSERS)
def test_every_flag_has_a_row_with_its_default(program):
    written, actions = flag_rows(program), flags_of(program)
    assert written.keys() == actions.keys()
    for flag, (default, unit, *_) in written.items():
        expected = actions[flag].default
        if isinstance(expected, bool):
            assert default == ("on" if expected else "off") and unit == "switch", flag
        elif expected in ("", None, []):
            assert default == "", flag
        else:
            assert type(expected)(default) == expected, flag


@pytest.mark.parametrize("program", PARSERS)
def test_values_and_the_way_to_turn_a_flag_off_are_accepted(program):
    actions = flags_of(program)
    for flag, (_, unit, off, _) in flag_rows(program).items():
        action = actions[flag]
        accepted = action.type or str
        if inspect.isfunction(accepted) and (names := inspect.getclosurevars(accepted).nonlocals.get("names")):
            assert set(re.findall(r"`([^`]+)`", unit)) == set(names), flag
        if isinstance(action, argparse.BooleanOptionalAction):
            assert off == f"`{action.option_strings[1]}`", flag
        elif value := re.fullmatch(r"`([^`]+)`", off):
            assert not isinstance(accepted(value[1]), Wrong), flag
        else:
            assert off == "-" or off.startswith("leave out") and not action.required, flag


def test_the_flags_that_resuming_lets_change_are_the_program_s():
    (sentence,) = re.findall(r"Free to change are (.*?)\.\n", text_of("flags.md"), re.S)
    named = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", sentence)}
    assert named == FREE_SETTINGS - {"config", "resume"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_flag_that_is_not_there(page):
    known = {word for build in PARSERS.values() for action in build()._actions for word in action.option_strings}
    known |= {word for action in hub.build_parser()._actions for word in action.option_strings}
    for bench in (ROOT / "bench").glob("*.py"):
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', bench.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", page.read_text(encoding="utf-8")))
    assert named <= known | OF_OTHERS


# ------------------------------------------------------------------------------------------------------- the first hour


def run_command(words: list[str], model: Path) -> None:
    """Run a command of the docs in this process, with a tiny model and few steps."""
    while words[0] in ("python", "torchrun", "-m") or words[0].startswith("--nproc"):
        words = words[1:]
    programs = {"train.py": train.main, "eval.py": evaluation.main, "merge.py": merge.main, "inputs.hub": hub.main}
    short = {"train.py": [f"--model={model}", "--max-steps=2", "--batch-size=4", "--workers=0", "--lr=0.02"]}
    short |= {"eval.py": ["--max-new-tokens=4", "--workers=0"], "merge.py": [], "inputs.hub": []}
    assert programs[words[0]]([*words[1:], *short[words[0]]]) == 0, words


def test_the_first_hour_runs_from_a_csv_file_to_a_merged_model(world, tmp_path, monkeypatch, capsys):
    page = text_of("first-hour.md")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "images", "pictures")
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    rows = [row for row in rows if isinstance(row.get("image"), str)]
    with open("questions.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["image", "question", "answer"])
        table.writeheader()
        table.writerows(rows)
    (conversion,) = blocks(page, "python")
    exec(conversion, {})
    written = {name: [json.loads(line) for line in Path(name).read_text().splitlines()] for name in
               ("train.jsonl", "val.jsonl")}  # fmt: skip
    both = written["train.jsonl"] + written["val.jsonl"]
    assert sorted(both, key=str) == sorted(rows, key=str) and all(written.values())
    assert not {row["image"] for row in written["train.jsonl"]} & {row["image"] for row in written["val.jsonl"]}

    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [line for line in commands if not line.startswith("pip ")]
    assert [line.split()[1] for line in commands] == ["train.py"] * 2 + ["--nproc_per_node=4"] + ["train.py"] + [
        "eval.py", "eval.py", "merge.py"]  # fmt: skip
    for line in commands:
        if line.startswith("torchrun"):  # the line above on more GPUs
            assert line.split(" train.py ")[1] == commands[1].split(" train.py ")[1]
            continue
        capsys.readouterr()
        run_command(shlex.split(line), world / "model")
        printed = capsys.readouterr().out
        if "--question" in line:
            assert re.fullmatch(r".*\nconfidence [01]\.\d{4}, answered after \d+ s\n", printed)
    assert Path("runs/first/status").read_text().startswith("done 2\n")
    assert list(Path("runs/first").glob("eval/checkpoint-*/report.html")) and Path("merged/config.json").is_file()


def test_json_lines_are_split_as_the_csv_file_is(tmp_path, monkeypatch):
    page = text_of("first-hour.md")
    monkeypatch.chdir(tmp_path)
    rows = [{"image": f"{number // 3}.png", "question": "?", "answer": "ja"} for number in range(60)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (conversion,), (reading,) = blocks(page, "python"), re.findall(r"`(rows = list\(map.*?)`", page)
    exec(re.sub(r"rows = .*", lambda _: reading, conversion, count=1), {})
    assert [len(Path(name).read_text().splitlines()) for name in ("train.jsonl", "val.jsonl")] == [54, 6]


# ------------------------------------------------------------------------------------------------------------ data sets


def test_data_sets_of_the_hub_are_exported_planned_trained_and_scored_as_the_page_says(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    texts = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    texts = [{name: row[name] for name in ("question", "answer")} for row in texts if isinstance(row.get("image"), str)]
    rows = [{"image": {"bytes": png(40, 30, bytes([0, *[n] * 120] * 30)), "path": None}, **texts[n % len(texts)]}
            | {"img_id": f"c{n}", "source": "Polyps"} for n in range(30)]  # fmt: skip
    asked = [{"img_id": f"c{n}", **texts[n % 2], "complexity": 1, "question_class": ["count"]} for n in range(30)]
    write_set(tmp_path, "SimulaMet-HOST/Kvasir-VQA", raw=rows)
    write_set(tmp_path, "SimulaMet/Kvasir-VQA-x1", train=asked[:-2], test=asked[-2:])
    commands = [line for block in blocks(text_of("data-sets.md"), "bash") for line in block.splitlines()]
    assert [line.split()[1] for line in commands] == ["install", "-m"] + ["train.py"] * 2 + ["--nproc_per_node=4"] + [
        "eval.py", "-m", "train.py", "eval.py"]  # fmt: skip
    for line in commands:
        if line.startswith("torchrun"):  # the line above on more GPUs
            assert line.split(" train.py ")[1] == commands[3].split(" train.py ")[1]
        elif not line.startswith("pip "):
            run_command(shlex.split(line), world / "model")
    for name in ("kvasir-vqa", "kvasir-vqa-x1"):
        assert Path(f"runs/{name}/status").read_text().startswith("done 2\n")
        assert list(Path(f"runs/{name}").glob("eval/checkpoint-*/report.html"))


def test_the_page_on_data_sets_lists_those_that_are_known():
    listed = re.findall(r"^\| `([\w-]+)` \| ([\w-]+/[\w-]+)", text_of("data-sets.md"), re.M)
    assert dict(listed) == {key: known.name for key, known in SETS.items()} and len(listed) == len(SETS)


# ---------------------------------------------------------------------------------------------------------- coming from


def test_our_defaults_beside_others_are_the_program_s():
    actions = flags_of("train.py")
    named = re.findall(r"\| `(--[a-z-]+)` ([\w.]+)(?:: off)? \|", text_of("coming-from.md"))
    assert len(named) > 15
    for flag, default in named:
        assert type(actions[flag].default)(default) == actions[flag].default, flag


def parsed(path: Path) -> list[tuple]:
    good, bad = read_rows(path)
    assert not bad, bad
    return [(row.messages, row.images) for row in good]


def test_rows_of_other_trainers_are_the_same_row_here(tmp_path):
    examples = "".join(blocks(section(text_of("coming-from.md"), "Rows that are read as they are"), "json"))
    (tmp_path / "rows.jsonl").write_text(examples)
    first, *others = parsed(tmp_path / "rows.jsonl")
    assert len(others) == 6 and all(row == first for row in others)
    assert first[1] == ["a.jpg"]


def test_rows_that_are_not_read_are_refused_and_the_conversion_makes_them_the_same_row(tmp_path, monkeypatch):
    page = text_of("coming-from.md")
    text = section(page, "Rows to be converted")
    monkeypatch.chdir(tmp_path)
    Path("theirs.jsonl").write_text("".join(blocks(text, "json")))
    good, bad = read_rows(Path("theirs.jsonl"))
    assert not good and len(bad) == 3
    assert all("no question, conversations or messages field among: " in row.reason for row in bad)
    (conversion,) = blocks(text, "python")
    exec(conversion, {})
    Path("read.jsonl").write_text(blocks(section(page, "Rows that are read as they are"), "json")[0])
    (expected,) = parsed(Path("read.jsonl"))
    assert parsed(Path("rows.jsonl")) == [expected] * 3


# ------------------------------------------------------------------------------------------------------------------ all


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"tests/([\w/]+\.py)::(test_\w+)", "".join(page.read_text() for page in PAGES)))
    assert len(named) > 30
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), (file, name)


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *PAGES]
    links = {(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())}
    assert {link for page, link in links if page.name == "README.md"} >= {f"docs/{page.name}" for page in PAGES}
    assert [(page, link) for page, link in links if not (page.parent / link).is_file()] == []
