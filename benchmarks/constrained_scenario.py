"""What a constraint costs: answers by a JSON schema beside answers without one, on one server."""

import json
from typing import Any

from benchmarks.engine_scenarios import ROUNDS, SEED, latencies, rate
from benchmarks.jobs import Seen
from benchmarks.loads import DECODE, NEW, PROMPT, say, warm
from benchmarks.prompts import distinct
from benchmarks.rows import Row
from benchmarks.systems import System, completion, roundhouse

BAR = 0.90
CLIENTS = 8
# A list that cannot end before the answer's length does, of what is usual in structured answers.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["person", "place", "thing"]},
            "size": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "kind", "size", "tags"],
        "additionalProperties": False,
    },
}
CONSTRAINT = {"type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMA}}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1, top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
}


def constrained(quick: bool) -> list[Row]:
    """Both ways of drawing, each without and with the constraint, in turns."""
    with roundhouse() as system:
        return [row(system, way, quick) for way in WAYS]


def row(system: System, way: str, quick: bool) -> Row:
    """The row of one way of drawing."""
    seen: dict[bool, list[Seen]] = {False: [], True: []}
    for number in range(1 if quick else ROUNDS):
        # Who goes second finds a warmer machine, so they take turns at that.
        for bound in (False, True) if number % 2 else (True, False):
            warm(system, CLIENTS)
            run(system, WAYS[way], 1, bound=bound)
            seen[bound].append(run(system, WAYS[way], SEED + number, bound=bound))
            say(f"  {way}, constrained {bound}: {seen[bound][-1].rate:.1f} tokens/s")
    note = f"constrained: {latencies(seen[True])}; without: {latencies(seen[False])}"
    what = f"JSON schema, {way}, c={CLIENTS}, beside the same without a constraint"
    return Row.against("constrained", what, rate(seen[True]), rate(seen[False]), BAR, note=note)


def run(system: System, way: dict[str, Any], seed: int, *, bound: bool) -> Seen:
    """One load; other seeds have other prompts. Raises ``LoadError`` on any error."""
    bodies = []
    for prompt in distinct(DECODE[CLIENTS].requests, PROMPT, seed):
        body = json.loads(completion(prompt, NEW)) | way | {"seed": seed}
        if bound:
            del body["ignore_eos"]
            body["response_format"] = CONSTRAINT
        bodies.append(json.dumps(body))
    return system.load(bodies, CLIENTS, NEW).raise_errors()
