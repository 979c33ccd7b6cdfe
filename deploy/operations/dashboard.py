"""The Grafana dashboard in Grafana's words; ``make dashboard`` writes it anew.

What one imports is ``grafana/roundhouse.json`` beside this file, what it shows is in ``panels``.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from deploy.operations.panels import ROWS, Panel, Steps

UID = "roundhouse"
COLUMNS = 24
SCHEMA_VERSION = 39
"""Of Grafana 10.3; later ones bring a document up to date when they load it."""


def dashboard() -> dict[str, Any]:
    """The document that Grafana imports."""
    return {
        "uid": UID,
        "title": "Roundhouse",
        "description": "Router, groups of workers, and gateways. What to do is behind the i of "
        "each panel, and in docs/operations.md.",
        "tags": ["roundhouse"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": []},
        "templating": {"list": [*_variables()]},
        "panels": [*_laid_out()],
    }


def _variables() -> Iterator[dict[str, Any]]:
    """What one chooses above the panels: where the numbers are, and of which processes."""
    yield {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }
    for name, others in (("job", ""), ("instance", '{job=~"$job"}')):
        query = f"label_values(tgi_request_count{others}, {name})"
        yield {
            "name": name,
            "type": "query",
            "datasource": _source(),
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _laid_out() -> Iterator[dict[str, Any]]:
    """All panels, row below row."""
    top, ident = 0, 1
    for row in ROWS:
        yield _heading(row.title, ident, top)
        top, left = top + 1, 0
        for panel in row.panels:
            ident += 1
            place = {"h": row.height, "w": panel.width, "x": left, "y": top}
            yield _drawn(panel) | {"id": ident, "gridPos": place}
            left += panel.width
        assert left == COLUMNS, f"{row.title} is {left} columns wide"
        top, ident = top + row.height, ident + 1


def _heading(title: str, ident: int, top: int) -> dict[str, Any]:
    place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
    return {"id": ident, "type": "row", "title": title, "collapsed": False, "panels": []} | {
        "gridPos": place
    }


def _drawn(panel: Panel) -> dict[str, Any]:
    """A panel in Grafana's words."""
    defaults = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": _thresholds(panel.steps),
    }
    if panel.most is not None:
        defaults["max"] = panel.most
    looks, options = _looks(panel)
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.what_to_do,
        "datasource": _source(),
        "fieldConfig": {"defaults": defaults | looks, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _source(),
                "expr": query.expression,
                "legendFormat": query.legend,
                "range": True,
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def _thresholds(steps: Steps) -> dict[str, Any]:
    coloured = [{"value": value, "color": colour} for value, colour in steps]
    return {"mode": "absolute", "steps": [{"value": None, "color": "green"}, *coloured]}


def _looks(panel: Panel) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is particular to a kind of panel: defaults of its fields, and its options."""
    match panel.kind:
        case "stat":
            shown = {"calcs": ["lastNotNull"], "fields": "", "values": False}
            return {}, {"reduceOptions": shown, "colorMode": "background", "graphMode": "area"}
        case "state-timeline":
            words = {"0": {"text": "down", "color": "red"}, "1": {"text": "up", "color": "green"}}
            return {"mappings": [{"type": "value", "options": words}]}, {"showValue": "never"}
    style = {
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 5,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if panel.steps else "off"},
    }
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    return {"custom": style}, {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def main() -> None:
    """Writes the dashboard to standard output."""
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")


if __name__ == "__main__":
    main()
