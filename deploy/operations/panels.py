"""What the Grafana dashboard shows, as a table of panels.

Rows are in the order of the questions that one asks at night: is it healthy, what do users feel,
what is asked of it, has it memory, which group, which gateway.
"""

from dataclasses import dataclass

FROM = 'job=~"$job", instance=~"$instance"'
"""Which processes: routers and gateways are scraped as targets of their own."""

OURS = "generation|incomplete|unavailable|deadline"
"""Kinds of failure that the server has to answer for, as opposed to a request or its client."""

FIRST_TOKEN_S = 2.5
"""What the alerts promise of the first token; the same in ``prometheus/alerts.yaml``."""

Steps = tuple[tuple[float, str], ...]
"""Colours from a value on; below the first it is green."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and what its series are called: ``{{label}}`` stands for a label's value."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: what it shows, in which unit, and what to do if it looks wrong.

    ``kind`` is Grafana's name of it, ``width`` is in columns of 24. ``stacked`` puts series on top
    of each other, ``most`` is the end of the axis.
    """

    kind: str
    title: str
    what_to_do: str
    queries: tuple[Query, ...]
    unit: str = "short"
    steps: Steps = ()
    width: int = 8
    stacked: bool = False
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading, side by side; all are ``height`` high."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 8


def gauge(name: str, matchers: str = "") -> str:
    """A metric of the chosen processes."""
    return f"{name}{{{FROM}{', ' if matchers else ''}{matchers}}}"


def rate(name: str, matchers: str = "") -> str:
    """How much of a counter comes in a second."""
    return f"rate({gauge(name, matchers)}[$__rate_interval])"


def quantile(share: float, histogram: str, label: str = "") -> str:
    """A quantile of a histogram over all processes, for each value of a label if there is one."""
    labels = f"le, {label}" if label else "le"
    return f"histogram_quantile({share}, sum by ({labels}) ({rate(histogram + '_bucket')}))"


