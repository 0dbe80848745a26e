"""All wrong settings are named at once; the command line overrides the file, which overrides the defaults."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from runs import ROOT

from common import InputError
from training.description import without_effect
from training.settings import build_parser, parse_settings, to_toml


@pytest.fixture
def rows_file(tmp_path) -> str:
    (tmp_path / "rows.jsonl").write_text("{}")
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "settings.toml").write_text(text, encoding="utf-8")
        return ["--config", str(tmp_path / "settings.toml")]

    return write


def problems_of(argv, defaults=None) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_settings(argv, defaults)
    return str(caught.value).split("\n  ")[1:]


# name: (arguments, what the one problem says)
WRONG = {
    "not a whole number": (["--epochs", "three"], "--epochs: 'three' is not a whole number"),
    "a part of one": (["--batch-size", "1.5"], "--batch-size: '1.5' is not a whole number"),
    "not a number": (["--lr", "fast"], "--lr: 'fast' is not a number"),
    "negative": (["--warmup", "-1"], "--warmup: must be at least 0, not -1"),
    "no learning rate": (["--lr", "0"], "--lr: must be over 0, not 0"),
    "no LoRA": (["--lora-alpha", "0"], "--lora-alpha: must be over 0, not 0"),
    "zero": (["--lora-r", "0"], "--lora-r: must be at least 1, not 0"),
    "over one": (["--lora-dropout", "1.5"], "--lora-dropout: must be from 0 to 0.99, not 1.5"),
    "nan": (["--lr", "nan"], "--lr: 'nan' is not a finite number"),
    "inf": (["--lr", "inf"], "--lr: 'inf' is not a finite number"),
    "choice": (["--schedule", "sine"], "--schedule: 'sine' is none of cosine, linear, constant"),
    "misspelt choice": (
        ["--schedule", "Cosin"],
        "--schedule: 'Cosin' is none of cosine, linear, constant; did you mean cosine?",
    ),
    "misspelt auto": (["--memory-budget", "atuo"], "--memory-budget: must be auto or a number from 0 to 1, not 'atuo'"),
    "unknown flag": (["--learning-rate=1"], "--learning-rate: no such flag"),
    "shortened flag": (["--epoch=1"], "--epoch: no such flag; did you mean --epochs?"),
    "word without a flag": (["train.jsonl"], "'train.jsonl' belongs to no flag"),
    "flag without its value": (["--epochs"], "--epochs: expected one argument"),
    "config without its value": (["--config"], "--config: expected one argument"),
    "switch with a value": (["--skip-bad=yes"], "--skip-bad"),
    "missing config": (["--config", "nowhere.toml"], "--config: nowhere.toml does not exist"),
    "missing rows": (["--train", "nowhere.jsonl"], "--train: nowhere.jsonl does not exist"),
    "missing images": (["--images", "nowhere"], "--images: nowhere does not exist"),
    "images are a file": (["--images", __file__], f"--images: {__file__} is no folder"),
    "config is a folder": (["--config", "/"], "--config: / is a folder, no file"),
    "a name that is too long": (["--val", "x" * 300], f"--val: {'x' * 300} does not exist"),
    "missing validation rows": (["--val", "nowhere.jsonl"], "--val: nowhere.jsonl does not exist"),
    "rows are a folder": (["--val", "/"], "--val: / is a folder, no file"),
    "two validations": (["--val", __file__, "--val-fraction", "0.1"], "--val-fraction: --val names rows"),
    "weights for other files": (["--train-weights", "1", "2"], "--train-weights: 2 for 1 files of --train"),
    "no weight": (["--train-weights", "0"], "--train-weights: must be at least 0.001, not 0"),
    "template without a question": (
        ["--prompt", "Answer briefly."],
        "--prompt: 'Answer briefly.' must hold {question}",
    ),
    "patience without evaluations": (["--patience", "3"], "--patience: there is nothing to evaluate on"),
    "first weights that are not there": (["--init-from", "/"], "--init-from: / holds no adapter_model.safetensors"),
    "no regular expression": (["--lora-targets", "q_proj,(v"], "--lora-targets: '(v' is not a regular expression"),
    "flag within": (["--lora-targets", "(?i)Q_PROJ"], "--lora-targets: '(?i)Q_PROJ' is not a regular expression"),
    "pixels": (["--min-pixels", "900", "--max-pixels", "800"], "--min-pixels 900 is over --max-pixels 800"),
    "resume without output": (["--resume", "auto"], "--resume auto: say where with --output"),
    "missing checkpoint": (["--resume", "nowhere"], "--resume: nowhere does not exist"),
    "checkpoint is a file": (["--resume", __file__], f"--resume: {__file__} is no folder"),
    "misspelt resume": (["--resume", "atuo"], "--resume: atuo does not exist; did you mean auto?"),
    "missing first weights": (["--init-from", "nowhere"], "--init-from: nowhere does not exist"),
    "first weights are a file": (["--init-from", __file__], f"--init-from: {__file__} is no folder"),
    "model is a file": (["--model", __file__], f"--model: {__file__} is no folder"),
    "output is a file": (["--output", __file__], f"--output: {__file__} is no folder"),
    "home behind =": (["--output", "~/runs/mine"], "--output: ~/runs/mine: a shell expands ~ only"),
    "home of another": (["--images", "~ann/pictures"], "--images: ~ann/pictures: a shell expands ~"),
    "cache is a file": (["--vision-cache", __file__], f"--vision-cache: {__file__} is no folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named_with_its_flag(rows_file, name):
    argv, message = WRONG[name]
    rows = [] if argv[0] == "--train" else ["--train", rows_file]
    (problem,) = problems_of([*rows, "--seed=0", *argv])
    assert problem.startswith(message.split(" ")[0]) and message in problem


def test_all_wrong_settings_are_named_at_once(rows_file, config):
    not_beside_others = ("flag without its value", "switch with a value", "patience without evaluations")
    # A resumed run does not need the first weights.
    not_beside_others += tuple(name for name in WRONG if "first weights" in name)
    once = {
        argv[0]: argv for name, (argv, _) in WRONG.items() if name not in not_beside_others and argv[0] != "--config"
    }
    argv = [word for words in once.values() for word in words]  # the last value of a flag counts
    problems = problems_of([*argv, *config("no-such-setting = 3\nkeep = 0\n")])
    assert len(problems) == len(once) + 2
    for flag in once:
        assert any(flag.partition("=")[0] in problem for problem in problems)
    assert any("no setting no-such-setting = 3" in problem for problem in problems)
    assert any("--keep: must be at least 1, not 0" in problem for problem in problems)


@pytest.mark.parametrize(("written", "meant"), [("true", "on"), ("false", "off"), ('"auto"', "auto")])
def test_settings_files_of_older_versions_say_whether_to_compile(config, written, meant):
    assert parse_settings(config(f"compile = {written}\n")).compile == meant


def test_the_default_recipe_holds_the_defaults():
    values = tomllib.loads((ROOT / "recipes" / "default.toml").read_text(encoding="utf-8"))
    defaults = vars(build_parser().parse_args([]))
    assert values == {name: defaults[name.replace("-", "_")] for name in values}


def test_a_list_is_given_once(rows_file):
    assert problems_of([f"--train={rows_file}", "--train", rows_file]) == [
        "--train: given twice; name everything behind one --train"
    ]


def test_a_flag_without_its_value_hides_no_problem_of_the_file(config):
    problems = problems_of([*config("no-such-setting = 3\n"), "--epochs"])
    assert len(problems) == 2


NEAREST = {
    "--bacth-size=8": "--batch-size",
    "--batch_size=8": "--batch-size",
    "--LR=1": "--lr",
    "-lr=1": "--lr",
    "—epochs=1": "--epochs",  # one dash that was two
    "--lora-rank=8": "--lora-r",
    "--questions=3": "--questions-per-image",
    "--eval-steps=3": "--eval-every",
    "--no-skpi-bad": "--no-skip-bad",
    "--per-device-train-batch-size=4": "",
}


@pytest.mark.parametrize("word", NEAREST)
def test_a_misspelt_flag_suggests_the_nearest(word):
    flag = word.partition("=")[0]
    assert problems_of([word]) == [f"{flag}: no such flag" + f"; did you mean {NEAREST[word]}?" * bool(NEAREST[word])]


def test_a_misspelt_flag_is_named_without_its_values_and_beside_other_problems():
    expected = ["--bacth-size: no such flag; did you mean --batch-size?"]
    assert problems_of(["--bacth-size", "8"]) == expected
    assert problems_of(["--bacth-size", "8", "--epochs"]) == [*expected, "--epochs: expected one argument"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning-rate = 1e-4", "no setting learning-rate = 0.0001"),
        ("bacth_size = 8", "no setting bacth_size = 8; did you mean batch-size?"),
        ("lr = [1e-4]", "no setting lr = [0.0001]"),
        ("train-weights = [true]", "no setting train-weights = [True]"),
        ("train-weights = ['much']", "--train-weights: 'much' is not a number"),
        ("[optimization]\nlr = 1e-4", "no setting optimization = "),
        ("help = true", "no setting help = True"),
        ("config = 'other.toml'", "no setting config = 'other.toml'"),
        ("no-skip-bad = true", "no setting no-skip-bad = True"),
        ("skip-bad = 'yes'", "skip-bad = 'yes': must be true or false"),
        ("epochs = true", "epochs = True: must be a value, not true or false"),
        ("epochs = 1.5", "--epochs: '1.5' is not a whole number"),
        ("dtype = 'float16'", "--dtype: 'float16' is none of auto, bfloat16, float32"),
        ("epochs = 1 2", "line 1"),
        ("batch-size = 8\nbatch_size = 4", "batch-size and batch_size are the same setting"),
    ],
)
def test_a_wrong_line_of_the_settings_file_is_named(config, line, message):
    (problem,) = problems_of(config(line))
    assert message in problem


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(config):
    defaults = {"epochs": 7, "batch_size": 7, "lora_r": 7}
    settings = parse_settings([*config("epochs = 8\nbatch-size = 8\n"), "--epochs", "9"], defaults)
    assert (settings.epochs, settings.batch_size, settings.lora_r) == (9, 8, 7)
    assert settings.keep == build_parser().get_default("keep")


def test_false_on_the_command_line_overrides_true_in_the_file(config):
    assert parse_settings(config("skip-bad = true")).skip_bad is True
    assert parse_settings([*config("skip-bad = true"), "--no-skip-bad"]).skip_bad is False
    assert parse_settings(config("skip-bad = false"), {"skip_bad": True}).skip_bad is False


def test_keys_are_written_with_dashes_or_underscores(config):
    settings = parse_settings(config("\ufefflora-r = 4\nlora_alpha = 9\nallow_outside_images = true\n"))
    assert (settings.lora_r, settings.lora_alpha, settings.allow_outside_images) == (4, 9.0, True)


@pytest.mark.parametrize(
    "system", ["", "Antworte kurz: «ja» 🩺 = \\ \"x\" 'y'", "two\nlines\t\x7f\x01", "--system", "#"]
)
def test_the_written_file_reads_back_to_the_same_settings(rows_file, config, system):
    argv = ["--train", rows_file, f"--system={system}", "--lr", "1e-5", "--warmup", "20", "--skip-bad", "--max-steps=7"]
    settings = parse_settings(argv)
    written = to_toml(settings)
    again = parse_settings(config(written))
    assert vars(again) | {"config": ""} == vars(settings)
    assert to_toml(again) == written


def test_a_file_of_rows_that_is_a_link_keeps_its_name(tmp_path, rows_file):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to(rows_file)
    (tmp_path / "link").symlink_to("snapshot")
    settings = parse_settings(["--train", str(tmp_path / "link" / "train.jsonl")])
    assert settings.train == [str(tmp_path / "snapshot" / "train.jsonl")]


def test_a_folder_whose_name_begins_with_a_tilde_can_be_used(rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~mine").mkdir()
    assert parse_settings(["--train", rows_file, "--images=~mine"]).images == str(tmp_path / "~mine")


def test_a_run_s_settings_do_not_resume_it_by_themselves(rows_file, config):
    resumed = parse_settings(["--train", rows_file, "--output=x", "--resume=auto"])
    assert resumed.resume == "auto" and parse_settings(config(to_toml(resumed))).resume == "none"


def test_the_defaults_read_back_too(config):
    settings = parse_settings([])
    assert vars(parse_settings(config(to_toml(settings)))) | {"config": ""} == vars(settings)


def test_paths_are_kept_whole_and_images_start_beside_the_rows(rows_file, monkeypatch):
    folder = Path(rows_file).parent
    monkeypatch.chdir(folder)
    settings = parse_settings(["--train", "rows.jsonl", "--val", "rows.jsonl"])
    assert [settings.val] == settings.train == [rows_file] and settings.images == str(folder)


def test_folders_are_the_same_ones_from_wherever_the_settings_are_read(rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("old").mkdir()
    words = ["--model=model", "--vision-cache=cache", "--resume=old", f"--train={rows_file}"]
    settings = parse_settings(words)
    folders = [settings.model, settings.vision_cache, settings.resume]
    assert folders == [str(tmp_path / name) for name in ("model", "cache", "old")]
    settings = parse_settings([f"--train={rows_file}", "--output=x", "--resume=auto"])
    assert [settings.model, settings.vision_cache, settings.resume] == ["Qwen/Qwen3-VL-8B-Instruct", "", "auto"]


def test_a_run_in_place_of_a_checkpoint_to_resume_is_named(rows_file, tmp_path):
    (tmp_path / "run" / "checkpoint-000002").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-000002" / "state.pt").touch()
    (problem,) = problems_of([f"--train={rows_file}", f"--resume={tmp_path / 'run'}"])
    assert problem == (
        f"--resume: {tmp_path / 'run'} is a run, not one of its checkpoints; "
        f"--output {tmp_path / 'run'} --resume auto goes on with it"
    )
    parse_settings([f"--train={rows_file}", f"--resume={tmp_path / 'run' / 'checkpoint-000002'}"])


def test_every_flag_has_a_help_text():
    actions = build_parser()._actions
    assert len(actions) > 30
    assert [action.dest for action in actions if not action.help] == []
    assert "--allow-outside-images" in build_parser().format_help()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "--batch-size"),
        (["--train", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["--config", "nowhere.toml"], 2, "nowhere.toml"),
    ],
)
def test_only_rank_0_answers_and_names_wrong_paths_before_torch_is_imported(tmp_path, words, code, said):
    for name in ("torch", "numpy", "transformers"):  # importing one of these would fail
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "train.py", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and said in done.stdout and not done.stderr
    done = subprocess.run(command, env=environment | {"RANK": "1"}, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "imported" and not done.stdout  # only rank 0 speaks


@pytest.mark.parametrize(
    ("words", "steps", "told"),
    [
        ([], 30, ""),
        ([], 29, "29 optimizer steps in all may be too few to learn from\n  a lower --batch-size or more --epochs"),
        (["--warmup=100"], 100, "--warmup 100: the run has 100 steps and never gets to --lr"),
        (["--warmup=100"], 101, ""),
        (["--patience=2"], 600, "--patience 2 can't end a run of 600 steps with --eval-every 200"),
        (["--patience=2"], 601, ""),
        (["--patience=2", "--eval-every=0"], 9000, "--patience 2 can't end a run of 9,000 steps with --eval-every 0"),
        (["--patience=2", "--warmup=100", "--max-steps=5"], 5, ""),
        (["--time-limit=4"], 99, "--time-limit ends no run: --plan compares its hours with the limit"),
        (["--time-limit=4", "--plan"], 99, ""),
        (
            ["--prompt={question}\\nBriefly.", "--system=a\\nb"],
            99,
            "--system and --prompt: \\n is two characters there",
        ),
        (["--prompt={question}\nBriefly."], 99, ""),
    ],
)
def test_settings_that_can_not_do_what_they_say_are_told(words, steps, told):
    warnings = without_effect(parse_settings(words), steps)
    assert len(warnings) == bool(told) and all(warning.startswith(told) for warning in warnings)
