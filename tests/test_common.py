"""What users gave is shown in messages, but short, and never obeyed by their terminal."""

import sys

import pytest

from common import SHOWN, InputError, printable, quote
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
