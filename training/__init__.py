"""What a training run needs beside its loop: settings, preparation, plan, metrics, checkpoints."""
