"""The built-in default: generated endoscopy-like pictures with questions, and a tiny Qwen3-VL to train on them.

`train.py` without arguments calls `make_demo` and trains with `SETTINGS`; nothing is downloaded. The pictures have what
matters about Kvasir-VQA: tissue on a dark ground, polyps, instruments, overlaid text, a green or black box, and 1 to 17
questions per picture, each answerable from the picture alone. The model (`tiny_model.py`) sees only colours and places;
training moves nothing but its LoRA matrices.
"""

import json
import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers.utils.logging import disable_progress_bar

from common import InputError, remove, replacing
from demo.tiny_model import PATCH, make_model, make_tokenizer

DEMO_VERSION = "2"  # raise it when a change below changes what is written
SETTINGS = dict(
    epochs=8,
    batch_size=128,  # about 14 pictures
    questions_per_image=0,
    max_tokens=800,
    lr=5e-3,
    schedule="cosine",
    warmup=20,
    lora_r=32,
    lora_alpha=64,
    lora_dropout=0.0,
    workers=1,
)
TRAIN_PICTURES, VAL_PICTURES = 800, 80
SIDE = 96  # pixels of a demo picture

# ---------------------------------------------------------------- scenes

TISSUE = {"colonoscopy": (206, 112, 108), "gastroscopy": (186, 140, 104)}
POLYP_COLOURS = {"red": (160, 5, 20), "white": (245, 240, 235), "yellow": (245, 220, 20)}
POLYP_RADII = {"<5mm": (0.075, 0.085), "5-10mm": (0.115, 0.125), "11-20mm": (0.155, 0.17)}
INSTRUMENT_COLOURS = {"biopsy forceps": (140, 50, 170), "polyp snare": (30, 190, 160), "tube": (40, 70, 210)}
BOX_COLOURS = {"green": (20, 150, 50), "black": (8, 8, 10)}
CELLS = [f"{v}-{h}".replace("center-center", "center") for v in ("upper", "center", "lower")
         for h in ("left", "center", "right")]  # fmt: skip


@dataclass
class Thing:
    """A polyp or an instrument. Places are shares of the picture's sides, lengths of its shorter side."""

    name: str  # a polyp's colour, an instrument's kind
    cell: int  # index into CELLS
    at: tuple[float, float]  # a polyp's middle, an instrument's tip
    radius: float = 0.0  # of a polyp
    base: tuple[float, float] = (0.0, 0.0)  # where an instrument's shaft comes from, outside the picture


@dataclass
class Scene:
    """All that a picture shows: both the answers and the drawing come from here."""

    procedure: str
    lumen: tuple[float, float]
    polyps: list[Thing]
    polyp_size: str
    instruments: list[Thing]
    text: str  # "none", "left" or "right"
    box: str  # "none", "green" or "black"
    box_side: str
    seed: int  # of what no question asks for: texture, letters, small shifts


def cell_point(rng: random.Random, cell: int, jitter: float = 0.05) -> tuple[float, float]:
    row, column = divmod(cell, 3)
    return tuple((i + 0.5) / 3 + 0.03 * (1 - i) + rng.uniform(-jitter, jitter) for i in (column, row))


