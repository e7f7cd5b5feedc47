"""Tensors are compared by the equalities of ``tolerances`` alone, whose names say which one.

Types are not known to who reads source. So what is found here is the names of PyTorch's and NumPy's
own comparisons, called or handed on, also in code that tests run in other processes; ``==`` of two
computed operands that ``.all()``, ``.any()``, ``torch.all`` and the like make one answer of; and
``==`` of two ``.item()``, ``.tolist()`` or ``float(…)``. ``==`` with a number that is written there
is fine: what is masked is 0 on every processor. ``a == b`` of two bare names is not seen.
"""

from __future__ import annotations

import ast
import math
import runpy
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import dinov2_attn
from tests.support.tolerances import RELATIVE, are_close, assert_close, assert_same_bits, same_bits

TESTS = Path(__file__).parents[1]
CONFORMANCE = Path(dinov2_attn.__file__).parent / "proof" / "conformance"
FILES = sorted((*TESTS.rglob("*.py"), *CONFORMANCE.glob("*.py")))

COMPARISONS = {
    "equal",
    "allclose",
    "isclose",
    "array_equal",
    "array_equiv",
    "assert_equal",
    "assert_allclose",
    "assert_almost_equal",
    "assert_array_equal",
    "assert_array_almost_equal",
    "assert_array_max_ulp",
}
LIBRARIES = ("torch", "numpy")
NUMBERS = {"item", "tolist"}


