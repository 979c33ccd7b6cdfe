"""A gateway: the REST faces in a process of their own, before a router elsewhere.

It holds what a router holds in front of its core: faces, service, tokenizers, a fleet and a driver.
The router tells it of the fleet and of the limits when it attaches; what the driver does is decided
there (``router/remote.py``). It attaches again and again, for as long as it runs.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from functools import partial
from random import Random
from time import monotonic
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from router.api.rest.app import create_app
from router.api.rest.tgi import version
from router.config import ConfigError, GroupSpec, Settings
from router.driver import Driver, monotonic_ms
from router.faces import RestFace, Signals, settle_memory, unless
from router.fleet import Fleet
from router.gateway_wire import card_from_wire, limits_from_wire, specs_from_wire, unknown_to
from router.identities import Identities
from router.link import Backoff, LinkDownError
from router.logs import configure
from router.metrics import Metrics
from router.open_files import allow_files
from router.remote import RemoteCore, Uplink
from router.remote_link import RefusedError, RouterLink
from router.service import Service
from router.text.tokenizer import Tokenizer
from router.together import all_of
from router.tracing import tracing_of
from router.v1 import gateway_pb2 as pb

log = logging.getLogger(__name__)

PROVEN_S = 5.0
"""An attachment that lasted so long lets the next attempt come without a long pause."""


class Front:
    """The ASGI application, which a router with other limits replaces."""

    def __init__(self) -> None:
        self.app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request by the present application."""
        await self.app(scope, receive, send)


