"""Where a script spends its time in Python: its threads' stacks, sampled. It hardly slows the script down.

    python bench/stacks.py bench/step.py --preset qwen3.5-9b --cases tree-1           # compiling, in the first pass
    python bench/stacks.py --after 120 bench/step.py --preset 2b --cases tree-1       # what paces the later ones

Two tables: the lines where threads were, and the lines of this project, or of packages named by --within, that led
there. A thread in CUDA, or in one of torch's own threads, is at the line that called it.
"""

import argparse
import runpy
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAITING = "threading.py", "queue.py", "selectors.py", "socketserver.py", "subproc_pool.py", "timer.py", "connection.py"


class Stacks(threading.Thread):
    """Samples all other threads every `every` seconds while used in a `with` statement, from `after` seconds on."""

    def __init__(self, every: float, after: float, within: list[str]):
        super().__init__(daemon=True)
        self.every, self.after, self.within = every, after, within
        self.samples, self.stopped, self.at, self.led = 0, threading.Event(), Counter(), Counter()

    def __enter__(self) -> "Stacks":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.join()

    def run(self) -> None:
        began = time.perf_counter()
        while not self.stopped.wait(self.every):
            if time.perf_counter() - began < self.after:
                continue
            self.samples += 1
            for thread, frame in sys._current_frames().items():
                if thread != self.ident and Path(frame.f_code.co_filename).name not in WAITING:
                    self.count(frame)

    def count(self, frame) -> None:
        self.at[place(frame)] += 1
        while frame and not any(name in frame.f_code.co_filename for name in self.within):
            frame = frame.f_back
        if frame:
            self.led[place(frame)] += 1

    def table(self, counts: Counter, most: int = 30) -> str:
        return "\n".join(f"{count / self.samples:7.1%}  {where}" for where, count in counts.most_common(most))


def place(frame) -> str:
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=0.01, help="seconds between samples")
    parser.add_argument("--after", type=float, default=0, help="seconds to leave out at the beginning")
    parser.add_argument("--within", nargs="+", default=[str(ROOT)], help="parts of paths that the second table shows")
    parser.add_argument("script", help="the script to run")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="and its arguments")
    args = parser.parse_args()
    sys.argv = [args.script, *args.words]
    sys.path.insert(0, str(Path(args.script).resolve().parent))
    with Stacks(args.every, args.after, args.within) as stacks:
        runpy.run_path(args.script, run_name="__main__")
    if stacks.samples:
        print(f"{stacks.samples:,} samples: where threads were\n{stacks.table(stacks.at)}")
        print(f"and what led there within {', '.join(args.within)}\n{stacks.table(stacks.led)}")


if __name__ == "__main__":
    main()
