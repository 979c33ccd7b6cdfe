"""The pure heart of the router: a state machine that queues, budgets and batches.

Rules of this folder, kept by ``tests/test_tidy.py``:

* Three entry points: ``observe(now_ms, event)``, ``plan(now_ms)``, ``wake_at()``, all synchronous.
* No await, clock, randomness, logging, environment, I/O, float arithmetic or set iteration; nothing
  is imported but a few types of the standard library and this folder. The same events at the same
  times give the same effects, in every process.
* Time is an integer of milliseconds and is always an argument.
* Whatever a user or a worker can cause is answered with an effect. An assertion that fails is a bug
  of this folder and ends the process.
"""
