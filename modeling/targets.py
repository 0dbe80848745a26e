"""Which layers get LoRA: the names that `--lora-targets` knows, as patterns of module names."""

import re

DEFAULT_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
# Of families with linear attention. Its gates, in_proj_a and in_proj_b, are left out: they have an output per head.
HYBRID_TARGETS = f"{DEFAULT_TARGETS},in_proj_qkv,in_proj_z,out_proj"
AUTO = "auto"  # the value of --lora-targets that stands for those of the model's family
# Names in --lora-targets that stand for layers outside the language model.
VISION_TARGETS = {
    "vision": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(linear_fc[12]|fc[12]|gate_proj|up_proj|down_proj))",
    "merger": r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.(linear_fc[12]|mlp\.[02])",
}


def resolve_targets(targets: str, model_type: str) -> str:
    """--lora-targets, or those of a family where it is `auto`."""
    if targets != AUTO:
        return targets
    return HYBRID_TARGETS if model_type == "qwen3_5" else DEFAULT_TARGETS


def target_pattern(targets: str) -> str:
    """--lora-targets as a regular expression of whole module names. All but `vision` and `merger` is anchored to the
    language model, because the vision tower has projections of the same names."""
    parts = targets.split(",")
    language = "|".join(part for part in parts if part not in VISION_TARGETS)
    patterns = [rf"model\.language_model\.(\w+\.)*({language})"] if language else []
    return "|".join(patterns + [VISION_TARGETS[part] for part in parts if part in VISION_TARGETS])


def module_suffixes(chosen: set[str], others: set[str]) -> tuple[list[str], str | None]:
    """The `target_modules` and `exclude_modules` by which PEFT chooses these modules and none of the others.

    The first is a list of ends of module paths, each as short as can be: vLLM and SGLang know a layer by its last name,
    and SGLang takes a list only. Where nothing of the vision tower is chosen, the second excludes it as a whole:
    Qwen2.5-VL's has projections of the same names.
    """
    excluded = None if any("visual." in name for name in chosen) else r"(.*\.)?visual\..*"
    taken = {end for name in others if not (excluded and re.fullmatch(excluded, name)) for end in _ends(name)}
    return sorted({next(end for end in _ends(name) if end not in taken) for name in chosen}), excluded


def _ends(name: str) -> list[str]:
    """The ends of a module's path in whole names, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def names_vision(targets: str) -> bool:
    """Whether --lora-targets asks for the vision tower or its merger."""
    return not VISION_TARGETS.keys().isdisjoint(targets.split(","))
