"""How a chat template compares values: within bounds.

Values that hold one and the same value many times are small, and endless to whoever goes through
them: forty lists, each with the one before twice, are compared in 2**40 steps, with no look at the
clock. So what is compared or hashed is measured before. Operators become filters for that.
"""

import operator
from collections.abc import Callable
from typing import Any

import jinja2.tests
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from router.text import template_bounds as bounds

SCALARS = bounds.SCALARS


def _compared(work: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A comparison of two values; one with a text or a number is at its end at once."""

    def compare(left: Any, right: Any) -> Any:
        if isinstance(left, SCALARS) or isinstance(right, SCALARS):
            return work(left, right)
        return work(bounds.comparable(left), bounds.comparable(right))

    return compare


def _is_in(left: Any, right: Any) -> bool:
    if isinstance(left, SCALARS) or hasattr(right, "__len__"):
        return left in right
    return any(left is one or left == one for one in bounds.steps(right))


_eq, _ne = _compared(operator.eq), _compared(operator.ne)
_lt, _lteq = _compared(operator.lt), _compared(operator.le)
_gt, _gteq = _compared(operator.gt), _compared(operator.ge)
_in = _compared(_is_in)
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": _eq,
    "ne": _ne,
    "lt": _lt,
    "lteq": _lteq,
    "gt": _gt,
    "gteq": _gteq,
    "in": _in,
    "notin": lambda left, right: not _in(left, right),
}
"""Jinja's names for the operators that compare, and what takes their place."""
_TESTS: dict[Any, Callable[[Any, Any], Any]] = {
    operator.eq: _eq,
    operator.ne: _ne,
    operator.lt: _lt,
    operator.le: _lteq,
    operator.gt: _gt,
    operator.ge: _gteq,
    jinja2.tests.test_in: _in,
}


class AsFilters(NodeTransformer):
    """Has ``~`` and comparisons made by filters, and keys of dictionaries pass through one."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """Replaces one."""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        """Replaces one; of several in a row what is compared is measured."""
        self.generic_visit(node)
        if len(node.ops) == 1:
            (operand,) = node.ops
            return _filter(node.expr, f"_{operand.op}", operand.expr)
        node.expr = _filter(node.expr, "_comparable")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "_comparable")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        """Measures the key, which is hashed."""
        self.generic_visit(node)
        node.key = _filter(node.key, "_comparable")
        return node


def _filter(value: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def in_loops(tree: nodes.Template) -> nodes.Template:
    """Has every loop go through its items by ``steps``."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filter(loop.iter, "_steps")
    return tree


def filters() -> dict[str, Callable[..., Any]]:
    """Returns what operators and loops become; no template can name these."""
    signs = {f"_{name}": one for name, one in COMPARISONS.items()}
    inner = {"_steps": bounds.steps, "_concat": bounds.concatenated}
    return {**signs, **inner, "_comparable": bounds.comparable}


def tests() -> dict[str, Any]:
    """Returns Jinja's tests, of which those that compare are bounded."""
    found: dict[str, Any] = {**jinja2.tests.TESTS, "divisibleby": _divisible}
    return {name: _TESTS.get(one, one) for name, one in found.items()}


def _divisible(value: Any, number: Any) -> bool:
    bounds.check_operator("%", value, number)
    return bool(value % number == 0)
