"""What a scrape shows, by the names that Prometheus keeps it under."""

import re
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

COUNTER = re.compile(r"^(# TYPE \w+)(?<!_total) counter$", re.MULTILINE)


def families_of(text: str) -> Iterable[Metric]:
    """The families of a text of /metrics.

    The library's reader gives the suffix _total to counters that lack it, as TGI's do. Prometheus
    does not, and nor does this.
    """
    return text_string_to_metric_families(COUNTER.sub(r"\1 untyped", text))
