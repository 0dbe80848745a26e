"""How often the 95% intervals of evaluations cover the truth: a simulation.

    python bench/intervals.py

Draws right and wrong answers about images whose accuracies vary, and prints for each number of images and each
accuracy the lowest coverage over 1 to 17 questions per image and over answers that are from independent to all alike
within an image.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation.statistics import score_interval

IMAGES = (10, 20, 50, 100, 300, 1000)
ACCURACIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
QUESTIONS = (1, 2, 5, 9, 17, 0, -1)  # per image; 0: 1, 8, 9, 12 or 17, as often as in Kvasir-VQA; -1: 1 or 17
ALIKE = (0.0, 0.1, 0.3, 0.6, 1.0)  # correlation of the answers about an image
TRIALS = 2000


def coverage(generator, images: int, questions: int, accuracy: float, alike: float) -> float:
    """Share of TRIALS simulated evaluations whose interval holds the accuracy that answers were drawn with."""
    if questions > 0:
        counts = np.full(images, questions)
    elif questions == 0:
        counts = generator.choice([1, 8, 9, 12, 17], images, p=[0.39, 0.14, 0.1, 0.09, 0.28])
    else:
        counts = np.where(np.arange(images) < 0.8 * images, 1, 17)
    if alike < 1:
        both = np.array([accuracy, 1 - accuracy]) * (1 / max(alike, 1e-9) - 1)
        levels = generator.beta(*both, (TRIALS, images))
    else:
        levels = (generator.random((TRIALS, images)) < accuracy).astype(float)
    sums = generator.binomial(counts, levels)
    intervals = np.array([score_interval(row, counts.astype(float)) for row in sums])
    return float(((intervals[:, 0] <= accuracy) & (accuracy <= intervals[:, 1])).mean())


def main() -> None:
    generator, everything = np.random.default_rng(0), []
    print("| images | " + " | ".join(f"accuracy {100 * accuracy:.0f}%" for accuracy in ACCURACIES) + " |")
    print("|---" * (len(ACCURACIES) + 1) + "|")
    for images in IMAGES:
        lowest = []
        for accuracy in ACCURACIES:
            cells = [
                coverage(generator, images, questions, accuracy, alike)
                for questions, alike in product(QUESTIONS, ALIKE)
            ]
            lowest.append(min(cells))
            everything += cells
        print(f"| {images:,} | " + " | ".join(f"{100 * value:.1f}" for value in lowest) + " |", flush=True)
    print(
        f"\nlowest {100 * min(everything):.1f}%, median {100 * np.median(everything):.1f}%, {len(everything):,} cells"
    )


if __name__ == "__main__":
    main()
