"""Workers run on numpy 1.26, as Neuron's packages ask, and start beside vLLM 0.11's llguidance.

They use no name that came later. What is used only where it is there (``getattr``) is no attribute,
and so is not found here.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of the module, in 2.0 to 2.4; and of its arrays.
LATER = set(
    """
    acos acosh asin asinh astype atan atan2 atanh bitwise_count bitwise_invert bitwise_left_shift
    bitwise_right_shift bool concat cumulative_prod cumulative_sum isdtype long matrix_transpose
    matvec permute_dims pow strings trapezoid ulong unique_all unique_counts unique_inverse
    unique_values unstack vecdot vecmat
    """.split()
)
LATER_OF_ARRAYS = {"mT", "to_device"}
# What llguidance 0.7.30 has, the last that vLLM 0.11 takes. Constraints need a later one.
GUIDANCE = {"LLMatcher", "LLParserLimits", "LLTokenizer", "regex_to_lark"}
# These run in environments of their own, which have numpy 2.
APART = ("jax", "torch", "vllm", "llama")
FILES = [
    path
    for path in sorted((ROOT / "shards").rglob("*.py"))
    if path.parent.name != "v1" and not path.name.startswith(APART)
]


def too_new(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="np"), attr=name) if name in LATER:
                yield name
            case ast.Attribute(attr=name) if name in LATER_OF_ARRAYS:
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_name_of_numpy_2_is_used(path: Path) -> None:
    assert list(too_new(ast.parse(path.read_text()))) == []


def test_a_later_name_is_found() -> None:
    source = "np.vecdot(a, b) + a.mT + np.dot(a, b) + a.pow"
    assert sorted(too_new(ast.parse(source))) == ["mT", "vecdot"]
    assert len(FILES) > 40


def test_of_llguidance_a_worker_imports_what_the_older_one_has() -> None:
    found = {
        name.name
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module == "llguidance"
        for name in node.names
    }
    assert found
    assert found <= GUIDANCE