def quantiles(histogram: str) -> tuple[Query, ...]:
    """The usual case, the bad one and the worst."""
    return tuple(
        Query(quantile(share, histogram), f"p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)
    )


def share_of_requests(kinds: str) -> str:
    """Which share of all requests fails in one of these ways."""
    failed = rate("tgi_request_failure", f'err=~"{kinds}"')
    return f"sum({failed}) / (sum({rate('tgi_request_count')}) > 0) or vector(0)"


def number(title: str, expression: str, what_to_do: str, unit: str, steps: Steps) -> Panel:
    """One large number."""
    return Panel("stat", title, what_to_do, (Query(expression, title),), unit, steps, width=3)


def part_of_cache(title: str, what_to_do: str, tokens: str) -> Panel:
    """What some tokens take of each group's cache."""
    part = f"max by (group) ({gauge(tokens)} / {gauge('roundhouse_kv_tokens_total')})"
    query = Query(part, "{{group}}")
    return Panel("timeseries", title, what_to_do, (query,), "percentunit", width=6, most=1)


HEALTHY = Row(
    "Is it healthy?",
    (
        number(
            "Firing alerts",
            'count(ALERTS{alertname=~"Roundhouse.+", alertstate="firing"}) or vector(0)',
            "What Prometheus is alarmed about. docs/operations.md has a line for each alert.",
            "none",
            ((1, "red"),),
        ),
        number(
            "Groups down",
            f"sum({gauge('roundhouse_groups')}) - sum({gauge('roundhouse_groups_up')})",
            "Groups of workers that are configured and not connected. The row Groups says which; "
            "the router's log says why: 'group NAME is down: ...'.",
            "none",
            ((1, "red"),),
        ),
        number(
            "Requests that failed",
            share_of_requests(OURS),
            "Share of requests that failed for a reason of the server's: a worker was lost, none "
            "is up, or a deadline passed. Look at Requests for the kind, and at Groups.",
            "percentunit",
            ((0.01, "yellow"), (0.05, "red")),
        ),
        number(
            "Requests refused",
            share_of_requests("overloaded"),
            "Share of requests answered 429: --max-concurrent-requests are open. Clients come too "
            "fast for these workers: add groups, or let fewer in.",
            "percentunit",
            ((0.01, "yellow"), (0.05, "red")),
        ),
        number(
            "First token, p95",
            quantile(0.95, "roundhouse_time_to_first_token_seconds"),
            "Of twenty requests, one waits longer than this for its first token. If it is high, "
            "see whether requests wait (Waiting) or steps are slow (Step time).",
            "s",
            ((FIRST_TOKEN_S, "yellow"), (4 * FIRST_TOKEN_S, "red")),
        ),
        number(
            "Waiting",
            f"sum({gauge('tgi_queue_size')})",
            "Requests that wait for a place in a group. Above 0 for long: more groups, a smaller "
            "model, or more KV memory, whichever the row Memory points at.",
            "none",
            ((1, "yellow"), (50, "red")),
        ),
        number(
            "KV memory, fullest group",
            f"max({gauge('roundhouse_kv_tokens_used')} / {gauge('roundhouse_kv_tokens_total')})",
            "Memory that running requests hold in the group that has the least left. Full is no "
            "fault by itself; full with preemptions means too little for this traffic.",
            "percentunit",
            ((0.95, "yellow"),),
        ),
        number(
            "Gateways detached",
            f"count({gauge('roundhouse_gateway_attached')} == 0) or vector(0)",
            "Gateways without a stream to their router: they answer 503. Is the router up, and is "
            "its gRPC port reached from there? The gateway's log says why: 'not attached: ...'.",
            "none",
            ((1, "red"),),
        ),
    ),
    height=4,
)

FELT = Row(
    "What users feel",
    (
        Panel(
            "timeseries",
            "Time to first token",
            f"From a request to its first token. The alerts promise {FIRST_TOKEN_S} s for 95 of "
            "100. High with requests waiting: too little capacity. High without: long prompts, "
            "or slow steps.",
            quantiles("roundhouse_time_to_first_token_seconds"),
            "s",
            ((FIRST_TOKEN_S, "red"),),
        ),
        Panel(
            "timeseries",
            "Time between tokens",
            "Between a token and the one before it. A high p99 beside a low p50: long prompts are "
            "computed beside running answers; lower --max-batch-prefill-tokens. All high: too many "
            "sequences at once; lower --max-batch-size, or add groups.",
            quantiles("roundhouse_inter_token_latency_seconds"),
            "s",
        ),
        Panel(
            "timeseries",
            "Time of a whole request",
            "From a request to its end, of those that broke off as well. It grows with the length "
            "of the answers, so read it beside the two others.",
            quantiles("tgi_request_duration"),
            "s",
        ),
    ),
)

ASKED = Row(
    "Traffic",
    (
        Panel(
            "timeseries",
            "Requests",
            "How requests end, in a second. generation: a worker was lost. unavailable: no group "
            "up, or shutting down. overloaded: 429. deadline: too slow. dropped: the client left. "
            "validation, template, unauthenticated: the client's own faults.",
            (
                Query(f"sum({rate('tgi_request_success')})", "success"),
                Query(f"sum by (err) ({rate('tgi_request_failure')}) > 0", "{{err}}"),
            ),
            "reqps",
            width=6,
            stacked=True,
        ),
        Panel(
            "timeseries",
            "Waiting and running",
            "Requests that wait for a place, and sequences that are computed. Many waiting beside "
            "few running: memory is full, or --max-batch-size is low.",
            (
                Query(f"sum({gauge('roundhouse_requests_waiting')})", "waiting"),
                Query(f"sum({gauge('roundhouse_requests_running')})", "running"),
            ),
            "none",
            width=6,
        ),
        Panel(
            "timeseries",
            "Time in the queue",
            "From a request to the first plan that computes it. Most of a late first token, if "
            "requests wait.",
            quantiles("tgi_request_queue_duration"),
            "s",
            width=6,
        ),
        Panel(
            "timeseries",
            "Tokens",
            "Tokens in a second: delivered to clients, and of prompts. Delivered at 0 while "
            "requests run: nothing is computed, see Groups.",
            (
                Query(
                    f"sum({rate('roundhouse_time_to_first_token_seconds_count')}) + "
                    f"sum({rate('roundhouse_inter_token_latency_seconds_count')})",
                    "delivered",
                ),
                Query(f"sum({rate('roundhouse_admitted_tokens_total')})", "of prompts"),
                Query(
                    f"sum({rate('roundhouse_prefix_hit_tokens_total')})", "of these, not computed"
                ),
            ),
            "suffix: tok/s",
            width=6,
        ),
    ),
)

MEMORY = Row(
    "Memory",
    (
        part_of_cache(
            "KV memory in use, by group",
            "Share of a group's cache that running requests hold. At 100 % for long, with "
            "preemptions: raise --kv-tokens, lower --max-batch-size, or add a group.",
            "roundhouse_kv_tokens_used",
        ),
        part_of_cache(
            "KV memory kept to share, by group",
            "Share of a group's cache that ended answers keep for requests that begin alike. It "
            "is given up first when memory runs out.",
            "roundhouse_kv_tokens_cached",
        ),
        Panel(
            "timeseries",
            "Prompt tokens not computed",
            "Share of admitted tokens that a resident sequence had already. A fall means other "
            "traffic, or memory too short to keep prefixes; first tokens come later then.",
            (
                Query(
                    f"sum({rate('roundhouse_prefix_hit_tokens_total')}) / "
                    f"(sum({rate('roundhouse_admitted_tokens_total')}) > 0)",
                    "not computed",
                ),
            ),
            "percentunit",
            width=6,
            most=1,
        ),
        Panel(
            "timeseries",
            "Preemptions",
            "Requests put back for want of memory, in a second. Each is computed again later: a "
            "pause for its client. Steady: lower --max-batch-size or raise --kv-tokens.",
            (Query(f"sum({rate('roundhouse_preemptions_total')})", "preemptions"),),
            "ops",
            width=6,
        ),
    ),
)

GROUPS = Row(
    "Groups",
    (
        Panel(
            "state-timeline",
            "Connected",
            "Whether the router is connected to each group. One that comes and goes: read what its "
            "workers say in the log before they end.",
            (Query(f"min by (group) ({gauge('roundhouse_group_up')})", "{{group}}"),),
            "none",
        ),
        Panel(
            "timeseries",
            "Step time, by group",
            "The engine's own time for one step; every stream of the group gets a token for it. A "
            "group that is slower than its like: a busy neighbour on its machine, or a hot device.",
            (
                Query(quantile(0.5, "roundhouse_step_seconds", "group"), "{{group}} p50"),
                Query(quantile(0.99, "roundhouse_step_seconds", "group"), "{{group}} p99"),
            ),
            "s",
        ),
        Panel(
            "timeseries",
            "Losses, and what became of requests",
            "Times that a group went down unasked; requests started again for it; running ones "
            "moved out of groups that leave (switch, rolling update); answers that went on in "
            "another group. Losses without a deployment: read the log of those workers.",
            (
                Query(
                    f"sum by (group) (increase({gauge('roundhouse_group_losses_total')}"
                    "[$__rate_interval])) > 0",
                    "lost: {{group}}",
                ),
                *(
                    Query(f"sum(increase({gauge(name)}[$__rate_interval]))", legend)
                    for name, legend in (
                        ("roundhouse_resumptions_total", "started again"),
                        ("roundhouse_moves_total", "moved"),
                        ("roundhouse_continuations_total", "gone on elsewhere"),
                    )
                ),
            ),
            "none",
        ),
    ),
)

GATEWAYS = Row(
    "Gateways",
    (
        Panel(
            "timeseries",
            "Attached to a router",
            "As each router counts them. Fewer than were started: one has ended, or cannot reach "
            "its router.",
            (Query(f"sum by (instance) ({gauge('roundhouse_gateways')})", "{{instance}}"),),
            "none",
            width=12,
        ),
        Panel(
            "timeseries",
            "Requests, by process",
            "Each process counts the requests of its own clients. A gateway without any: its port "
            "is not reached, or a balancer has left it out.",
            (
                Query(
                    f"sum by (job, instance) ({rate('tgi_request_count')})", "{{job}} {{instance}}"
                ),
            ),
            "reqps",
            width=12,
        ),
    ),
    height=7,
)

ROWS = (HEALTHY, FELT, ASKED, MEMORY, GROUPS, GATEWAYS)
