"""A base model whose vision tower was trained: it tells shapes, which the demo's wired tower does not.

The tower learns to name, colour and place single figures on pictures that are generated here, then it is frozen. The
language model around it is the demo's, with random weights. The figures are stretched and turned polygons, ellipses,
stars, crosses, rings and letters in any colour on any ground; no data set of bench/learning.py uses this generator.
"""

import math
from pathlib import Path
from random import Random
from shutil import copytree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from common import replacing
from demo.tiny_model import PATCH

SIDE = 64  # pixels of a picture
TOWER = dict(depth=4, hidden_size=96, intermediate_size=192, num_heads=3, deepstack_visual_indexes=[2])
PICTURES, LR = 256, 2e-3  # of a step; its peak
HELD_OUT = 1000  # pictures
OUTPUT_RMS = 1.0  # of what the tower gives the language model, whose embeddings have 1 too

# ------------------------------------------------------------------------------------------------------------- pictures

Points = list[tuple[float, float]]


def circle_points(number: int, radii: tuple[float, ...] = (1.0,)) -> Points:
    """Corners at equal angles around 0, their distances taken from `radii` in turn."""
    angles = [2 * math.pi * k / number for k in range(number)]
    return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(angles)]


CROSS = [(1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)]
OUTLINES = {f"{number} corners": circle_points(number) for number in (3, 4, 5)}
OUTLINES |= {"ellipse": circle_points(40), "half": circle_points(40)[:21], "star": circle_points(10, (1.0, 0.45))}
OUTLINES |= {"cross": CROSS + [(-x, -y) for x, y in CROSS]}
CIRCLE = [*circle_points(40), (1.0, 0.0)]
OUTLINES |= {"ring": CIRCLE + [(0.6 * x, -0.6 * y) for x, y in CIRCLE]}
LETTERS = "AESX"
KINDS = [*OUTLINES, *LETTERS]


def draw_figure(rng: Random) -> tuple[np.ndarray, int, list[float]]:
    """A picture (SIDE, SIDE, 3) uint8 with one figure; the figure's index into KINDS; its red, green, blue, column, row
    and size, from -1 to 1."""
    ground = [rng.choice((255, rng.randrange(256)))] * 3 if rng.random() < 0.6 else rng.choices(range(256), k=3)
    while True:
        colour = rng.choices((0, 128, 255, rng.randrange(256)), k=3)
        if sum(abs(a - b) for a, b in zip(colour, ground)) > 150:
            break
    kind, size = rng.randrange(len(KINDS)), rng.uniform(0.1, 0.4)
    x, y = (rng.uniform(0.8 * size, 1 - 0.8 * size) for _ in range(2))
    fine = 3 * SIDE  # drawn large and reduced, for smooth edges
    mask = Image.new("L", (fine, fine))
    if KINDS[kind] in OUTLINES:
        turn = rng.choice((0, math.pi / 4, math.pi / 2, rng.uniform(0, 2 * math.pi)))
        wide, high = (size * rng.uniform(0.5, 1) for _ in range(2))
        cos, sin = math.cos(turn), math.sin(turn)
        turned = [(a * cos - b * sin, a * sin + b * cos) for a, b in OUTLINES[KINDS[kind]]]
        ImageDraw.Draw(mask).polygon([(fine * (x + wide * a), fine * (y + high * b)) for a, b in turned], 255)
    else:
        font = ImageFont.load_default(size=round(2 * fine * size))
        ImageDraw.Draw(mask).text((fine * x, fine * y), KINDS[kind], 255, font, "mm")
    inside = np.asarray(mask.reduce(3), np.float32)[..., None] / 255
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, rng.uniform(0, 6), (SIDE, SIDE, 3))
    pixels = inside * np.array(colour) + (1 - inside) * np.array(ground) + noise
    values = [*(2 * part / 255 - 1 for part in colour), 2 * x - 1, 2 * y - 1, 5 * size - 1]
    return pixels.clip(0, 255).astype(np.uint8), kind, values


class Pictures(Dataset):
    """Batches of generated pictures, each drawn anew from the seed and its number."""

    def __init__(self, batches: int, pictures: int, seed: str):
        self.batches, self.pictures, self.seed = batches, pictures, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures (pictures, SIDE, SIDE, 3) uint8, kinds (pictures,) and values (pictures, 6)."""
        rng = Random(f"{self.seed} {number}")
        drawn, kinds, values = zip(*(draw_figure(rng) for _ in range(self.pictures)))
        return torch.tensor(np.stack(drawn)), torch.tensor(kinds), torch.tensor(values)


def to_patches(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (n, SIDE, SIDE, 3) uint8 to patches (n * patches, 3 * 2 * PATCH**2), as the tower reads them."""
    number, blocks = len(pictures), SIDE // (2 * PATCH)
    pixels = (pictures.float() / 127.5 - 1).reshape(number, blocks, 2, PATCH, blocks, 2, PATCH, 3)
    pixels = pixels.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3, 1, PATCH**2)
    return pixels.expand(-1, -1, 2, -1).reshape(-1, 3 * 2 * PATCH**2)  # an image is two equal frames


