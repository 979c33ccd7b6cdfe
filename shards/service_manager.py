"""What a service manager (systemd, for a unit of ``Type=notify``) is told: ready, and stopping.

The protocol is one datagram of text for each piece of news, sd_notify(3); who started the process
says in ``NOTIFY_SOCKET`` where it listens. Where nobody says so, nobody is told.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

SOCKET = "NOTIFY_SOCKET"
# Room for a datagram is there at once, but for a manager that is busy elsewhere.
WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """Who wants to hear of this process; ``address`` is "" if nobody does."""

    address: str

    @classmethod
    def taken(cls) -> "ServiceManager":
        """The one that the environment names, where it is named no more from then on.

        What this process starts is not the service, and must not say that it is ready.
        """
        return cls(os.environ.pop(SOCKET, ""))

    def ready(self, status: str) -> None:
        """The service serves. ``status`` is one line for whoever asks how it is."""
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """The service ends, whoever asked for it."""
        self._tell("STOPPING=1\nSTATUS=finishing what is open")

    def _tell(self, news: str) -> None:
        if not self.address:
            return
        # A name that begins with @ is none of the file system.
        path = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        # A manager that is gone, or of another kind, must not end the service.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as way:
            way.settimeout(WAIT_S)
            way.connect(path)
            way.send(news.encode())


NOBODY = ServiceManager("")
