"""Puts the router together: settings and workers in, a running service and its faces out.

Every task has an owner here, and the death of any of them ends the whole: a router that cannot
schedule, or cannot talk to its workers because of a fault of its own, must not look alive.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry

from router.api.gateway_server import Gateways
from router.config import GroupSpec, Settings, check_groups
from router.core.scheduler import Core
from router.core.state import CoreConfig
from router.driver import Driver, monotonic_ms
from router.faces import Faces, Signals, settle_memory, unless
from router.fleet import Fleet, ModelCard
from router.groups import Groups
from router.identities import Identities
from router.logs import configure
from router.metrics import Metrics
from router.open_files import allow_files
from router.service import Service
from router.tracing import tracing_of

log = logging.getLogger(__name__)


def core_config(settings: Settings) -> CoreConfig:
    """The settings that concern the core, in its units."""
    return CoreConfig(
        requests_max=settings.max_concurrent_requests,
        step_tokens_max=settings.max_batch_prefill_tokens,
        kv_tokens_max=settings.max_batch_total_tokens,
        sequences_max=settings.max_batch_size,
        plans_in_flight_max=settings.plans_in_flight_max,
        step_deadline_ms=math.ceil(settings.step_deadline_s * 1000),
        attempts_max=settings.attempts_max,
        resume_streams=settings.resume_streams,
        resume_timeout_ms=math.ceil(settings.resume_timeout_s * 1000),
    )


def shortened(settings: Settings, model: ModelCard) -> str:
    """One line if a model's longest request is shorter than the settings say, "" if it is not."""
    pairs = (
        ("max_input_tokens", settings.max_input_tokens, model.max_input_tokens),
        ("max_total_tokens", settings.max_total_tokens, model.max_total_tokens),
    )
    less = [f"{name} is {held}, not {asked}" for name, asked, held in pairs if (asked or 0) > held]
    return f"{', '.join(less)}: that is what {model.id} and its workers hold" if less else ""


class Router:
    """A running router without its network faces; an async context manager.

    ``silent`` is called with the name of a group whose workers hang. Raises ``ConfigError`` if the
    groups, or the certificates, cannot work. While inside, the failure of any task of the router
    cancels the body; leaving then raises that failure.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Iterable[GroupSpec],
        *,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], int] = monotonic_ms,
        silent: Callable[[str], None] = lambda _: None,
    ) -> None:
        specs = check_groups(groups)
        core = Core(core_config(settings))
        self.settings = settings
        self.identities = Identities.of(settings)
        self.tracing = tracing_of(settings, clock)
        self.metrics = Metrics(registry)
        self.driver = Driver(core, self.metrics, settings.max_concurrent_requests, clock)
        self.fleet = Fleet(settings, specs)
        self.service = Service(self.fleet, self.driver, settings)
        self.gateways = Gateways(self.driver, self.fleet, settings, self.tracing)
        self.metrics.watch(core.snapshot, self.fleet.groups_up, self.fleet.engines)
        self.metrics.registry.register(self.gateways)
        self.groups = Groups(
            specs,
            driver=self.driver,
            fleet=self.fleet,
            metrics=self.metrics,
            settings=settings,
            snapshot=core.snapshot,
            own=self.own,
            silent=silent,
            cluster=self.identities.cluster,
        )
        self._tasks = asyncio.TaskGroup()
        self._watching = ExitStack()
        self._shortened: set[str] = set()

    def own(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts a task whose failure ends the router."""
        return self._tasks.create_task(work, name=name)

    def _tell_of_groups(self) -> None:
        self.tracing.groups_changed(self.fleet.groups_up())

    def _tell_of_lengths(self) -> None:
        """Warns once of a model whose requests can be less long than was asked for."""
        lines = {shortened(self.settings, model) for model in self.fleet.models()} - {""}
        for line in sorted(lines - self._shortened):
            log.warning("%s", line)
        self._shortened = lines

    async def __aenter__(self) -> Self:
        """Starts the driver and begins to connect the groups."""
        await self._tasks.__aenter__()
        self.own(self.driver.run(), "driver")
        self._watching.enter_context(self.fleet.watched(self._tell_of_lengths))
        if self.tracing.on:
            self._watching.enter_context(self.fleet.watched(self._tell_of_groups))
        self.groups.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes what is open, ends all tasks and waits for them."""
        self.driver.stop()
        self.groups.cancel()
        try:
            await self._tasks.__aexit__(kind, error, trace)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first; it has cancelled the others
        finally:
            self._watching.close()
            await self.tracing.close()


MakeChanges = Callable[[Router, int], AbstractAsyncContextManager[Callable[[], None]]]
"""Who may change the groups of a router, which serves REST on this port.

What entering it returns is called when the intake stops: no change begins from then on.
"""


def _no_changes(_router: Router, _port: int) -> AbstractAsyncContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


async def serve(
    settings: Settings,
    groups: Iterable[GroupSpec],
    on_ready: Callable[[int, int], None],
    *,
    open_when_ready: bool = False,
    silent: Callable[[str], None] = lambda _: None,
    changes: MakeChanges = _no_changes,
    on_stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serves REST and gRPC until a signal to end, see ``Signals``, has been obeyed.

    With ``open_when_ready`` its ports are closed until a first group is up, as TGI's are, whose
    clients try again when a connection is refused; if none can be, it ends. Without it, requests
    get a 503 until then: workers elsewhere may be exchanged for others.

    The first signal stops the intake and lets running answers end, for at most
    ``graceful_termination_timeout_s``; a second one closes them at once. ``on_ready`` gets the
    ports of REST and gRPC once both listen and a first group is up, ``silent`` the name of a group
    whose workers hang. ``changes`` is entered with the router and the port of REST before that, and
    left when the running answers have ended: some may wait for a group that is on its way.
    ``on_stopping`` is called once the intake stops. Raises
    ``OSError`` if a port cannot be had, ``ConfigError`` if the groups cannot work.
    """
    configure(settings)
    allow_files(settings.max_concurrent_requests)
    with Signals() as signals:
        async with Router(settings, groups, silent=silent) as router:
            if open_when_ready and not await unless(signals.first, router.groups.wait_first()):
                return
            faces = await Faces.start(
                router.service,
                router.fleet,
                router.metrics,
                settings,
                router.gateways,
                router.identities,
                tracing=router.tracing,
            )
            rest = router.own(faces.run(), "rest")
            try:
                if await unless(signals.first, router.fleet.wait_ready()):
                    settle_memory()
                    async with changes(router, faces.port) as take_no_more:
                        on_ready(faces.port, faces.grpc_port)
                        await signals.first.wait()
                        take_no_more()
                        on_stopping()
                        await _drain(router, faces, signals)
                else:
                    on_stopping()
                    await _drain(router, faces, signals)
            finally:
                router.driver.stop()  # closes what is still open, so that its faces can say so
                await faces.close()
                await rest


async def _drain(router: Router, faces: Faces, signals: Signals) -> None:
    """Stops the intake and waits for the running answers, as long as that may take."""
    log.info("shutting down; %d requests are open", router.driver.open_requests)
    faces.stop_intake()
    limit_s = router.settings.graceful_termination_timeout_s
    if not await unless(signals.second, router.driver.drain(limit_s)):
        log.warning("told again; closing %d requests", router.driver.open_requests)