class Gateway(Collector):
    """A running gateway without its network face; an async context manager.

    While inside, the failure of any of its tasks cancels the body; leaving then raises that
    failure. One is ``ConfigError``: the router is there, but will never take this gateway. So is
    what making one raises, if the certificates cannot work.
    """

    def __init__(
        self,
        settings: Settings,
        router: str,
        router_key: str | None = None,
        *,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], int] = monotonic_ms,
    ) -> None:
        self.front = Front()
        self.metrics = Metrics(registry, schedules=False)
        self.metrics.registry.register(self)
        self.ready = asyncio.Event()
        self.identities = Identities.of(settings)
        self.tracing = tracing_of(settings, clock, schedules=False)
        self._router = router
        self._router_key = router_key
        self._core = RemoteCore()
        self.driver = Driver(self._core, self.metrics, settings.max_concurrent_requests, clock)
        self._core.owner = self.driver
        self._clock = clock
        self._tokenizers: dict[str, Tokenizer] = {}
        self._backoff = Backoff(Random())  # noqa: S311 - spreads attempts
        self._attached = self._closing = False
        self._withheld = frozenset[str]()
        self._cause = ""
        self._tasks = asyncio.TaskGroup()
        self._keeper: asyncio.Task[None] | None = None
        self._serve(settings)

    def own(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts a task whose failure ends the gateway."""
        return self._tasks.create_task(work, name=name)

    async def __aenter__(self) -> Self:
        """Starts the driver and begins to attach."""
        await self._tasks.__aenter__()
        self.own(self.driver.run(), "driver")
        self._keeper = self.own(self._keep_attached(), "router")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes what is open, ends all tasks and waits for them."""
        self.driver.stop()
        if self._keeper is not None:
            self._keeper.cancel()
        try:
            await self._tasks.__aexit__(kind, error, trace)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first; it has cancelled the others
        finally:
            await self.tracing.close()

    def collect(self) -> Iterable[Metric]:
        """Yields the gauge that says whether there is a stream to the router."""
        yield GaugeMetricFamily(
            "roundhouse_gateway_attached", "Whether the router is connected", value=self._attached
        )

    # --- what the router says

    def _serve(self, settings: Settings) -> None:
        """Makes fleet, service and application for these limits."""
        self._settings = settings
        self.fleet = Fleet(settings, ())
        self.driver.requests_max = settings.max_concurrent_requests
        self.service = Service(self.fleet, self.driver, settings)
        self.front.app = create_app(self.service, self.fleet, self.metrics, settings, self.tracing)

    def _welcome(self, welcome: pb.Welcome) -> None:
        try:
            settings = limits_from_wire(welcome.limits, self._settings)
        except ConfigError as error:
            raise LinkDownError(f"router {self._router}: unusable limits: {error}") from None
        withheld = unknown_to(welcome.limits)
        if withheld - self._withheld:
            text = "router %s is older than this gateway, so there is no %s here: update it first"
            log.warning(text, self._router, ", ".join(sorted(withheld)))
        self._withheld = withheld
        if settings != self._settings:
            self._serve(settings)

    async def _adopt(self, link: RouterLink, fleet: pb.Fleet) -> None:
        """Makes the fleet what the router says that it is, all at once.

        What that takes is fetched before: a model whose groups have all changed stays known.
        """
        cards = [
            card_from_wire(group.name, group.card, self._withheld)
            for group in fleet.groups
            if group.HasField("card")
        ]
        tokenizers = [await self._tokenizer(link, card.tokenizer_sha256) for card in cards]
        self._list(specs_from_wire(fleet), {card.name for card in cards})
        for card, tokenizer in zip(cards, tokenizers, strict=True):
            embed, prepare = partial(link.embed, card.name), partial(link.prepare, card.name)
            self.fleet.up(card, tokenizer, embed, prepare)
            if not card.ready or self._closing:
                self.fleet.down(card.name)
        self.fleet.expect(fleet.expecting and not self._closing)
        if self.fleet.healthy:
            self.ready.set()

    def _list(self, specs: tuple[GroupSpec, ...], carded: Collection[str]) -> None:
        """Puts the groups in the router's order, and forgets what those without a card once said.

        A group without one may have the name of another that has gone.
        """
        for spec, _ in self.fleet.groups():
            if spec not in specs or spec.name not in carded:
                self.fleet.forget(spec.name)
        for spec in specs:
            self.fleet.add(spec)

    async def _tokenizer(self, link: RouterLink, sha256: str) -> Tokenizer:
        known = self._tokenizers.get(sha256)
        if known is None:
            files = await link.tokenizer_files(sha256)
            try:
                known = await asyncio.to_thread(Tokenizer.from_files, files)
            except Exception as error:  # noqa: BLE001 - a file from elsewhere must not end this
                cause = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise LinkDownError(f"unusable tokenizer files: {cause}") from None
            self._tokenizers[sha256] = known
        return known

    def _all_down(self) -> None:
        """Nobody can be reached any more; what the groups said of themselves stays known."""
        self.fleet.expect(False)
        for name, up in self.fleet.groups_up().items():
            if up:
                self.fleet.down(name)

    # --- the stream

    async def _keep_attached(self) -> None:
        """Attaches again and again, until cancelled."""
        while True:
            cause = ""
            try:
                await self._attach()
            except RefusedError as error:
                if not self.ready.is_set():
                    raise ConfigError([str(error)]) from None
                cause = str(error)
            except LinkDownError as error:
                cause = str(error)
            if cause != self._cause:
                log.warning("not attached: %s", cause)
            self._cause = cause  # however often it prevents the next attempt, it is logged once
            await asyncio.sleep(self._backoff.pause_s())

    async def _attach(self) -> None:
        """Attaches to the router and stays so. Ends in ``LinkDownError``."""
        link = RouterLink(self._router, self._router_key, self.identities.cluster)
        try:
            welcome = await link.attach(version())
            self._closing = False
            self._welcome(welcome)
            await self._adopt(link, welcome.fleet)
            uplink, began_s = self._core.attached(), monotonic()
            log.info("attached to the router %s", self._router)
            self._attached, self._cause = True, ""
            try:
                await self._live(link, uplink)
            finally:
                self._attached = False
                self._core.detached()
                if monotonic() - began_s > PROVEN_S:
                    self._backoff.reset()
        finally:
            self._all_down()
            await link.close()

    async def _live(self, link: RouterLink, uplink: Uplink) -> None:
        """Writes and reads until the stream ends."""
        news = asyncio.Queue[pb.Fleet](maxsize=1)
        work = (
            link.write_from(uplink),
            self._adopt_all(link, news),
            self._read_all(link, news),
        )
        await all_of(work)

    async def _adopt_all(self, link: RouterLink, news: asyncio.Queue[pb.Fleet]) -> None:
        """Fetching a tokenizer takes its time; tokens do not wait for that."""
        while True:
            await self._adopt(link, await news.get())

    async def _read_all(self, link: RouterLink, news: asyncio.Queue[pb.Fleet]) -> None:
        while True:
            message = await link.read()
            match message.WhichOneof("message"):
                case "delivery":
                    self._core.deliver(message.delivery, self._clock())
                case "fleet":
                    if news.full():
                        news.get_nowait()  # what it said is not so any more
                    news.put_nowait(message.fleet)
                case "closing":
                    self._core.closing()
                    self._closing = True
                    self._all_down()


async def serve(
    settings: Settings,
    router: str,
    router_key: str | None,
    listeners: Sequence[socket.socket],
    on_ready: Callable[[int], None],
    on_stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serves REST before the router until a signal to end has been obeyed, as a router does.

    ``on_ready`` gets the port of the first listener once the gateway is attached and some group is
    up, ``on_stopping`` is called once the intake stops. Raises ``ConfigError`` if the router will
    never take this gateway.
    """
    configure(settings)
    allow_files(settings.max_concurrent_requests)
    with Signals() as signals:
        async with Gateway(settings, router, router_key) as gateway:
            face = RestFace(gateway.front, *listeners, identity=gateway.identities.clients)
            rest = gateway.own(face.run(), "rest")
            try:
                if await unless(signals.first, _wait(gateway.ready)):
                    settle_memory()
                    on_ready(face.port)
                    await signals.first.wait()
                log.info("shutting down; %d requests are open", gateway.driver.open_requests)
                face.stop_intake()
                on_stopping()
                limit_s = settings.graceful_termination_timeout_s
                if not await unless(signals.second, gateway.driver.drain(limit_s)):
                    log.warning("told again; closing %d requests", gateway.driver.open_requests)
            finally:
                gateway.driver.stop()  # closes what is still open, so that the face can say so
                face.close()
                await rest


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
