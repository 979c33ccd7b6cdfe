"""Makes torch's compute threads wait politely. To be imported before torch.

After each operation torch's OpenMP threads spin for the next one, for milliseconds unless told
otherwise. Between the operations of a step there is Python, and between steps there are a router
and whatever else the machine does, so spinning keeps cores busy that others want; and while another
program has a core, everybody waits for it. A short spin, some tens of microseconds, bridges the
gaps between operations. (Two cores, one of them wanted by another program, 8 sequences of SmolLM2:
24 tokens a second instead of 11.)

GNU's OpenMP reads the variable when it is loaded. Whoever has set it, or the standard's own, keeps
what they chose.
"""

import os

SPIN_COUNT = 2000

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
