"""What gRPC is told by the environment, which it reads when it is first used.

To be imported before grpc is. A variable that is set already stays.

- gRPC prepares for forks that go on in Python; ours only start other programs.
- It has a line for each handshake that fails, of which anybody may cause any number.
- Its event engine hands each message from thread to thread until a processor is awake for it.
  Without, the thread that waits for it reads it, which takes half as many wakings. (A process that
  never waits for gRPC would then read nothing; grpc.aio always does.)
"""

import os

EXPERIMENTS = "GRPC_EXPERIMENTS"
SETTINGS = {
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "GRPC_VERBOSITY": "ERROR",
    EXPERIMENTS: "-event_engine_client,-event_engine_listener",
}

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