def make_scene(seed: int) -> Scene:
    """A random scene, always the same for a seed."""
    rng = random.Random(seed)
    text, box = rng.choice(("none", "left", "right")), rng.choice(("none", "green", "black"))
    box_side = rng.choice(("left", "right"))
    covered = [f"upper-{text}"] + [f"lower-{box_side}"] * (box != "none")
    open_cells = [cell for cell, name in enumerate(CELLS) if name not in covered]
    cells = rng.sample(open_cells, 5)  # one for each polyp and instrument
    instruments = []
    for kind in sorted(rng.sample(list(INSTRUMENT_COLOURS), rng.choices((0, 1, 2), (4, 4, 2))[0])):
        cell = cells.pop()
        x, y = tip = cell_point(rng, cell, 0.04)
        turn = math.atan2(y - 0.5, x - 0.5) + rng.uniform(-0.3, 0.3)  # outwards, so that it crosses few cells
        base = (x + math.cos(turn), y + math.sin(turn))
        instruments.append(Thing(kind, cell, tip, base=base))
    size = rng.choice(list(POLYP_RADII))
    polyps = [
        Thing(colour, cell := cells.pop(), cell_point(rng, cell, 0.025), rng.uniform(*POLYP_RADII[size]))
        for colour in sorted(rng.sample(list(POLYP_COLOURS), rng.choices((0, 1, 2, 3), (3, 4, 2, 1))[0]))
    ]
    return Scene(
        procedure=rng.choice(list(TISSUE)),
        lumen=(rng.choice((0.27, 0.73)) + rng.uniform(-0.07, 0.07), rng.uniform(0.35, 0.65)),
        polyps=polyps,
        polyp_size=size,
        instruments=instruments,
        text=text,
        box=box,
        box_side=box_side,
        seed=rng.randrange(2**32),
    )


# ---------------------------------------------------------------- questions


def yes(truth) -> str:
    return "yes" if truth else "no"


def easy_to_detect(scene: Scene) -> str:
    return yes(scene.polyp_size != "<5mm") if scene.polyps else "not relevant"


def names(things) -> str:
    return "; ".join(thing.name for thing in things) or "none"


def location(things) -> str | None:
    """Where the thing is, "none" if there is no thing, or None if there are several: the question is not asked then."""
    return None if len(things) > 1 else CELLS[things[0].cell] if things else "none"


QUESTIONS = (  # (type, question, answer of a scene, None where it can't be asked), after Kvasir-VQA
    ("yes/no", "Does this image contain any finding?", lambda s: yes(s.polyps)),
    ("yes/no", "Is there more than one polyp?", lambda s: yes(len(s.polyps) > 1)),
    ("yes/no", "Is there an instrument in the image?", lambda s: yes(s.instruments)),
    ("yes/no", "Is there text?", lambda s: yes(s.text != "none")),
    ("yes/no", "Is there a green/black box artefact?", lambda s: yes(s.box != "none")),
    ("yes/no", "Is this finding easy to detect?", easy_to_detect),
    ("count", "How many polyps are in the image?", lambda s: str(len(s.polyps))),
    ("count", "How many instruments are in the image?", lambda s: str(len(s.instruments))),
    ("size", "What is the size of the polyp?", lambda s: s.polyp_size if s.polyps else "none"),
    ("colour", "What color is the abnormality?", lambda s: names(s.polyps)),
    ("location", "Where in the image is the abnormality?", lambda s: location(s.polyps)),
    ("location", "Where in the image is the instrument?", lambda s: location(s.instruments)),
    ("choice", "Are there any instruments in the image? Check all that are present.", lambda s: names(s.instruments)),
    ("choice", "What type of procedure is the image taken from?", lambda s: s.procedure),
    ("choice", "Is the lumen on the left or on the right?", lambda s: "left" if s.lumen[0] < 0.5 else "right"),
    ("choice", "Is the text on the left or on the right?", lambda s: s.text),
    ("choice", "Is the box artefact green or black?", lambda s: s.box),
)


def make_rows(split: str, number: int, seed: int) -> list[tuple[dict, Scene]]:
    """Rows (image, question, answer, question_type, id) of `number` pictures, each row with its scene."""
    rng = random.Random(f"{split} {seed}")
    rows = []
    for index in range(number):
        scene = make_scene(rng.randrange(2**32))
        # Kvasir-VQA's validation pictures: 39% have one question, 8% have eight, 28% seventeen, 9.0 on average
        count = rng.choices((1, 8, 9, 12, 13, 15, 16, 17), (39, 9, 5, 5, 6, 4, 4, 28))[0]
        asked = [(kind, question, answer(scene)) for kind, question, answer in QUESTIONS if answer(scene) is not None]
        for k in sorted(rng.sample(range(len(asked)), min(count, len(asked)))):
            kind, question, answer = asked[k]
            row = {"id": f"{split}-{index:04d}-{k:02d}", "image": f"images/{split}-{index:04d}.png"}
            rows.append((row | {"question": question, "answer": answer, "question_type": kind}, scene))
    return rows


