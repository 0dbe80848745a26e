"""Which layers get LoRA: the names that `--lora-targets` knows, as patterns of module names."""

DEFAULT_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
# Names in --lora-targets that stand for layers outside the language model.
VISION_TARGETS = {
    "vision": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(linear_fc[12]|fc[12]|gate_proj|up_proj|down_proj))",
    "merger": r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.(linear_fc[12]|mlp\.[02])",
}


def target_pattern(targets: str) -> str:
    """--lora-targets as a regular expression of whole module names. All but `vision` and `merger` is anchored to the
    language model, because the vision tower has projections of the same names."""
    parts = targets.split(",")
    language = "|".join(part for part in parts if part not in VISION_TARGETS)
    patterns = [rf"model\.language_model\.(\w+\.)*({language})"] if language else []
    return "|".join(patterns + [VISION_TARGETS[part] for part in parts if part in VISION_TARGETS])


def names_vision(targets: str) -> bool:
    """Whether --lora-targets asks for the vision tower or its merger."""
    return not VISION_TARGETS.keys().isdisjoint(targets.split(","))
