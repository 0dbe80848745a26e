"""train.py with a NaN loss in step 3 on rank 1 only; run under torchrun by test_train.py."""

import os
import sys

import train
from model import TreeModel

forward = TreeModel.forward


def poisoned(self, batch, features):
    losses, right = forward(self, batch, features)
    spoiled = self.training and batch.work.step is not None and batch.work.step.number == 2
    return (losses * float("nan") if spoiled and os.environ["RANK"] == "1" else losses), right


TreeModel.forward = poisoned
train.main(sys.argv[1:])
