"""The CPU as XLA's device, with one thread: set before torch-xla is imported."""

import os

os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
