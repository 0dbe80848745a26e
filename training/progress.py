"""Where a run stands: what the training loop knows, and the plain part of a checkpoint's state.pt."""

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Progress:
    step: int = 0  # optimizer steps done
    best: dict = field(default_factory=dict)  # exact_match, loss and step of the best evaluation; empty: none yet
    stale: int = 0  # evaluations since the best one
    skipped: int = 0  # non-finite steps in a row
    evaluation_due: bool = False  # a stop came before the evaluation of this step
    sums: dict = field(default_factory=dict)  # over the steps since the last line of metrics.jsonl: metrics.SUMS
    failed_saves: int = 0  # saves in a row that failed; not part of a checkpoint

    @classmethod
    def from_state(cls, state: dict) -> "Progress":
        """What a checkpoint's state holds; an older one may lack some of it. Raises TypeError for anything else."""
        default = cls()
        known = {name: state[name] for name in default.to_state() if name in state}
        numbers = [number for value in known.values() if isinstance(value, dict) for number in value.values()]
        has_types = all(type(value) is type(getattr(default, name)) for name, value in known.items())
        if not has_types or not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("it does not say where a run stands")
        return cls(**known)

    def to_state(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "failed_saves"}

    def count_evaluation(self, result: dict) -> bool:
        """Take in an evaluation's result. Returns whether it is the best so far: the one with the highest exact match,
        and of equal ones the one with the lowest loss."""
        best = self.best
        is_best = not best or (result["exact_match"], -result["loss"]) > (best["exact_match"], -best["loss"])
        self.stale = 0 if is_best else self.stale + 1
        if is_best:
            self.best = {"exact_match": result["exact_match"], "loss": result["loss"], "step": self.step}
        return is_best


def unfinished(run: Path) -> str:
    """How far a run is, by its `status` file (see metrics.Metrics.status); empty for one that is done, or has none."""
    path = run / "status"
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    match = re.match(r"(running|stopped|failed) \d+\n(step [\d,]+ of [\d,]*\d)", text)
    states = {"running": "running or ended by an error", "stopped": "stopped", "failed": "a save failed"}
    return f"{match[2]}, {states[match[1]]}" if match else ""
