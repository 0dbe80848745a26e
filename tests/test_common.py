"""What users gave is shown in messages, but short, and never obeyed by their terminal; files that others may read."""

import gc
import os
import stat
import sys

import pytest
import torch
from safetensors.torch import save_file

from common import SHOWN, InputError, collector_paused, printable, quote, replacing, write_whole
from dist_utils import print0, run_and_exit

NASTY = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202ed\x00\x7f"


def is_harmless(text: str) -> bool:
    return all(character in "\n\t" or character.isprintable() for character in text)


def test_a_terminal_gets_no_escape_codes_and_keeps_line_breaks():
    assert printable(f"two\nlines\t息肉 {NASTY}") == "two\nlines\t息肉 " + repr(NASTY)[1:-1]
    assert is_harmless(printable("".join(map(chr, range(256)))).replace("\xa0", "").replace("\xad", ""))


@pytest.mark.parametrize("error", [InputError(NASTY), RuntimeError(NASTY), OSError(28, NASTY)])
def test_no_message_brings_escape_codes_to_the_terminal(capfd, monkeypatch, error):
    error.add_note(NASTY)

    def fail(argv, stop):
        print0(f"a row says {NASTY}")
        raise error

    monkeypatch.setattr("dist_utils.os._exit", sys.exit)
    monkeypatch.setattr("dist_utils.Stop.watch_signals", lambda stop: stop)
    with pytest.raises(SystemExit):
        run_and_exit(fail, [])
    shown = "".join(capfd.readouterr())
    assert is_harmless(shown) and shown.count(r"\x1b[2J") >= 2


@pytest.mark.parametrize("value", ["x" * 10**7, "\x1b" * 200, "'" * 200, {"from": "x" * 500}, [1] * 999, 10**4000])
def test_a_quoted_value_is_at_most_100_characters_long(value):
    assert len(quote(value)) <= SHOWN == 100 and "…" in quote(value) and is_harmless(quote(value))


@pytest.mark.parametrize("value", ["yes", "x" * 98, "a\nb", "it's", {"from": "robot"}, None, 2.5])
def test_a_short_value_is_quoted_whole(value):
    assert quote(value) == repr(value)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_read_by_whom_the_umask_lets_read_whatever_wrote_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "folder") as partial:
            (partial / "below").mkdir(parents=True)
            save_file({"a": torch.zeros(2)}, partial / "below" / "adapter_model.safetensors")
            torch.save({}, partial / "state.pt")
        with replacing(tmp_path / "one.safetensors") as partial:
            save_file({"a": torch.zeros(2)}, partial)
        write_whole(tmp_path / "text", "")
    finally:
        os.umask(before)
    paths = list(tmp_path.rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {mode} and len(paths) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o777 & ~umask}


def test_nothing_is_collected_while_rows_are_read_and_they_are_left_out_of_all_later_collections():
    passes = []
    gc.callbacks.append(lambda phase, info: passes.append(phase))
    try:
        with collector_paused():
            passes.clear()
            rows = [[number] for number in range(10_000)]
            assert not passes
        assert gc.isenabled() and not any(found is rows for found in gc.get_objects())
    finally:
        gc.callbacks.pop()
        gc.unfreeze()