# ------------------------------------------------------------------------------------------------------------- training


def attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """All pictures in one call, as they have one size: (1, heads, patches, d) to (1, patches, heads, d)."""
    pictures = len(cu_seq_lens_q) - 1
    q, k, v = (tensor[0].unflatten(1, (pictures, -1)).transpose(0, 1) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # (pictures, heads, patches, d)
    return out.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register("learning_flash_vision", attention)  # one call for all pictures only with this "flash"


def look(tower: Qwen3VLVisionModel, pictures: torch.Tensor) -> list[torch.Tensor]:
    """Last and deepstack features (n, tokens, width) of pictures (n, SIDE, SIDE, 3)."""
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * len(pictures), device=pictures.device)
    out = tower(to_patches(pictures), grid)
    return [features.unflatten(0, (len(pictures), -1)) for features in (out.pooler_output, *out.deepstack_features)]


def train_tower(tower: Qwen3VLVisionModel, steps: int, device: torch.device, workers: int) -> None:
    """Train the tower: each of its tokens must tell its picture's kind of figure, with its colour, place and size.

    Its output is then centred and scaled, and the share of new pictures' kinds that tokens tell is printed.
    """
    width = tower.config.out_hidden_size
    tower.to(device).config._attn_implementation = "learning_flash_vision"
    heads = torch.nn.ModuleList(torch.nn.Linear(width, len(KINDS) + 6) for _ in range(2)).to(device)
    trained = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps + 1, pct_start=0.1)
    loader = DataLoader(Pictures(steps, PICTURES, "train"), batch_size=None, num_workers=workers)
    for step, batch in enumerate(loader, start=1):
        pictures, kinds, values = (part.to(device) for part in batch)
        loss = sum(loss_of(head, features, kinds, values) for head, features in zip(heads, look(tower, pictures)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            print(f"tower, step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    held_out = [part.to(device) for part in Pictures(1, HELD_OUT, "held out")[0]]
    with torch.no_grad():
        features = look(tower, held_out[0])
        named = told(heads[0], features[0])[0].argmax(-1) == held_out[1][:, None]
        normalise(tower, features)
    print(f"tokens of new pictures tell {named.float().mean():.1%} of the figures' {len(KINDS)} kinds", flush=True)


def told(head: torch.nn.Linear, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of kinds (n, tokens, kinds), and values (n, tokens, 6), by features (n, tokens, width)."""
    return head(F.layer_norm(features, features.shape[-1:])).tensor_split([len(KINDS)], dim=-1)


def loss_of(head: torch.nn.Linear, features: torch.Tensor, kinds: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    logits, guesses = told(head, features)
    tokens = features.shape[1]
    named = F.cross_entropy(logits.flatten(0, 1), kinds.repeat_interleave(tokens))
    return named + 4 * F.mse_loss(guesses, values[:, None].expand(-1, tokens, -1))


def normalise(tower: Qwen3VLVisionModel, features: list[torch.Tensor]) -> None:
    """Centre what the tower gives the language model, and scale it to OUTPUT_RMS, as measured on its `features`."""
    for merger, given in zip((tower.merger, *tower.deepstack_merger_list), features):
        mean = given.mean((0, 1))
        scale = OUTPUT_RMS / (given - mean).square().mean().sqrt()
        merger.linear_fc2.bias.sub_(mean).mul_(scale)
        merger.linear_fc2.weight.mul_(scale)


def write_seeing_set(source: Path, folder: Path, steps: int, workers: int) -> None:
    """Write the data set of `source` again, with a base model whose tower was trained for so many steps. `workers`
    processes draw the pictures; 0: this one does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Qwen3VLForConditionalGeneration.from_pretrained(source / "model")
    model.config.vision_config.update(TOWER)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = Qwen3VLVisionModel(model.config.vision_config)
        train_tower(tower, steps, device, workers)
    tower.config._attn_implementation = "sdpa"
    model.model.visual = tower.cpu()
    with replacing(folder) as partial:
        copytree(source, partial)
        model.save_pretrained(partial / "model")
