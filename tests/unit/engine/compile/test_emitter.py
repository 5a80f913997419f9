"""Functions over unknown values become trees of blocks, every way through them once."""

from __future__ import annotations

from vmlab.engine.compile.emitter import FunctionEmitter
from vmlab.engine.isa.values import Value


def tree(body) -> tuple[str, FunctionEmitter]:
    function = FunctionEmitter()
    function.explore(lambda: body(function))
    return function.text("define void @f(i64 %x)"), function


def test_each_way_is_taken_and_nothing_is_emitted_twice() -> None:
    ways = []

    def body(function: FunctionEmitter) -> None:
        x = Value("%x", 64, function)
        doubled = x + x
        way = "zero" if doubled.eq(0) else "small" if doubled.below(10) else "large"
        ways.append(way)
        function.effect(f"ret void ; {way}")

    text, _ = tree(body)
    assert sorted(ways) == ["large", "small", "zero"]
    assert text.count("add i64 %x, %x") == 1
    assert text.count("icmp") == 2
    for way in ways:
        assert text.count(f"; {way}") == 1


def test_what_is_known_does_not_branch() -> None:
    def body(function: FunctionEmitter) -> None:
        function.effect("ret void" if Value(3).below(4) else "unreachable")

    text, _ = tree(body)
    assert "br " not in text
    assert "unreachable" not in text


def test_an_exception_is_an_end_like_others() -> None:
    class Leave(Exception):
        """The body ends here."""

    def run(x: Value) -> None:
        if x.eq(1):
            raise Leave

    def body(function: FunctionEmitter) -> None:
        try:
            run(Value("%x", 64, function))
        except Leave:
            function.effect("ret void ; left")
        else:
            function.effect("ret void ; stayed")

    text, _ = tree(body)
    assert text.count("; left") == text.count("; stayed") == 1


def test_likelihood_is_written_down() -> None:
    def body(function: FunctionEmitter) -> None:
        function.likely(Value("%x", 64, function).eq(1))
        function.effect("ret void")

    assert "!prof !0" in tree(body)[0]
