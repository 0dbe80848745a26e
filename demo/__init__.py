"""The embedded default: generated pictures with questions, and a tiny model."""
