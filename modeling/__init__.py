"""What sets up the model: attention over trees, LoRA, finding model folders, memory and compilation."""
