"""Where tokens stand: their rotary positions in a sample, and the keys of their places in a step, for dropout."""

import numpy as np


def rotary_positions(sample, grids: dict[str, tuple[int, int]], merge_size: int) -> np.ndarray:
    """(3, tokens) positions of a sample in time, height and width, as Qwen-VL counts them (transformers'
    `get_rope_index`). `grids`: patches (down, across) of images.

    Text advances all three together. An image spans a grid and advances them by its longer side, not by its number of
    tokens. Positions are counted within the sample, so a branch continues from its prefix, whatever branches stand
    between them in a batch.
    """
    pieces, position = [], 0  # position: of the next token
    start = 0  # index in `ids` of the first token after the last image
    for at, path in zip(sample.image_at, sample.images):
        rows, columns = (side // merge_size for side in grids[path])
        pieces.append(np.stack([np.arange(position, position + at - start)] * 3))
        position += at - start
        grid = np.stack([np.zeros((rows, columns), int), *np.indices((rows, columns))])  # all at the same time
        pieces.append(position + grid.reshape(3, -1))
        position, start = position + max(rows, columns), at + 1
    pieces.append(np.stack([np.arange(position, position + len(sample.ids) - start)] * 3))
    return np.concatenate(pieces, axis=1)


def place_keys(*place) -> np.ndarray:
    """(n,) int32: a hash of a place, from which its dropout masks are drawn.

    place: numbers, or arrays (n,) of them: a step's seed, the number of a tree in it, the branch (0: the prefix), and
    the token's place in that; of a patch its image and its place in that. A place has the same key in whatever
    micro-batch its tree runs, and in every part of it.
    """
    key = np.zeros(1, np.int32)
    for number in place:
        key = scramble(key ^ scramble(np.atleast_1d(number).astype(np.int32) + 1))
    return key


def scramble(numbers):
    """Hash each int32 of an array or a tensor: Wellons' lowbias32 (github.com/skeeto/hash-prospector)."""
    # Products wrap around; & makes >> logical.
    numbers = (numbers ^ (numbers >> 16 & 0xFFFF)) * 0x7FEB352D
    numbers = (numbers ^ (numbers >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return numbers ^ (numbers >> 16 & 0xFFFF)
