"""What the load generators themselves cost.

A generator that needs as much CPU as a server would be what is measured.
"""

import sys
from functools import partial

from benchmarks.jobs import Job, run_job
from benchmarks.processes import free_port, running
from benchmarks.rows import Row
from benchmarks.systems import COMPLETIONS, GENERATE, accepts, completion
from router.v1 import router_pb2

BAR_US = 10.0
CLIENTS, TOKENS, REQUESTS = 64, 500, 128


def selfcheck(quick: bool) -> list[Row]:
    """CPU of each generator in microseconds per token, against servers of canned answers."""
    requests = REQUESTS // 2 if quick else REQUESTS
    message = router_pb2.GenerateRequest(
        text="a", parameters=router_pb2.Parameters(max_tokens=TOKENS)
    )
    bodies = {
        "fake": ("load", COMPLETIONS, completion([1], TOKENS)),
        "fake_grpc": ("load_grpc", GENERATE, message.SerializeToString().hex()),
    }
    rows = []
    for server, (generator, path, body) in bodies.items():
        port = free_port()
        with running([sys.executable, "-m", f"benchmarks.{server}", str(port)]) as child:
            child.wait_until(partial(accepts, port), 20.0)
            job = Job(port, path, [body] * requests, CLIENTS, TOKENS)
            seen = run_job(generator, job).raise_errors()
        rows.append(
            Row.at_most(
                "selfcheck",
                f"{generator}: CPU of the generator per token, {CLIENTS} streams",
                seen.generator_us,
                BAR_US,
                unit="µs",
                note=f"{seen.rate:,.0f} tokens/s against a server of canned answers",
            )
        )
    return rows
