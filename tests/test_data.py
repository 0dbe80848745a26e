"""The model sees what rows and pictures say; nothing unusable passes, and nothing is lost silently (promise 4)."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from examples import BAD, FORMATS, flat, parts
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data as data_file
from common import InputError
from data import Sample, TreeDataset, VQAData, load_data
from inputs.images import image_settings
from inputs.refused import stop_or_skip_bad
from training.description import describe_data, describe_sample, describe_unshared, length_histogram
from training.settings import parse_settings
from trees import Assignment, PlanSettings, group_samples, grow_tree, make_plan, rank_efficiency

SHARED = Path(__file__).parents[2] / "shared"
KVASIR, QWEN = SHARED / "kvasir" / "kvasir_vqa_val.jsonl", SHARED / "qwen3-vl-8b"


def trained_text(sample, tokenizer) -> str:
    return tokenizer.decode(sample.ids[sample.trained].tolist())


# ------------------------------------------------------------------------------------------------------- rows to tokens


def test_a_question_has_the_same_tokens_in_every_format(load):
    same = [
        name for name, (_, images, turns) in FORMATS.items() if images == ["a.png"] and turns[1] == "assistant: two"
    ]
    assert len(same) >= 8 and {name.split(",")[0] for name in same} >= {"flat", "LLaVA", "messages", "parts"}
    data = load([FORMATS[name][0] for name in same])
    assert not data.bad
    first = data.samples[0]
    for sample in data.samples:
        assert sample.ids.tolist() == first.ids.tolist() and sample.trained.tolist() == first.trained.tolist()
        assert sample.images == first.images and sample.image_at == first.image_at


def test_ids_are_the_chat_template_s_text_with_each_image_at_its_real_length(world, tokenizer):
    """The template's text is tokenized as a whole, with as many pad tokens as the image processor's own grid gives."""
    data, dataset = tiny.load_world(world)
    processor = Qwen2VLImageProcessorPil.from_pretrained(world / "model")
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    for index, (row, sample) in enumerate(zip(rows, data.samples, strict=True)):
        names = row.get("images") or row.get("image") or []
        names = [names] if isinstance(names, str) else names
        messages = row.get("messages") or [
            tiny.turn("user", row["question"], len(names)),
            tiny.turn("assistant", row["answer"]),
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        head, *tails = text.split("<|image_pad|>")
        for name, tail in zip(names, tails, strict=True):
            grid = processor([Image.open(world / "images" / name)], return_tensors="pt")["image_grid_thw"]
            head += "<|image_pad|>" * (int(grid.prod()) // 4) + tail
        batch = dataset[Assignment((grow_tree(data.samples, [index]),))]
        assert batch.ids.tolist() == tokenizer(head)["input_ids"] and len(batch.ids) == sample.tokens
        assert tokenizer.decode(batch.ids[batch.image_at].tolist()) == "<|image_pad|>" * sum(sample.image_tokens)


def test_trained_tokens_are_exactly_the_answers_and_their_end_of_turn(load, tokenizer):
    answers = ["yes", "息肉 🩺, 5-10 mm", " leading and trailing ", "two\n\nlines", "long " * 3000, "0"]
    rows = [flat(answer, image="a.png") for answer in answers]
    rows.append(FORMATS["messages, system and turns"][0])
    data = load(rows)
    assert not data.bad
    texts = [trained_text(sample, tokenizer) for sample in data.samples]
    assert texts == [f"{answer}<|im_end|>" for answer in answers] + ["red<|im_end|>white<|im_end|>"]
    assert [sample.fields["answer"] for sample in data.samples] == [*answers, "white"]
    for sample in data.samples:
        assert sample.trained[sample.before_answers] and not sample.trained[: sample.before_answers].any()


def test_a_described_sample_shows_trained_tokens_and_images(load, tokenizer):
    data = load([FORMATS["messages, system and turns"][0]])
    assert describe_sample(data.samples[0], tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><36 image tokens><|vision_end|>What colour?<|im_end|>\n"
        "<|im_start|>assistant\n⟦red<|im_end|>⟧\n"
        "<|im_start|>user\n<|vision_start|><40 image tokens><|vision_end|>And here?<|im_end|>\n"
        "<|im_start|>assistant\n⟦white<|im_end|>⟧"
    )


def test_the_system_prompt_is_for_rows_that_have_none(load, tokenizer):
    rows = [flat(image="a.png"), FORMATS["messages, system and turns"][0], FORMATS["LLaVA, text only"][0]]
    plain, prompted = (load(rows, system=system).samples for system in ("", "Answer in one word."))
    head = "<|im_start|>system\nAnswer in one word.<|im_end|>\n"
    for before, after, expected in zip(plain, prompted, [head, "", head]):
        assert tokenizer.decode(after.ids.tolist()) == expected + tokenizer.decode(before.ids.tolist())
        assert trained_text(after, tokenizer) == trained_text(before, tokenizer)


def test_the_template_is_put_around_every_question_and_behind_leading_images(load, tokenizer):
    names = ["flat, image", "flat, placeholder", "LLaVA, system and turns", "messages, text only"]
    plain, prompted = (
        load([FORMATS[n][0] for n in names], prompt=p).samples for p in ("{question}", "Q: {question} {A}!")
    )
    for before, after, name in zip(plain, prompted, names, strict=True):
        expected, text = (tokenizer.decode(sample.ids.tolist()) for sample in (before, after))
        questions = [turn.removeprefix("user: ").strip("▣") for turn in FORMATS[name][2] if turn.startswith("user")]
        for question in questions:  # "and" has an image behind it
            tail = "<|vision_start|><|image_pad|><|vision_end|>" if question == "and" else ""
            expected = expected.replace(f"{question}{tail}<", f"Q: {question} {{A}}!{tail}<")
        assert text == expected and text.count("Q: ") == len(questions)
        assert trained_text(after, tokenizer) == trained_text(before, tokenizer) and after.fields == before.fields
    (two,) = load(
        [flat(question="first <image> then <image>", image=["a.png", "b.png"])], prompt="Q: {question}!"
    ).samples
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\nQ: first{image}then!{image}<|im_end|>" in tokenizer.decode(two.ids.tolist())


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|video_pad|>", "<|endoftext|>"])
def test_literal_special_tokens_are_refused(load, token):
    rows = [flat(question=f"What is {token}?"), flat(f"It is {token}.")]
    rows += [json.loads(json.dumps(FORMATS[n][0]).replace("And here", f"A{token}")) for n in FORMATS if "system" in n]
    rows += [json.loads(json.dumps(FORMATS[n][0]).replace("Be brief", f"B{token}")) for n in FORMATS if "system" in n]
    rows.append(parts([f"What is {token[:4]}", f"{token[4:]}?"], ["two"]))
    data = load([*rows, flat()])
    assert [bad_row.where for bad_row in data.bad] == [f"rows.jsonl:{n + 1}" for n in range(len(rows))]
    assert all(f"special token {token}" in bad_row.reason for bad_row in data.bad) and len(data.samples) == 1
    with pytest.raises(InputError, match="system prompt"):
        load([flat()], system=f"Say {token}.")
    with pytest.raises(InputError, match="--prompt template"):
        load([flat()], prompt=f"{{question}}{token}")
    (bad,) = load([flat(question=f"{token[4:]} is what?")], prompt=f"{token[:4]}{{question}}").bad
    assert f"special token {token}" in bad.reason


@pytest.mark.parametrize(
    ("written", "moved"),
    [
        (flat(question="So? <image>", image="a.png"), flat(question="<image>So?", image="a.png")),
        (parts(["So?", "@a.png"], ["no"]), parts(["@a.png", "So?"], ["no"])),
        (
            flat(question="first <image> then <image> so?", image=["b.png", "a.png"]),
            flat(question="first then so?", image=["b.png", "a.png"]),
        ),
        (parts(["Is ", "@a.png", " red?"], ["no"]), parts(["@a.png", "Is  red?"], ["no"])),
        (
            parts(["@a.png", "So?"], ["no"], ["And?", "@b.png", "@c.png"], ["two"]),
            parts(["@a.png", "So?"], ["no"], ["@b.png", "@c.png", "And?"], ["two"]),
        ),
    ],
)
def test_image_first_moves_images_before_the_text_of_their_turn_in_their_order(load, written, moved):
    (expected,), (first,), (as_written,) = (
        load([moved], prompt="Q: {question}").samples,
        load([written], prompt="Q: {question}", image_first=True).samples,
        load([written], prompt="Q: {question}").samples,
    )
    assert first.ids.tolist() == expected.ids.tolist() != as_written.ids.tolist()
    assert first.images == expected.images == as_written.images


def test_questions_whose_text_comes_first_are_told_that_they_share_no_picture(load):
    late = [flat(question=f"Is there {n}? <image>", image="a.png") for n in range(20)]
    other = [flat(question=f"Is {n} <image> or <image>?", image=["b.png", "c.png"]) for n in range(2)]
    early, same = flat(image="a.png"), [flat(question=f"Look: <image> Is it {n}?", image="d.png") for n in range(3)]

    def told(*rows, **options) -> str:
        return describe_unshared(load(rows, **options).samples)

    moves = "--image-first moves the picture"
    assert told(*late) == f"20 questions about 1 picture do not share it: their text comes first\n  {moves}"
    assert told(late[0], early) == f"1 question about 1 picture does not share it: its text comes first\n  {moves}"
    moves = moves.replace("picture", "pictures")
    assert told(*late, *other) == f"22 questions about 3 pictures do not share them: their text comes first\n  {moves}"
    assert told(late[0], *other[:1], early, early, *same[:1]).startswith("1 question about 1 picture")
    assert told(late[0], other[0], *same) == told(*late, *other, early, *same, image_first=True) == ""
    assert len(group_samples(load([*late, early], image_first=True).samples)) == 1
    assert len(group_samples(load([*late, early]).samples)) == 21


def test_the_fingerprint_changes_with_the_picture_s_folder_and_not_with_that_of_all(load, world, tmp_path):
    for name in ("one/a.png", "one/b/a.png", "two/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((world / "images" / "a.png").read_bytes())

    def fingerprint(folder, image):
        return load([flat(image=image)], images=tmp_path / folder).fingerprint(str(tmp_path / folder))

    assert fingerprint("one", "a.png") == fingerprint("two", "a.png") != fingerprint("one", "b/a.png")


def test_the_fingerprint_has_weights_and_is_that_of_the_first_checkpoints_where_a_row_has_one():
    ids, fields = np.arange(6, dtype=np.int32), {}

    def fingerprint(*weights) -> str:
        first = Sample("a", "r:1", ("/p/a.png",), ids, np.array([0, 0, 0, 0, 0.1, 0.1]), 4, (1,), (4,), (16,), fields)
        second = Sample("b", "r:2", (), ids, np.array(weights), 4, (), (), (), fields, file=1)
        return VQAData(["x"], [first, second], {"/p/a.png": (4, 4)}).fingerprint("/p")

    assert fingerprint(0, 0, 1.0, 0, 1.0, 1.0) == "d98cc212be4c6b81"  # of version 00dba3a
    others = [(0, 0, 1.0, 0, 0.5, 0.5), (0, 0, 0.5, 0, 1.0, 1.0), (0, 0, 1.0, 0, 0.5, 1.0), (0, 0, 0, 0, 1.0, 1.0)]
    others += [(0, 0, 0.5, 0, 0.5, 0.5), (0, 0, 1.0, 0, 0, 0)]
    assert len({"d98cc212be4c6b81", *(fingerprint(*weights) for weights in others)}) == len(others) + 1


def test_a_turn_s_weight_is_that_of_its_tokens_and_0_trains_none(load, tokenizer, capsys):
    turns = FORMATS["messages, system and turns"][0]
    weights = [{"weight": weight} for weight in (0.5, 3)]
    rows = [chat_with(turns, *weights), chat_with(turns, {"loss": False}, {}), chat_with(turns, {}, {"loss": False})]
    data = load([*rows, flat(image="a.png", weight=0.25), flat(image="a.png")])
    texts = [
        {w: tokenizer.decode(s.ids[s.weights == w].tolist()) for w in set(s.weights) - {0}} for s in data.samples[:3]
    ]
    assert texts == [{0.5: "red<|im_end|>", 3.0: "white<|im_end|>"}, {1.0: "white<|im_end|>"}, {1.0: "red<|im_end|>"}]
    for sample in data.samples[:3]:  # generated and compared all the same
        assert tokenizer.decode(sample.ids[sample.last_answer :].tolist()) == "white<|im_end|>"
        assert sample.fields["answer"] == "white"
    assert "red<|im_end|>\n" in describe_sample(data.samples[1], tokenizer).replace("⟦white<|im_end|>⟧", "")
    assert describe_sample(data.samples[2], tokenizer).endswith("assistant\nwhite<|im_end|>")
    describe_data(data, None, make_plan(data.samples, PlanSettings(9, 0, 0), 0), tokenizer)
    told = capsys.readouterr().out
    assert "rows whose `weight` is not 1: 2, with 0.25 to 3; the loss counts their answers by it" in told
    assert "rows whose last answer is not trained: 1\n  rows.jsonl:3" in told


def chat_with(row: dict, *fields: dict) -> dict:
    """The row with these fields in its answers."""
    fields = iter(fields)
    return row | {"messages": [m | (next(fields) if m["role"] == "assistant" else {}) for m in row["messages"]]}


def test_a_picture_that_is_damaged_after_the_check_is_named(load, world, settings, tmp_path):
    random = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    Image.fromarray(random).save(tmp_path / "a.png")
    data = load([flat(image="a.png")], images=tmp_path)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    (step,) = make_plan(data.samples, PlanSettings(1, 0, 0), 0)
    with pytest.raises(
        RuntimeError, match=r"an image of rows.jsonl:1 .*a\.png: broken PNG file"
    ):  # Pillow's SyntaxError
        TreeDataset(data, settings)[Assignment(step)]


def test_files_of_the_same_name_are_distinguished_by_as_many_folders_as_needed(tokenizer, settings, tmp_path):
    names = ["t.jsonl", "a/x/t.jsonl", "b/x/t.jsonl", "b/other.jsonl", "b/./x/t.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(flat()) + "\n")
    data = load_data([str(tmp_path / name) for name in names], tmp_path, tokenizer, settings, 1000)
    shown = [sample.where for sample in data.samples]
    assert shown[1:] == ["a/x/t.jsonl:1", "b/x/t.jsonl:1", "other.jsonl:1", "b/x/t.jsonl:1"]
    assert shown[0] == f"{tmp_path.name}/t.jsonl:1"


def test_an_over_long_sample_is_named_with_its_length_and_the_remedy(load):
    rows = [flat(image="a.png"), flat("long " * 500, image="a.png"), flat(image="d.png")]
    lengths = [sample.tokens for sample in load(rows).samples]
    data = load(rows, max_tokens=lengths[2])
    assert [sample.tokens for sample in data.samples] == [lengths[0], lengths[2]]  # not cut, and the limit is allowed
    (bad,) = data.bad
    assert bad.where == "rows.jsonl:2" and f"{lengths[1]:,} tokens" in bad.reason
    assert f"--max-tokens {lengths[2]:,}" in bad.reason and "--max-pixels" in bad.reason


# ------------------------------------------------------------------------------------------------------------- bad rows


def stop(data: VQAData, skip_bad: bool, output: Path, images: str = "") -> None:
    stop_or_skip_bad(data.bad, data.files, {sample.file for sample in data.samples}, skip_bad, output, images)


def bad_lines() -> list[str]:
    return [line for line, _ in BAD.values() if isinstance(line, str)]


def test_bad_rows_and_images_are_reported_together_in_the_order_of_the_file(load, tmp_path):
    good = flat(image="a.png")
    lines = [
        good,
        flat(image="gone.png"),
        *bad_lines(),
        flat("<|im_end|>", image="a.png"),
        flat(image="gone.png"),
        good,
    ]
    data = load([line if isinstance(line, str) else json.dumps(line) for line in lines])
    assert [bad_row.where for bad_row in data.bad] == [f"rows.jsonl:{n}" for n in range(2, len(lines))]
    assert [sample.where for sample in data.samples] == ["rows.jsonl:1", f"rows.jsonl:{len(lines)}"]
    with pytest.raises(InputError) as caught:
        stop(data, False, tmp_path)
    message = str(caught.value).split("\n  ")
    assert f"{len(data.bad)} rows can't be used" in message[0] and "--skip-bad" in message[0]
    assert message[1] == f"{data.bad[0].where}: {data.bad[0].reason}"
    assert message[-1] == f"all of them: {tmp_path / 'bad_rows.jsonl'}"


def test_bad_rows_jsonl_holds_all_of_them_and_good_ones_survive_skip_bad(load, tmp_path):
    data = load([json.dumps(flat(image="a.png")), *bad_lines()])
    (path,) = data.files
    data.files, data.bad = [path, "val.jsonl"], [*data.bad, replace(data.bad[0], file=1)]
    data.samples = [*data.samples, replace(data.samples[0], file=1)]
    stop(data, True, tmp_path)
    written = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["file"], row["where"], row["reason"]) for row in written] == [
        (data.files[row.file], row.where, row.reason) for row in data.bad
    ]
    assert written[0]["row"] == BAD["truncated"][0]
    assert [sample.where for sample in data.samples] == ["rows.jsonl:1"] * 2


def test_a_bad_row_of_a_one_line_array_spoils_no_other(world, tmp_path, tokenizer, settings):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([flat(image="gone.png"), flat(image="a.png"), flat(image="lost.png"), flat()]))
    data = load_data([path], world / "images", tokenizer, settings, 1000)
    assert [sample.where for sample in data.samples] == ["rows.json:1 row 2", "rows.json:1 row 4"]
    assert [bad_row.where for bad_row in data.bad] == ["rows.json:1", "rows.json:1 row 3"]


def test_without_bad_rows_nothing_is_written_and_an_old_list_goes(load, tmp_path):
    (tmp_path / "bad_rows.jsonl").write_text("of the run before")
    stop(load([flat()]), False, tmp_path)
    assert not (tmp_path / "bad_rows.jsonl").exists()


@pytest.mark.parametrize("rows", [[], ["[]"], ["{}"]])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_without_a_usable_row_stops_even_with_skip_bad(load, tmp_path, rows, skip_bad):
    with pytest.raises(InputError, match=r"rows.jsonl: no usable row\n  rows.jsonl:1: "):
        stop(load(rows), skip_bad, tmp_path)


def test_only_images_of_used_rows_count(load):
    data = load(
        [flat(image="a.png"), flat("<|im_end|>", image="b.png"), flat("long " * 500, image="c.png")], max_tokens=99
    )
    assert [Path(path).name for path in data.grids] == ["a.png"] and len(data.bad) == 2


# ------------------------------------------------------------------------------------- the real tokenizer and real rows


@pytest.fixture(scope="module")
def kvasir(tmp_path_factory):
    if not (KVASIR.exists() and QWEN.exists()):
        pytest.skip(f"needs the Kvasir-VQA rows and Qwen3-VL's tokenizer under {SHARED}")
    folder = tmp_path_factory.mktemp("pictures")
    rows = [json.loads(line) for line in KVASIR.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        (folder / row["image_filename"]).touch()

    def size(path: str) -> tuple[int, int]:
        height, width = ((1072, 1920), (576, 720), (332, 487), (1024, 1280))[zlib.crc32(Path(path).name.encode()) % 4]
        return height, width

    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_file, "check_images", lambda paths, *_: {path: size(path) for path in paths})
        return rows, load_data([KVASIR], folder, tokenizer, image_settings(QWEN), 8192), tokenizer


def test_all_rows_of_kvasir_vqa_are_used_and_trained_on_exactly_their_answers(kvasir):
    rows, data, tokenizer = kvasir
    assert not data.bad and len(data.samples) == len(rows) == 8786 and len(data.grids) == 975
    texts = tokenizer.batch_decode([sample.ids[sample.trained].tolist() for sample in data.samples])
    assert texts == [f"{row['answer']}<|im_end|>" for row in rows]
    assert [sample.fields["question"] for sample in data.samples] == [row["question"] for row in rows]
    text = tokenizer.decode(data.samples[0].ids.tolist())
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is this finding easy to detect?<|im_end|>\n"
        "<|im_start|>assistant\nno<|im_end|>"
    )


def test_a_histogram_has_no_bins_narrower_than_a_token():
    assert length_histogram([2899] * 3) == "  all 2,899"
    lines = length_histogram([7, 8, 8, 9]).splitlines()
    assert [line.split()[:4] for line in lines] == [["7", "to", "8", "1"], ["8", "to", "9", "3"]]
    assert length_histogram([7, 7, 10]).splitlines()[1] == "        8 to       9        0"


@pytest.mark.parametrize("image_tokens", [0, 396, 2700], ids=["mixed sizes", "396 tokens", "2,700 tokens"])
def test_four_ranks_wait_little_for_each_other_on_kvasir_vqa(kvasir, image_tokens):
    batch_size = parse_settings([]).batch_size
    samples = kvasir[1].samples
    if image_tokens:
        samples = [replace(sample, image_tokens=(image_tokens,), patches=(4 * image_tokens,)) for sample in samples]
    plan = make_plan(samples, PlanSettings(batch_size, 0, seed=0), epoch=0)
    assert len(plan) == -(-8786 // batch_size)
    assert rank_efficiency(plan, 4) >= 0.94
    assert rank_efficiency(make_plan(samples, PlanSettings(16, 4, seed=0), epoch=0), 4) >= 0.9