def found_in(source):
    """Return the line and the text of each comparison in ``source`` that is none of ours."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [(node.lineno, text) for _, text in _found_in_code(node.value)]
        elif _is_comparison(node):
            found.append((node.lineno, ast.unparse(node)))
    return found


def _found_in_code(text):
    if "import torch" not in text:
        return []
    try:
        return found_in(textwrap.dedent(text))
    except SyntaxError:  # prose
        return []


def _is_comparison(node):
    match node:
        case ast.Attribute(attr=name):
            return name in COMPARISONS or ast.unparse(node).endswith("testing.assert_close")
        case ast.ImportFrom(module=str(module)):
            ours = module.split(".")[0] not in LIBRARIES
            names = {alias.name for alias in node.names}
            return not ours and bool(names & {*COMPARISONS, "assert_close"})
        case ast.Call(func=ast.Attribute(value=ast.Compare() as inner, attr="all" | "any")):
            return _compares_computed(inner) and not (node.args or node.keywords)
        case ast.Call(func=ast.Attribute(attr="all" | "any"), args=[ast.Compare() as inner]):
            return _compares_computed(inner)
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq()], comparators=[right]):
            return _is_number(left) and _is_number(right)
    return False


def _compares_computed(node):
    is_equality = any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
    return is_equality and not any(map(_is_written, (node.left, *node.comparators)))


def _is_written(node):
    """Tell a number, a tuple of numbers and a CONSTANT."""
    parts = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.Tuple, ast.List, ast.operator, ast.unaryop)
    return (isinstance(node, ast.Name) and node.id.isupper()) or all(
        isinstance(part, (*parts, ast.expr_context)) for part in ast.walk(node)
    )


def _is_number(node):
    match node:
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in NUMBERS
        case ast.Call(func=ast.Name(id="float")):
            return True
    return False


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_tensors_are_compared_by_our_two_equalities(file):
    if file == CONFORMANCE / "tolerances.py":
        pytest.skip("they are defined there")
    found = [f"{file.name}:{line}: {text}" for line, text in found_in(file.read_text())]
    advice = "Use assert_same_bits or assert_close of tests/support/tolerances.py"
    assert not found, f"{advice} instead of\n" + "\n".join(found)


# In two parts, or else it would be found here.
UNSEEN = "print(torch." + "equal(1, 2))"


@pytest.mark.parametrize(
    "line",
    [
        "assert torch.equal(a, b)",
        "assert a.equal(b)",
        "assert all(map(torch.equal, a, b))",
        "assert not torch.allclose(a, b)",
        "torch.testing.assert_close(a, b)",
        "from torch.testing import assert_close",
        "np.testing.assert_array_equal(a, b)",
        "assert np.array_equal(a, b)",
        "assert (a == b).all()",
        "assert not (a != b[0]).any()",
        "assert torch.all(a.mean(0) == b)",
        "assert a.sum().item() == b.sum().item()",
        "assert a.tolist() == b.tolist()",
        "assert float(a) == float(b)",
        f"python('import torch\\n{UNSEEN}')",
    ],
)
def test_each_way_to_compare_is_found(line):
    assert found_in(line)


@pytest.mark.parametrize(
    "line",
    [
        "assert_close(a, b)",
        "from tolerances import assert_close",
        "assert (a == 0).all()",
        "assert (a == (0, 0, 255)).all()",
        "assert (a == YELLOW).all()",
        "assert (a >= b).all()",
        "assert a.tolist() == [1, 2]",
        "assert a.shape == b.shape",
    ],
)
def test_other_code_is_let_be(line):
    assert not found_in(line)


# What the two say

ONES = torch.ones(3)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_close_is_within_the_tolerance_of_the_dtype(dtype):
    ones = torch.ones(3, dtype=dtype)
    for factor, close in ((0.9, True), (1.1, False)):
        assert are_close(ones, ones.double() * (1 + factor * RELATIVE[dtype])) == close


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_close_to_nan_or_infinity(value):
    odd = torch.tensor([1, value, 1])
    for ours, theirs in ((odd, ONES), (ONES, odd), (odd, odd)):
        assert not are_close(ours, theirs)
        with pytest.raises(AssertionError, match="expected them within"):
            assert_close(ours, theirs, "them", within=1)
    assert same_bits(odd, odd.clone())


def test_the_same_bits_are_of_one_dtype_and_shape():
    for other in (ONES.double(), ONES[None], ONES[:2], torch.nextafter(ONES, 2 * ONES), -ONES):
        assert not same_bits(ONES, other)
    assert not same_bits(torch.zeros(2), -torch.zeros(2))
    assert same_bits(ONES[:, None].expand(3, 2), torch.ones(2, 3).mT)
    assert same_bits(np.arange(3), np.arange(3))
    assert not same_bits(np.arange(3), np.arange(3) + 1)
    assert same_bits(torch.tensor(True), torch.tensor(True))
    assert same_bits(torch.ones(1, 2)[:, 1], torch.ones(1))


@pytest.mark.parametrize("check", [assert_close, assert_same_bits])
def test_several_are_compared_one_by_one_and_none_is_an_error(check):
    check([ONES, {"a": (ONES,)}], (ONES, {"a": [ONES]}))
    for ours, theirs in (([], []), ([ONES], []), ([ONES, ONES], [ONES]), ({}, {})):
        with pytest.raises(AssertionError, match="expected them"):
            check(ours, theirs, "them")
    for ours, theirs in (({"a": ONES}, {"b": ONES}), ([{"a": ONES}], [{"a": 2 * ONES}])):
        with pytest.raises(AssertionError, match=r"expected them"):
            check(ours, theirs, "them")


def test_the_message_names_what_differs_and_by_how_much():
    with pytest.raises(
        AssertionError, match=r"^expected rows \[1\] within 5e-06 .*; found 1 apart$"
    ):
        assert_close([ONES, 2 * ONES], [ONES, ONES], "rows")
    with pytest.raises(AssertionError, match=r"^expected rows, bit for bit; found 1 between them$"):
        assert_same_bits(2 * ONES, ONES, "rows")


# Where they are run

PROCESSORS = TESTS.parent / ".ci" / "processors"


def test_each_file_that_compares_tensors_runs_as_on_other_processors():
    chosen = set(runpy.run_path(str(PROCESSORS))["chosen"]())
    uses = {
        str(f.relative_to(TESTS.parent))
        for f in TESTS.rglob("test_*.py")
        if "assert_same_bits(" in f.read_text()
    }
    assert uses <= chosen
    by_way_of_others = {
        "grafting/test_hooks_and_adapters",
        "torch_features/test_distributed",
        "apps/extraction/test_extract_interrupted",
    }
    assert {f"tests/{name}.py" for name in by_way_of_others} <= chosen


def test_the_robot_runs_each_setting():
    settings = ", ".join(runpy.run_path(str(PROCESSORS))["SETTINGS"])
    workflow = TESTS.parent / ".github" / "workflows" / "tests.yml"
    assert f"setting: [{settings}]" in workflow.read_text()
