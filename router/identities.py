"""The certificates of a router or gateway: for its clients, and for its cluster."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from router.config import ConfigError, Settings
from tls.files import Files, TlsError
from tls.identity import Identity

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identities:
    """``clients`` is for the public ports, ``cluster`` for workers and gateways elsewhere.

    None: what is said there is not encrypted.
    """

    clients: Identity | None
    cluster: Identity | None

    @classmethod
    def of(cls, settings: Settings, warn: Callable[[str], None] = log.warning) -> "Identities":
        """Reads the files that the settings name. Raises ``ConfigError`` with every fault."""
        faults: list[str] = []

        def identity(files: Files | None) -> Identity | None:
            try:
                return None if files is None else Identity(files, warn)
            except TlsError as error:
                faults.append(str(error))
                return None

        found = cls(identity(settings.tls), identity(settings.cluster))
        if faults:
            raise ConfigError(faults)
        return found


def check_files(settings: Settings) -> None:
    """Raises ``ConfigError`` if files that the settings name cannot be used."""
    Identities.of(settings, warn=lambda _: None)
