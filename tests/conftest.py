"""What all tests share."""

import os
import signal

from hypothesis import HealthCheck, settings

# Nobody listens there: no test asks a model hub by accident, and a mistake fails at once.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Nobody's collector gets what tests do, unless they say so.
for name in [name for name in os.environ if name.startswith(("OTEL_", "OTLP_"))]:
    del os.environ[name]
# gRPC's own lines about connections that tests break on purpose.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# A shell lets what it runs in the background ignore Ctrl-C, and so would every server that a test
# starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile(
    "roundhouse", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("roundhouse")
