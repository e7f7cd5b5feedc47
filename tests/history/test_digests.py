"""Digests of functions: what counts as their code, and what does not."""

from __future__ import annotations

import ast
import functools
import importlib
import sys
import zipfile

import pytest

from dinov2_attn.history.digests import _canonical, digest_of, digests_in

# What Python versions disagree on, or did: f-strings (3.12 leaves an empty string behind a nested
# format), type parameters, printable characters, parentheses, `u`, docstrings.
SYNTAX = r'''
@decorated(1, key=...)
async def f(a, /, b: int = 1, *args, c, d=None, **kwargs) -> list[int] | None:
    """Documented
  in two columns."""
    x = []  # type: list
    async with (open(b"\x00") as g, g): x = f"{a!r:>{b}} {{x}} {c=}" "tail" f"{d:}" rf"\d{a}"
    match x:
        case {"k": [1, *rest], **others} if rest: return {**a, b: u"c", **others}
        case Point(x=0.1, y=None) | (True as y): yield lambda: ((await a), -1j, not b, "\U0001FAE8")
    class Inner:
        """Documented too."""
    def inner(): """Nothing else."""
    for i, *j in a[1:, ::2]: del (i), j
    else: raise X from (nonlocal_ := 1_000)

class C:
    def f(self): global g; g = f"{self.a:{self.b}.{self.c}}" if self else ""
'''


def test_a_digest_is_the_same_on_every_python():
    """These constants were computed on Python 3.10, 3.11, 3.12 and 3.13."""
    assert digests_in(SYNTAX, ["f", "C.f", "g"]) == {
        "f": "3e8533ed7c877b19",
        "C.f": "9f76f1c3572830ac",
    }


SAME = {
    "a comment": "def f(x): return x  # so",
    "a docstring": 'def f(x):\n    """So."""\n    return x',
    "format": "def f(\n    x,\n):\n\n    return (\n        x\n    )",
    "a type comment": "def f(x):  # type: (int) -> int\n    return x",
}
OTHER = {
    "a name": "def f(y): return y",
    "a default": "def f(x=0): return x",
    "an annotation": "def f(x: int): return x",
    "a decorator": "@g\ndef f(x): return x",
    "async": "async def f(x): return x",
    "a statement": "def f(x): pass; return x",
    "a string that is no docstring": 'def f(x): x; "So."; return x',
}


@pytest.mark.parametrize("source", SAME.values(), ids=SAME)
def test_what_does_not_count(source):
    assert digests_in(source, ["f"]) == digests_in("def f(x): return x", ["f"])


@pytest.mark.parametrize("source", OTHER.values(), ids=OTHER)
def test_what_counts(source):
    assert digests_in(source, ["f"]) != digests_in("def f(x): return x", ["f"])


@pytest.mark.parametrize(
    ("one", "other"),
    [("0", "False"), ("1", "1.0"), ("'1'", "1"), ("{**a, b: c}", "{b: a, **c}"), ("-1", "+1")],
)
def test_values_that_look_alike_have_different_digests(one, other):
    found = {digests_in(f"def f(): return {value}", ["f"])["f"] for value in (one, other)}
    assert len(found) == 2


def test_the_empty_string_that_newer_pythons_add_to_a_format_does_not_count():
    """Python 3.12 does; older ones are made to here."""
    tree = ast.parse('f"{a:>{b}} and text"')
    before = _canonical(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            node.values.append(ast.Constant(""))
    assert _canonical(tree) == before != _canonical(ast.parse('f"{a:>{b}} or text"'))


# Written to a file and run for each test: a function is read when it is first met, and never again.
LIVE = '''
import functools

def wrapping(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

def plain(
    text="""
not indented""",
):
    return text

@wrapping
def decorated():
    return 1

class Class:
    def method(self):
        return """
not indented"""

class Narrow:
 def method(self):
  return 1
'''


@pytest.fixture(params=["a folder", "a zip file"])
def live(request, tmp_path, monkeypatch):
    """A module that has been imported, and has left ``sys.modules``."""
    place, name = tmp_path, f"live_in_{request.param[2:5].strip()}"
    if request.param == "a folder":
        (place / f"{name}.py").write_text(LIVE)
    else:
        place = tmp_path / "live.zip"
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr(f"{name}.py", LIVE)
    monkeypatch.syspath_prepend(place)
    module = importlib.import_module(name)
    del sys.modules[name]
    return module


def test_a_live_function_has_the_digest_of_its_source(live):
    names = ["plain", "decorated", "Class.method", "Narrow.method"]
    functions = [live.plain, live.decorated, live.Class.method, live.Narrow.method]
    assert dict(zip(names, map(digest_of, functions), strict=True)) == digests_in(LIVE, names)


def test_a_wrapper_around_a_function_is_not_that_function(live):
    plain = live.plain
    assert digest_of(live.wrapping(plain)) not in (digest_of(plain), None)
    assert digest_of(lambda: plain) not in (digest_of(plain), None)
    assert digest_of(live.wrapping(len)) == digest_of(live.wrapping(plain))  # read for itself


def test_what_has_no_source_has_no_digest():
    scope = {}
    exec("def f(): pass", scope)
    assert [digest_of(f) for f in (scope["f"], len, functools.partial(print))] == [None] * 3


def test_other_code_where_a_function_was_is_not_its_source(tmp_path):
    """torch.hub replaces files under a running process."""
    file = tmp_path / "replaced.py"
    scope = {}
    exec(compile("def f(): pass", str(file), "exec"), scope)
    file.write_text("def g(): pass\n")
    assert digest_of(scope["f"]) is None
