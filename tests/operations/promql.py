"""What an expression of PromQL names: metrics, their labels, and values of these."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import promql_parser
from promql_parser import AggregateExpr, BinaryExpr, Expr, MatchOp, MatrixSelector, VectorSelector

from tests.service.scraped import families_of

ADDED = frozenset({"job", "instance"})
"""Labels that Prometheus adds to whatever it scrapes."""

OF_PROMETHEUS = {"up": frozenset[str](), "ALERTS": frozenset({"alertname", "alertstate"})}
"""What Prometheus itself knows of a target and of its rules."""

VARIABLES = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}
"""What Grafana puts into an expression before it asks."""


@dataclass
class Use:
    """One metric in an expression: labels that are asked of it, and what their values must be.

    A pattern that has to match nothing in particular is no claim about values.
    """

    metric: str
    labels: set[str] = field(default_factory=set)
    values: dict[str, str] = field(default_factory=dict)


def uses(expression: str) -> list[Use]:
    """Every metric that an expression names. Raises ``ValueError`` if it is no PromQL."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return _uses(promql_parser.parse(expression))


def _uses(node: Expr) -> list[Use]:
    match node:
        case MatrixSelector():
            return _uses(node.vector_selector)
        case VectorSelector():
            return [_selected(node)]
        case AggregateExpr():
            found, labels = _uses(node.expr), _labels(node.modifier)
        case BinaryExpr():
            found = _uses(node.lhs) + _uses(node.rhs)
            labels = _labels(node.modifier.matching) if node.modifier else set()
        case _:
            inner = [*getattr(node, "args", ()), *filter(None, [getattr(node, "expr", None)])]
            return [use for part in inner for use in _uses(part)]
    for use in found:
        use.labels |= labels
    return found


def _selected(selector: VectorSelector) -> Use:
    use = Use(selector.name or "")
    for matcher in selector.matchers.matchers:
        use.labels.add(matcher.name)
        match matcher.op:
            case MatchOp.Equal:
                use.values[matcher.name] = re.escape(matcher.value)
            case MatchOp.Re if matcher.value != ".*":
                use.values[matcher.name] = matcher.value
    return use


def _labels(modifier: promql_parser.LabelModifier | None) -> set[str]:
    return set(modifier.labels) if modifier else set()


Shown = Mapping[str, Mapping[str, frozenset[str]]]
"""Samples of a scrape by name: their labels, each with all of its values."""


def shown(*scrapes: str) -> Shown:
    """What these texts of /metrics show together."""
    found: dict[str, dict[str, frozenset[str]]] = {}
    for family in (one for text in scrapes for one in families_of(text)):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels[label] = labels.get(label, frozenset()) | {value}
    return found


def faults(expression: str, scraped: Shown) -> Iterable[str]:
    """What an expression names and nothing has."""
    for use in uses(expression):
        labels: Mapping[str, frozenset[str]] | None = scraped.get(use.metric)
        if use.metric in OF_PROMETHEUS:
            labels = dict.fromkeys(OF_PROMETHEUS[use.metric], frozenset())
        if labels is None:
            yield f"no metric is called {use.metric}"
            continue
        yield from (
            f"{use.metric} has no label {one}" for one in use.labels - labels.keys() - ADDED
        )
        for label, pattern in use.values.items():
            known = labels.get(label, frozenset())
            for value in pattern.split("|") if known else ():
                if not any(re.fullmatch(value, one) for one in known):
                    yield f"{use.metric} has no {label} that is {value}"
