"""Putting the processes on machines: the ``roundhouse`` command and its local supervisor."""
