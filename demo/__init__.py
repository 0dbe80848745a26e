"""The embedded default: generated pictures with questions, and a tiny model to train on them."""
