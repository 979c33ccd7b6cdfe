"""What ``roundhouse serve`` tells the person who started it."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from tqdm import tqdm

from deploy.groups import LocalGroup
from deploy.keeper import LOOP_DEATHS, Died, Loading, News, Ready, Said
from router.logs import formatter
from shards.service_manager import NOBODY, ServiceManager

# Where there is no bar, how often one hears how far a worker has loaded.
LOADING_LINE_S = 5.0
EXAMPLE = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "stream": True,
}


@dataclass(frozen=True, slots=True)
class Urls:
    """Where the router listens, as a client on this machine would write it.

    ``grpc`` is empty for a process that serves REST alone.
    """

    rest: str
    grpc: str

    @classmethod
    def of(cls, host: str, port: int, grpc_port: int | None, *, tls: bool = False) -> "Urls":
        """The addresses of a router, or of a gateway, that listens on ``host``."""
        scheme = "https" if tls else "http"
        shown = "localhost" if host in ("0.0.0.0", "::", "") else host  # noqa: S104 - read, not bound
        shown = f"[{shown}]" if ":" in shown else shown
        return cls(f"{scheme}://{shown}:{port}", f"{shown}:{grpc_port}" if grpc_port else "")


class Console:
    """Prints progress: a bar on a terminal, plain lines elsewhere, JSON objects if asked for.

    Once it has said that all is ready, nobody may be looking: from then on its lines are the log's.
    ``manager`` hears of that, too, and of the end.
    """

    def __init__(self, *, as_json: bool, manager: ServiceManager = NOBODY) -> None:
        self._json = as_json
        self._formatter = formatter(as_json=as_json)
        self._manager = manager
        self._serving = False
        self._bars: dict[str, Any] = {}
        self._told_s: dict[str, float] = {}

    def tell(self, news: News) -> None:
        """Shows one piece of news of the supervisor."""
        match news:
            case Loading(worker, fraction):
                self._bar(worker).update(fraction * 100 - self._bar(worker).n)
                if self._bar(worker).disable:
                    self._loading_line(news)
            case Ready(worker):
                self._drop_bar(worker)
                self.say(line_of(news))
            case Died():
                self.close()
                self.say(line_of(news), logging.WARNING)
            case Said():
                self.say(line_of(news))

    def serving(self, groups: Sequence[LocalGroup]) -> None:
        """Says what is about to be served, and by which groups if there are several."""
        model_id = groups[0].model.model_id
        if len(groups) == 1:
            remark = groups[0].model.remark
            self.say(f"serving {model_id}" + (f" ({remark})" if remark else ""))
            return
        self.say(f"serving {model_id} by {len(groups)} groups")
        for group in groups:
            self.say(f"serving {model_id}: group {group.name}: {_made_of(group)}")

    def starting(self, group: LocalGroup) -> None:
        """Says that a group is started beside those that serve, or in their place."""
        self.say(f"starting group {group.name}: {_made_of(group)}")

    def ended(self, group: LocalGroup) -> None:
        """Says that the workers of a group have been ended for good, and shows no more of them."""
        self.close()
        self.say(f"group {group.name}: its workers have been ended")

    def say(self, text: str, level: int = logging.INFO) -> None:
        """One line on standard error."""
        if self._serving:
            logging.getLogger("roundhouse").log(level, text)
            return
        if self._json:
            record = logging.LogRecord("roundhouse", level, "", 0, text, None, None)
            text = self._formatter.format(record)
        with suppress(OSError):  # a full disk, or a reader that has gone, must not end the server
            tqdm.write(text, file=sys.stderr)

    def ready(
        self, urls: Urls, model_id: str, api_key: str | None, *, certificate: bool = False
    ) -> None:
        """The ready line, on standard output: one line for programs, some more for people.

        ``certificate`` says that clients must show one, as ``api_key`` does of a key.
        """
        self._serving = True
        self._manager.ready(f"serving {model_id} at {urls.rest}" if model_id else urls.rest)
        if self._json:
            line = {"event": "ready", "rest": urls.rest, "grpc": urls.grpc, "model": model_id}
            _print(json.dumps(line))
            return
        token = " -H 'Authorization: Bearer YOUR_KEY'" if api_key else ""
        token += " --cert YOUR_CERTIFICATE --key ITS_KEY" if certificate else ""
        grpc = f"  gRPC  {urls.grpc}\n" if urls.grpc else ""
        _print(
            f"\nRoundhouse is ready{model_id and ': '}{model_id}\n"
            f"  REST  {urls.rest}   (all routes: {urls.rest}/docs)\n"
            f"{grpc}\n"
            f"  curl -N {urls.rest}/v1/chat/completions -H 'Content-Type: application/json'{token} "
            f"\\\n    -d '{json.dumps(EXAMPLE)}'\n"
        )

    def stopping(self) -> None:
        """Tells the service manager that the server ends; people read it in the log."""
        self._manager.stopping()

    def close(self) -> None:
        """Takes half-drawn bars off the screen."""
        for worker in list(self._bars):
            self._drop_bar(worker)

    def _loading_line(self, news: Loading) -> None:
        """How far it is; nothing of one that is soon ready."""
        now_s = monotonic()
        if now_s - self._told_s.setdefault(news.worker, now_s) >= LOADING_LINE_S:
            self._told_s[news.worker] = now_s
            self.say(line_of(news))

    def _bar(self, worker: str) -> Any:
        """The bar of a worker; draws nothing where there is no terminal."""
        if worker not in self._bars:
            self._bars[worker] = tqdm(
                total=100,
                desc=f"{worker}: loading",
                bar_format="{desc} {percentage:3.0f}% {bar} {elapsed}",
                file=sys.stderr,
                leave=False,
                disable=self._json or not sys.stderr.isatty(),
            )
        return self._bars[worker]

    def _drop_bar(self, worker: str) -> None:
        """Removes the bar of a worker, if it has one."""
        self._told_s.pop(worker, None)
        bar = self._bars.pop(worker, None)
        if bar is not None:
            bar.close()


def line_of(news: News) -> str:
    """A piece of news as one line."""
    match news:
        case Loading(worker, fraction):
            return f"{worker}: loading, {fraction:.0%}"
        case Ready(worker, seconds, again):
            back = "is back after a restart, loaded" if again else "loaded"
            return f"{worker}: {back} in {seconds:.1f} s"
        case Died(worker, reason, deaths, pause_s, ranks):
            loop = f" (death {deaths} in a row)" if deaths >= LOOP_DEATHS else ""
            what = "it" if ranks == 1 else f"all {ranks} ranks of its group"
            return f"{worker}: {reason}{loop}; starting {what} again in {pause_s:g} s"
        case Said(worker, line):
            return f"{worker}: {line}"


def _made_of(group: LocalGroup) -> str:
    """What a group consists of, in some words."""
    made = f"{group.workers.world} x {group.workers.engine}"
    return ", ".join(filter(None, (made, group.model.remark)))


def _print(text: str) -> None:
    """Prints on standard output. If that fails nothing more is written there, not even at exit."""
    try:
        print(text, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
