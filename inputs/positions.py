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


def token_paths(tree: np.ndarray, branch: np.ndarray) -> dict:
    """The order in which recurrent layers go through a batch, from the tree and branch of each token (T,).

    before: (3, T) indices of the tokens 1, 2 and 3 places earlier on each token's own path, -1: none.
    order: (tokens without padding,) indices: of the roots' tokens, then of the branches'. Roots are sequences that
    begin with nothing: trunks, and branches of trees without one. root_starts, branch_starts: where each begins in its
    part of `order`, and the last ends. root_of: (branches + 1,) the number of the root that each continues, then a 0
    that is ignored: with one question the size would be 1, which the compiler treats as a constant. starts_on_cpu: both
    starts as lists, which stay on the CPU. leaves: the numbers, among roots and branches, of the sequences that no
    other continues, in the batch's order; leaf_ends: the index of the last token of each.
    """
    indices = np.arange(len(tree))
    begins = np.append(True, (np.diff(tree) != 0) | (np.diff(branch) != 0))
    starts = np.flatnonzero(begins)
    lengths, number = np.diff(starts, append=len(tree)), np.cumsum(begins) - 1  # number: of each token's sequence
    trunks = {tree[start]: n for n, start in enumerate(starts) if branch[start] == 0}
    trunk_of = np.array([trunks.get(tree[start], -1) if branch[start] else -1 for start in starts])
    in_trunk = np.where(trunk_of >= 0, lengths[trunk_of], 0)[number]  # tokens of each token's trunk
    trunk_end = (starts + lengths)[trunk_of][number]
    before = []
    for lag in (1, 2, 3):
        missing = lag - (indices - starts[number])  # so many places before the first token of the sequence
        earlier = np.where(missing <= in_trunk, trunk_end - missing, -1)
        before.append(np.where(missing <= 0, indices - lag, earlier))
    roots = np.flatnonzero((trunk_of < 0) & (tree[starts] >= 0))  # padding is no tree: it enters no state
    branches = np.flatnonzero(trunk_of >= 0)
    root_starts, branch_starts = (np.append(0, lengths[part].cumsum()) for part in (roots, branches))
    counted = np.append(roots, branches)
    leaves = np.argsort(counted)
    leaves = leaves[~np.isin(counted[leaves], trunk_of)]
    return {
        "before": np.stack(before),
        "order": np.concatenate([np.arange(starts[n], starts[n] + lengths[n]) for n in (*roots, *branches)]),
        "root_starts": root_starts,
        "branch_starts": branch_starts,
        "root_of": np.append(np.searchsorted(roots, trunk_of[branches]), 0),
        "leaves": leaves,
        "leaf_ends": (starts + lengths - 1)[counted[leaves]],
        "starts_on_cpu": (root_starts.tolist(), branch_starts.tolist()),
    }


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
