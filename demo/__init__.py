"""The built-in default of `train.py`: generated pictures with questions, and a tiny model to train on them."""
