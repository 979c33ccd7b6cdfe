"""``docs/tgi-compatibility.md`` leaves nothing out: each flag, field, route, status and metric."""

import re
from pathlib import Path

from starlette.routing import Route

from deploy.tgi_flags import FLAGS, IGNORED_VARIABLES, Fate
from router.api.rest.app import create_app
from router.api.rest.models_tgi import GenerateParameters, Grammar
from router.config import Settings
from router.metrics import ERR_OF_FAULT, Metrics
from tests.service.fake_service import FakeFleet, FakeMetrics, FakeService
from tests.service.scraped import families_of
from tests.service.test_metrics import snapshot

TEXT = (Path(__file__).parents[2] / "docs" / "tgi-compatibility.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("|")]
WORDS = set(re.findall(r"`([^`\n]+)`", TEXT))


def row(name: str) -> str:
    """The first row whose first cell has this code."""
    return next(line for line in ROWS if f"`{name}`" in line.split("|")[1])


def test_every_flag_has_a_row_that_says_what_becomes_of_it() -> None:
    for flag in FLAGS:
        fate = row(f"--{flag.name}").split("|")[2].strip()
        assert (fate == "refused") == (flag.fate is Fate.REFUSED), flag.name
        assert (fate == "ignored") == (flag.fate is Fate.IGNORED), flag.name
    for name in IGNORED_VARIABLES:
        assert name in WORDS


def test_every_parameter_has_a_row() -> None:
    for name in GenerateParameters.model_fields:
        assert row(name)
    kinds = Grammar.model_json_schema()["properties"]["type"]["enum"]
    for kind in kinds:
        assert f'"type": "{kind}"' in TEXT


def test_every_route_of_tgi_has_a_row() -> None:
    app = create_app(FakeService(), FakeFleet(), FakeMetrics(), Settings())  # type: ignore[arg-type]
    served = {path for route in app.openapi()["paths"] for path in [route]}
    named = {match[1] for match in re.finditer(r"`(?:GET|POST) (/[^`]*)`", TEXT)}
    extra = {route.path for route in app.routes if isinstance(route, Route)}
    known = {path.replace("{model_id}", "{id}") for path in served | extra}
    assert named <= known | {"/docs"}
    for path in ("/", "/generate", "/invocations", "/vertex", "/chat_tokenize", "/info", "/ping"):
        assert path in named


def test_every_metric_has_its_name_here() -> None:
    metrics = Metrics()
    metrics.watch(snapshot, lambda: {"g": True}, lambda: {"g": "torch"})
    families = families_of(metrics.render().decode())
    for name in (family.name for family in families):
        if name.startswith("tgi_"):
            assert any(name in line for line in ROWS), name
    for label in ERR_OF_FAULT.values():
        assert label in WORDS
