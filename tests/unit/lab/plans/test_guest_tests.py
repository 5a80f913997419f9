"""Results that a guest wrote: JUnit XML, TAP, and whatever else a guest may write there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmlab.lab.plans import guest_tests
from vmlab.lab.plans.guest_tests import GuestTest, NoResults, read_results
from vmlab.report import Outcome

PASS, FAIL, ERROR, SKIP, XFAIL = (
    Outcome.PASS,
    Outcome.FAIL,
    Outcome.ERROR,
    Outcome.SKIP,
    Outcome.XFAIL,
)


def outcomes(text: str | bytes) -> list[tuple[str, Outcome]]:
    data = text.encode() if isinstance(text, str) else text
    return [(test.name, test.outcome) for test in read_results(data)]


# ------------------------------------------------------------------------------------------ JUnit

JUNIT = """<?xml version="1.0" encoding="UTF-8"?>
<testsuites>
  <testsuite name="outer" tests="5">
    <properties><property name="a" value="b"/></properties>
    <testcase classname="C" name="passes" time="1,000.5"><system-out>said</system-out></testcase>
    <testcase classname="C" name="fails" time="x">
      <failure message="1 != 2" type="AssertionError">trace &amp; more</failure>
    </testcase>
    <testsuite name="inner">
      <testcase name="breaks"><error>first line
second</error></testcase>
      <testcase name="waits"><skipped message="no disk"/></testcase>
      <testcase name="both"><skipped/><failure message="f"/></testcase>
    </testsuite>
  </testsuite>
</testsuites>
"""


def test_the_cases_of_a_junit_file_are_tests() -> None:
    passes, fails, breaks, waits, both = read_results(JUNIT.encode())
    assert passes == GuestTest("outer / C.passes", PASS, 1000.5, output="said")
    assert fails == GuestTest(
        "outer / C.fails", FAIL, None, message="1 != 2", details="trace & more"
    )
    assert breaks == GuestTest(
        "outer / inner / breaks", ERROR, message="first line", details="first line\nsecond"
    )
    assert (waits.outcome, waits.message) == (SKIP, "no disk")
    assert both.outcome is FAIL


def test_junit_may_be_in_any_encoding_that_xml_has() -> None:
    text = '<?xml version="1.0" encoding="{}"?><testsuite><testcase name="ä"/></testsuite>'
    for encoding in ("utf-8", "iso-8859-1"):
        assert outcomes(text.format(encoding).encode(encoding)) == [("ä", PASS)]
    assert outcomes(text.format("utf-16").encode("utf-16")) == [("ä", PASS)]


def test_names_that_come_twice_are_told_apart() -> None:
    names = ["a", "a", "a #2", "a", "b"]
    cases = "".join(f'<testcase name="{name}"/>' for name in names)
    found = [name for name, _ in outcomes(f"<testsuite>{cases}</testsuite>")]
    assert found == ["a", "a #2", "a #2 #2", "a #3", "b"]


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol">'
    + "".join(
        f'<!ENTITY lol{n} "{f"&lol{n - 1 if n > 1 else str()};" * 10}">' for n in range(1, 10)
    )
    + ']><testsuite><testcase name="&lol9;"/></testsuite>'
)
OUTSIDE = (
    '<!DOCTYPE t [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    '<testsuite><testcase name="a"><failure>&x;</failure></testcase></testsuite>'
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (BOMB, "a document type"),
        (OUTSIDE, "a document type"),
        ('<!DOCTYPE t SYSTEM "http://198.51.100.1/x.dtd"><testsuite/>', "a document type"),
        ("<testsuite><testcase name='&lol;'/></testsuite>", "undefined entity in line 1"),
        ("<testsuite>", "no well-formed XML: no element found in line 1"),
        ("<html></html>", "its root is 'html'"),
        ("<testsuite>" * 101, "nested more than 100 deep"),
        ('<?xml version="1.0" encoding="klingon"?><testsuite/>', "cannot be decoded"),
        ('<?xml version="1.0" encoding="base64"?><testsuite/>', "cannot be decoded"),
        ("", "neither JUnit XML nor TAP"),
        ("hello\nworld\n", "neither JUnit XML nor TAP"),
    ],
)
def test_what_is_no_file_of_results_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(NoResults, match=why):
        read_results(text.encode())


def test_there_are_limits_to_tests_and_to_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = '<testcase name="a"/>'
    with pytest.raises(NoResults, match="more than 20000 tests"):
        read_results(f"<testsuite>{case * 20001}</testsuite>".encode())
    with pytest.raises(NoResults, match="more than 20000 tests"):
        read_results(b"ok\n" * 20001)
    with pytest.raises(NoResults, match="more than 1000000 lines"):
        read_results(b"\n" * 1_000_001)
    with pytest.raises(NoResults, match="larger than 16 MiB"):
        read_results(b"<" * ((16 << 20) + 1))
    text = "x" * (4 << 20)
    (test,) = read_results(
        f'<testsuite><testcase name="{text}"><error message="{text}">{text}</error></testcase>'
        "</testsuite>".encode()
    )
    assert len(test.name) == guest_tests.MOST_NAME
    assert len(test.message) < guest_tests.MOST_TEXT + 100
    assert len(test.details) < guest_tests.MOST_TEXT + 100


# -------------------------------------------------------------------------------------------- TAP


def test_the_points_of_a_tap_13_stream_are_tests() -> None:
    text = """TAP version 13