# ---------------------------------------------------------------- pictures


def draw_tissue(scene: Scene, width: int, height: int) -> Image.Image:
    """Lit tissue with folds around a dark lumen, in an octagonal field of view; computed small, then enlarged."""
    noise = np.random.default_rng(scene.seed)
    rows, columns = round(96 * height / min(width, height)), round(96 * width / min(width, height))
    y, x = (np.mgrid[:rows, :columns] + 0.5) / np.array([rows, columns])[:, None, None]
    distance = np.hypot(x - scene.lumen[0], (y - scene.lumen[1]) * 1.2)
    light = 1 - 0.9 * np.exp(-((distance / 0.13) ** 4)) + 0.03 * np.sin(distance * 40 + noise.uniform(0, 6))
    patches = Image.fromarray(noise.normal(0, 0.04, (8, 8)).astype(np.float32)).resize((columns, rows), Image.BICUBIC)
    light = (light + np.asarray(patches)) * noise.uniform(0.92, 1.05)
    colour = np.array(TISSUE[scene.procedure]) + noise.normal(0, 3, 3)
    inside = np.maximum(np.abs(x - 0.5), np.abs(y - 0.5)) < 0.485
    inside &= np.abs(x - 0.5) + np.abs(y - 0.5) < 0.82
    pixels = np.where(inside, light, 0.03)[..., None] * colour + noise.normal(0, 2, (rows, columns, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((width, height), Image.BICUBIC)


def draw_polyp(canvas: ImageDraw.ImageDraw, at, radius: float, colour: tuple[int, int, int]) -> None:
    """A blob with a darker rim and the white reflection of the scope's lamp. `at` and `radius` in pixels."""
    x, y = at
    for shrink, shade in ((1.0, 0.6), (0.85, 1.0)):
        r = radius * shrink
        canvas.ellipse((x - r, y - 0.92 * r, x + r, y + 0.92 * r), tuple(int(c * shade) for c in colour))
    r, x, y = radius * 0.2, x - radius * 0.3, y - radius * 0.3
    canvas.ellipse((x - r, y - r, x + r, y + r), (255, 255, 255))


def draw_instrument(canvas: ImageDraw.ImageDraw, kind: str, tip, base, unit: float) -> None:
    """A shaft from the border with its tip: open jaws, a wire loop, or the dark mouth of a tube. All in pixels."""
    colour, (x, y) = INSTRUMENT_COLOURS[kind], tip
    angle = math.atan2(y - base[1], x - base[0])
    canvas.line((*base, *tip), tuple(c // 2 for c in colour), round(0.14 * unit))
    canvas.line((*base, *tip), colour, round(0.11 * unit))
    r = 0.065 * unit
    if kind == "tube":
        canvas.ellipse((x - r, y - r, x + r, y + r), (15, 15, 40), colour, max(1, round(0.015 * unit)))
    elif kind == "biopsy forceps":
        for turn in (-0.6, 0.6):
            end = x + 2 * r * math.cos(angle + turn), y + 2 * r * math.sin(angle + turn)
            canvas.line((x, y, *end), (225, 235, 240), round(0.03 * unit))
    else:
        x, y, r = x + 1.5 * r * math.cos(angle), y + 1.5 * r * math.sin(angle), 1.5 * r
        canvas.ellipse((x - r, y - r, x + r, y + r), None, (190, 250, 240), round(0.025 * unit))


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene as an RGB picture of any size."""
    rng, unit = random.Random(scene.seed), min(width, height)

    def place(point):
        return point[0] * width, point[1] * height

    picture = draw_tissue(scene, width, height)
    canvas = ImageDraw.Draw(picture)
    for polyp in scene.polyps:
        draw_polyp(canvas, place(polyp.at), polyp.radius * unit, POLYP_COLOURS[polyp.name])
    for instrument in scene.instruments:
        draw_instrument(canvas, instrument.name, place(instrument.at), place(instrument.base), unit)
    if scene.box != "none":
        w, h = 0.25 * unit, 0.22 * unit
        left = 0 if scene.box_side == "left" else width - w
        outline = max(1, round(0.01 * unit))
        canvas.rectangle((left, height - h, left + w, height), BOX_COLOURS[scene.box], (110, 110, 110), outline)
        arc = (left + 0.2 * w, height - 0.8 * h, left + 0.7 * w, height - 0.2 * h)
        canvas.arc(arc, rng.randrange(360), rng.randrange(180, 720), (230, 230, 110), 2 * outline)
    if scene.text != "none":
        letters = "".join(rng.choices("ABCDEFGHKLMNPRSTUVXYZ0123456789:.", k=rng.randint(4, 5)))
        left, anchor = (0.02 * unit, "lt") if scene.text == "left" else (width - 0.02 * unit, "rt")
        font = ImageFont.load_default(size=round(0.15 * unit))
        canvas.text((left, 0.015 * unit), letters, (250, 250, 250), font, anchor)
    return picture


# ---------------------------------------------------------------- writing


PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 256 * 256},  # pixels: demo pictures keep their size
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write_model(folder: Path, texts: list[str]) -> None:
    """The tiny model, with a tokenizer that has each word of the texts as a token."""
    tokenizer = make_tokenizer(["user\nassistant\nsystem\n", *texts])
    tokenizer.save_pretrained(folder)
    disable_progress_bar()
    make_model(tokenizer).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))


def files(folder: Path) -> dict[str, str]:
    """Settings that name what `make_demo` writes."""
    names = {"model": "model", "train": "train.jsonl", "val": "val.jsonl", "images": ""}
    return {setting: str((folder / name).resolve()) for setting, name in names.items()}


def make_demo(folder: Path, seed: int = 0) -> None:
    """Write train.jsonl, val.jsonl, images/ and model/ into the folder, whole or not at all.

    A folder of this DEMO_VERSION is left as it is, an older one is replaced. Raises InputError if the folder holds
    something else.
    """
    folder, stamp = Path(folder), f"{DEMO_VERSION} {seed}"
    version = folder / "version"
    if version.exists() and version.read_text() == stamp:
        return
    if folder.exists() and not version.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and was not written by the demo: move it away")
    with replacing(folder) as partial:
        (partial / "images").mkdir(parents=True)
        texts = []
        for split, number in (("train", TRAIN_PICTURES), ("val", VAL_PICTURES)):
            rows = make_rows(split, number, seed)
            texts += [f"{row['question']}\n{row['answer']}\n {row['answer']}" for row, _ in rows]
            (partial / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
            for image, scene in {row["image"]: scene for row, scene in rows}.items():
                draw(scene, 4 * SIDE, 4 * SIDE).reduce(4).save(partial / image)
        write_model(partial / "model", texts)
        (partial / "version").write_text(stamp)
        remove(folder)  # a folder that is not empty can't be replaced


def make_picture(name: str, folder: Path, size: tuple[int, int] | None) -> None:
    """Write a picture whose scene, and size unless given, follow from its name alone. Keeps a file that exists."""
    path, seed = folder / name, zlib.crc32(name.encode())
    if path.exists():
        return
    if size is None:  # from 480 x 360 to 1920 x 1072
        scale = random.Random(seed).uniform(0, 1)
        size = round(480 + 1440 * scale), round(360 + 712 * scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        draw(make_scene(seed), *size).save(partial, quality=90)
