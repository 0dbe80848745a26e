"""Checking files of pictures, each by its header and by decoding it.

A file may be anything: a kilobyte that unpacks to gigabytes, or one that takes minutes. So files are checked in
processes of their own with limits of memory and time, which start fast because this file imports little.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue

from PIL import AvifImagePlugin, Image

from inputs.picture_files import MAX_IMAGE_PIXELS, NotAPicture, has_16_bits, opened, orientation_of, refusal, rgb

LIMITS = (6, 900 * 2**20)  # seconds of processor time and bytes of memory to check a file
FILES_PER_PROCESS = 16  # below which another process costs more than it saves: it takes 0.1 s to start


class PictureSize(tuple):
    """(height, width) of a picture as displayed, and what else was found in its file."""

    bits = 0  # that are used of its 16 per value: 8, 10, 12, 14 or 16; 0: it has 8 bits per value, or was not decoded
    several = False  # whether more frames or pages follow the first, which is the one that is used

    def __new__(cls, height: int, width: int, bits: int = 0, several: bool = False):
        size = super().__new__(cls, (height, width))
        size.bits, size.several = bits, several
        return size

    def __reduce__(self):
        return PictureSize, (*self, self.bits, self.several)


def check_file(path: str, decode: bool) -> PictureSize | str:
    """A picture's size, or what is wrong with its file. Without `decode` only its header is read."""
    try:
        with opened(path) as image:
            return refusal(image) or _measured(image, path, decode)
    except NotAPicture as error:
        return f"unreadable: {error}"
    except Image.DecompressionBombError:
        return "over 100 megapixels"
    except MemoryError:
        return "takes too much memory to decode"
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything
        return f"unreadable or truncated ({error})"


def _measured(image: Image.Image, path: str, decode: bool) -> PictureSize:
    bits = 0
    if decode:
        picture, bits = decoded(image, path)
        rgb(picture.crop((0, 0, 1, 1)))  # that its colours can be converted
    size = image.size if orientation_of(image) >= 5 else image.size[::-1]
    with suppress(Exception):  # a damaged second frame does no harm to the first
        return PictureSize(*size, bits, bool(getattr(image, "is_animated", False)))
    return PictureSize(*size, bits, True)


def decoded(image: Image.Image, path: str) -> tuple[Image.Image, int]:
    """The pixels of a file, with 8 bits per value, and how many bits it uses if it has 16, else 0."""
    if has_16_bits(image):
        from inputs.bit_depth import to_eight_bits  # not needed by most checks, and NumPy doubles the time of a start

        return to_eight_bits(image, path)
    image.load()
    return image, 0


# ----------------------------------------------------------------------------------------------------------- processes


def check_files(paths: list[str], decode: bool) -> Iterator[PictureSize | str]:
    """`check_file` of each, in their order, in as many processes as may run at once."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on macOS
    count = min(processors, 1 + len(paths) // FILES_PER_PROCESS) if paths else 0
    checkers, idle = [Checker() for _ in range(count)], SimpleQueue()
    together = 1 if decode else FILES_PER_PROCESS  # reading a header takes less time than asking for it
    parts = [paths[start : start + together] for start in range(0, len(paths), together)]

    def check(part: list[str]) -> list[PictureSize | str]:
        checker = idle.get()
        try:
            return checker.check_all(part, decode)
        finally:
            idle.put(checker)

    for checker in checkers:
        idle.put(checker)
    try:
        with ThreadPoolExecutor(count or 1) as pool:
            yield from chain.from_iterable(pool.map(check, parts))
    finally:
        for checker in checkers:
            checker.end()


class Checker:
    """A process that checks one file after another. Where a file ends it, another one takes its place."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        root = Path(__file__).parents[1]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P: the current folder may hold a file with the name of a module. Each thread of NumPy's would need memory.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve{LIMITS}"],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def check(self, path: str, decode: bool) -> PictureSize | str:
        """`check_file` in the process. Raises RuntimeError where the process fails by itself."""
        return self.check_all([path], decode)[0]

    def check_all(self, paths: list[str], decode: bool) -> list[PictureSize | str]:
        """`check` of each. The process is asked once, and again for what is left after a file that ends it."""
        results = []
        while left := paths[len(results) :]:
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps([left, decode]) + "\n")
                self.process.stdin.flush()
            answers = [json.loads(line) for line in islice(self.process.stdout, len(left))]
            results += [answer if isinstance(answer, str) else PictureSize(*answer) for answer in answers]
            if len(answers) < len(left):
                results.append(self._replaced(left[len(answers)]))
        return results

    def _replaced(self, path: str) -> str:
        """What is wrong with the file that ended the process, in whose place another one is started."""
        code = self.end()
        if code >= 0:
            raise RuntimeError(f"the process that checks {path} ended with code {code}")
        self.start()
        if -code == signal.SIGPROF:
            return f"takes over {LIMITS[0]} seconds to decode"
        return f"unreadable: decoding it ends the process ({signal.Signals(-code).name})"

    def end(self) -> int:
        """End the process, which returns its exit code."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def serve(seconds: int, memory: int) -> None:
    """Check the files named on standard input, a JSON list [paths, decode] per line. Each is answered with a line.

    A file that takes more processor time than `seconds` ends the process. Where one needs more bytes than `memory`,
    its decoder raises MemoryError or another error, or ends the process too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; it closes standard input
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # once that has gone, a last answer ends this process quietly
    for kind, limit in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each would need memory
    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS // 2  # Pillow refuses twice as many, before it reserves memory for them
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        paths, decode = json.loads(line)
        for path in paths:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            result = check_file(path, decode)
            signal.setitimer(signal.ITIMER_PROF, 0)
            answer = result if isinstance(result, str) else [*result, result.bits, result.several]
            print(json.dumps(answer), flush=True)