1..6
ok 1 - opens the disk
not ok 2 - writes
  ---
  message: "short write"
  duration_ms: 1500
  severity: fail
  ...
# a diagnostic
some program's own output
ok 3 # SKIP no such device
not ok 4 - later # TODO not yet
ok 5 - a \\# in its name
not ok
"""
    opens, writes, skipped, later, named, last = read_results(text.encode())
    assert opens == GuestTest("opens the disk", PASS)
    assert (writes.outcome, writes.message, writes.duration_s) == (FAIL, "short write", 1.5)
    assert "severity: fail" in writes.details
    assert (skipped.name, skipped.outcome, skipped.message) == ("test 3", SKIP, "no such device")
    assert (later.name, later.outcome, later.message) == ("later", XFAIL, "not yet")
    assert named.name == "a # in its name"
    assert (last.name, last.outcome) == ("test 6", FAIL)


def test_subtests_of_tap_14_are_reported_by_the_names_of_their_points() -> None:
    text = """TAP version 14
# Subtest: foo
    ok 1 - one
    not ok 2 - two
    1..2
not ok 1 - foo
# Subtest: bar
    # Subtest: deep
        1..1
        ok 1 - down
    ok 1 - deep
    1..1
ok 2 - bar
1..2
"""
    assert outcomes(text) == [("foo / one", PASS), ("foo / two", FAIL), ("bar / deep / down", PASS)]


def test_a_point_that_fails_for_more_than_its_subtests_is_a_test_too() -> None:
    text = "    ok 1 - one\n    1..1\nnot ok 1 - foo\n1..1\n"
    assert outcomes(text) == [("foo / one", PASS), ("foo", FAIL)]


def test_the_kernel_s_own_tap_is_read() -> None:
    text = """KTAP version 1
1..2
  KTAP version 1
  # Subtest: example
  1..2
  ok 1 example_simple_test
  # example_skip_test: initializing
  ok 2 example_skip_test # SKIP this test should be skipped
# example: pass:1 fail:0 skip:1 total:2
ok 1 example
not ok 2 selftests: timers # TIMEOUT 45 seconds
"""
    assert outcomes(text) == [
        ("example / example_simple_test", PASS),
        ("example / example_skip_test", SKIP),
        ("selftests: timers", FAIL),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1..3\nok 1\nok 2\n", "3 tests were planned, and 2 ran"),
        ("1..1\nok 1\nok 2\n", "1 tests were planned, and 2 ran"),
        ("ok 1\nok 2\n", "it ends without a plan: whoever wrote it may have died"),
        ("1..2\nok 1\nBail out! no memory\nok 2\n", "bailed out: no memory"),
        ("Bail out!\n", "bailed out"),
        ("1..2\nok 2\nok 1\n", "test 1 has the number 2"),
        ("1..999999999\n", "999999999 tests were planned, and 0 ran"),
    ],
)
def test_tests_that_did_not_run_are_an_error(text: str, message: str) -> None:
    found = read_results(text.encode())
    assert (found[-1].name, found[-1].outcome, found[-1].message) == ("plan", ERROR, message)


def test_a_stream_that_skips_all_is_a_skip() -> None:
    (test,) = read_results(b"1..0 # SKIP needs a GPU\n")
    assert (test.outcome, test.message) == (SKIP, "needs a GPU")


def test_subtests_end_somewhere() -> None:
    with pytest.raises(NoResults, match="nested more than 50 deep"):
        read_results("".join(" " * n + "ok\n" for n in range(60)).encode())


# ------------------------------------------------------------------------------------ anything

_lines = st.sampled_from(
    [
        "ok", "not ok 2 - x", "ok 1 # SKIP", "not ok # TODO", "1..3", "1..0 # skip", "---", "...",
        "TAP version 14", "KTAP version 1", "# Subtest: a", "Bail out!", "message: x", "", "\t",
        "duration_ms: .", "pragma +strict", "ok \\# \\\\ # todo",
    ]
)  # fmt: skip
_streams = st.lists(st.tuples(st.integers(0, 12), _lines), max_size=30).map(
    lambda lines: "\n".join(" " * indent + line for indent, line in lines).encode()
)
_elements = st.sampled_from(
    [
        "<testsuite>", "</testsuite>", "<testsuites>", "</testsuites>", "<testcase name='a'>",
        "</testcase>", "<failure>", "</failure>", "<skipped/>", "text", "&amp;", "<x:testcase/>",
        "<testcase time='nan'/>", "<![CDATA[", "]]>", "<!--", "-->", "<system-out>",
        "</system-out>",
    ]
)  # fmt: skip
_documents = st.lists(_elements, max_size=20).map(lambda parts: "".join(parts).encode())


@settings(max_examples=500)
@given(st.binary() | _streams | _documents | _documents.map(lambda d: b"<testsuite>" + d))
def test_whatever_a_guest_writes_is_results_or_none(data: bytes) -> None:
    try:
        found = read_results(data)
    except NoResults as error:
        assert str(error)
        return
    assert len({test.name for test in found}) == len(found)
    assert all(test.name and test.outcome is not Outcome.PENDING for test in found)
