"""What the model is made of: tree attention, LoRA, loading, memory and compilation."""
