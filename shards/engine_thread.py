"""The one thread that touches the engine, and what passes between it and the event loop.

The loop puts jobs on a queue; they run in order. Answers go back to the session that the job
belongs to, by one ``call_soon_threadsafe`` each. While a step runs, the next plan already waits on
the queue, so the engine does not wait for the loop between steps.

The next step may even be under way on the device before the last one is answered (``OpenSteps``);
whatever else is asked of the engine finds all steps finished.

A job that cannot be done is answered in its place in the order: whatever was asked before it is
answered first.
"""

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from queue import Full, SimpleQueue
from typing import TypeVar

from shards.embed_queue import BusyError, EmbedJob, EmbedQueue
from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineLost,
    FeatureError,
    Outcome,
    Plan,
    PlanError,
    Vectors,
)
from shards.grammar import FEATURE, Grammar, TokenizerError, grammar_for
from shards.open_steps import OpenSteps
from shards.wire import Digest

_T = TypeVar("_T")
# Plans that may be under way or waiting; the router keeps to its own, smaller number.
PLANS_MAX = 8
# Jobs that may wait: the plans of one session, and the begins and ends of many that gave up on a
# wedged engine. A session that would be one too many fails at once.
JOBS_MAX = 256


class Ending(Enum):
    """Why a session ends."""

    FINISHED = auto()
    BAD_LOG = auto()
    BAD_PLAN = auto()
    TAKEN_OVER = auto()
    LOST = auto()
    STOPPING = auto()


@dataclass(frozen=True, slots=True)
class Begun:
    """The engine is empty and waits for the session's first plan."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one plan; ``step_us`` is the time that the engine took, in microseconds."""

    epoch: int
    plan_id: int
    plan: Plan
    outcome: Outcome
    step_us: int


@dataclass(frozen=True, slots=True)
class Leaving:
    """The worker has been told to leave, and waits for the router to close the stream."""


@dataclass(frozen=True, slots=True)
class End:
    """The last thing that a session hears. ``message`` is one line."""

    why: Ending
    message: str


Said = Begun | Answer | Leaving | End


@dataclass(eq=False)
class Session:
    """One Run stream. The loop owns it; the engine thread reads and sets ``over`` only.

    ``epoch`` is that of its plans, 0 before the first. ``begun`` says that its client knows the
    engine to be empty, ``closed`` that nothing more will be written. ``digest`` is of all that was
    answered.
    """

    over: bool = False
    epoch: int = 0
    begun: bool = False
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    digest: Digest = field(default_factory=Digest)
    answers: deque[Said] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PLANS_MAX))

    def hear(self, said: Said) -> None:
        """Takes an answer in; called on the loop."""
        self.answers.append(said)
        self.wake.set()


@dataclass(frozen=True, slots=True)
class _Begin:
    session: Session


@dataclass(frozen=True, slots=True)
class _Step:
    session: Session
    epoch: int
    plan_id: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class _Done:
    """The device is done with a step that was open."""


@dataclass(frozen=True, slots=True)
class _Finish:
    session: Session
    end: End


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Job = _Begin | _Step | _Done | _Finish | _Stop | EmbedJob


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the engine said when it was ready."""

    info: EngineInfo
    files: dict[str, bytes]
    seconds: float
    grammar: Grammar | None = None


class EngineThread:
    """Makes the engine, runs its steps, closes it. A daemon: a wedged step cannot hold the exit.

    ``loaded`` ends with the engine's description or with the error that loading raised; ``lost``
    ends with one line when the engine cannot be trusted any more. ``embeds`` takes what is to be
    embedded between the steps.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        loop: asyncio.AbstractEventLoop,
        overrides: Callable[[], dict[str, bytes]] = dict,
    ) -> None:
        self._make = make
        self._overrides = overrides
        self._loop = loop
        self._jobs: SimpleQueue[_Job] = SimpleQueue()  # bounded by _put
        self._session: Session | None = None
        self._steps: OpenSteps[_Step] = OpenSteps(self._answer, self._wake)
        self._job_began: float | None = None
        self.embeds = EmbedQueue(self._enter)
        self.loaded: asyncio.Future[Loaded] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def busy_s(self) -> float:
        """How long the engine has been at one job, in seconds; 0 while it waits for one."""
        began = self._job_began
        return 0.0 if began is None else time.monotonic() - began

    def start(self) -> None:
        """Begins to load."""
        self._thread.start()

    def begin(self, session: Session) -> None:
        """Empties the engine; what follows belongs to this session."""
        self._put(_Begin(session))

    def step(self, session: Session, epoch: int, plan_id: int, plan: Plan) -> None:
        """Runs a plan once those before it are done."""
        self._put(_Step(session, epoch, plan_id, plan))

    def finish(self, session: Session, end: End) -> None:
        """Ends the session once all its plans are answered."""
        self._put(_Finish(session, end))

    def _put(self, job: _Job) -> None:
        """Raises ``Full``. A ``SimpleQueue`` wakes its reader with far fewer calls than others."""
        if self._jobs.qsize() >= JOBS_MAX:
            raise Full
        self._jobs.put(job)

    def _enter(self, job: EmbedJob) -> None:
        try:
            self._put(job)
        except Full:
            raise BusyError("the engine does not get on; try again later") from None

    def stop(self, timeout_s: float) -> bool:
        """Closes the engine after the step under way; says whether that was done in time.

        One that is still being made is not waited for: nothing says when it would be there.
        """
        if not self.loaded.done():
            return False
        with suppress(Full):  # the engine is wedged: it would not be read anyway
            self._put(_Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # On the engine thread -----------------------------------------------------------------------

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            overrides = self._overrides()
            engine = self._make()
            files = _replaced(engine.tokenizer_files(), overrides)
            info, grammar = guided(engine, files)
            loaded = Loaded(info, files, time.perf_counter() - began, grammar)
        except BaseException as error:  # noqa: BLE001 - handed to whoever awaits
            self._call(_settle_error, self.loaded, error)
            return
        self._call(_settle, self.loaded, loaded)
        try:
            self._serve(engine)
        finally:
            self._steps.close()
            engine.close()
            if grammar is not None:
                grammar.close()

    def _serve(self, engine: Engine) -> None:
        going = True
        while going:
            # A step that is under way on the device is a job, too.
            self._job_began = self._steps.began_s
            job = self._jobs.get()
            self._job_began = self._job_began or time.monotonic()
            try:
                going = self._do(engine, job)
            except EngineLost as error:
                going = self._lose(str(error))
            except Exception as error:  # noqa: BLE001 - a bug is the loss of the engine
                traceback.print_exc()
                going = self._lose(f"the engine failed: {type(error).__name__}: {error}")

    def _do(self, engine: Engine, job: _Job) -> bool:
        """Does one job; says whether there is to be a next one."""
        match job:
            case _Step():
                if not job.session.over:
                    self._step(engine, job)
            case _Done():
                self._steps.finish_done()
            case _:
                self._steps.finish_all()
                return self._do_alone(engine, job)
        return True

    def _do_alone(self, engine: Engine, job: _Begin | _Finish | _Stop | EmbedJob) -> bool:
        match job:
            case _Stop():
                return False
            case _Begin(session):
                engine.reset()
                self._session = session
                self._call(session.hear, Begun())
            case _Finish(session, end):
                self._end(session, end)
            case EmbedJob():
                self._embed(engine, job)
        return True

    def _wake(self) -> None:
        """Says that the device is done; on another thread. In a full queue others find that out."""
        with suppress(Full):
            self._put(_Done())

    def _step(self, engine: Engine, job: _Step) -> None:
        try:
            self._steps.start(engine, job, job.plan)
        except PlanError as error:
            self._end(job.session, End(Ending.BAD_PLAN, f"plan {job.plan_id}: {error}"))

    def _answer(self, job: _Step, outcome: Outcome, step_us: int) -> None:
        answer = Answer(job.epoch, job.plan_id, job.plan, outcome, step_us)
        self._call(job.session.hear, answer)

    def _embed(self, engine: Engine, job: EmbedJob) -> None:
        """Embeds a turn of a batch, if its call still waits.

        What is left of it then stands behind the plans that came meanwhile.
        """
        answer: Vectors | FeatureError | None = None
        try:
            while answer is None and not job.over:
                job.turns = job.turns or engine.embedding(job.inputs)
                answer = next(job.turns)
                if answer is None and self._again(job):
                    return
        except FeatureError as error:
            answer = error
        self._call(self.embeds.answered, job, answer)

    def _again(self, job: EmbedJob) -> bool:
        """Lets a job stand in the line once more, if there is a place."""
        try:
            self._put(job)
        except Full:
            return False
        return True

    def _end(self, session: Session, end: End) -> None:
        if not session.over:
            session.over = True
            self._call(session.hear, end)

    def _lose(self, message: str) -> bool:
        """Ends what there is, as nothing can be trusted any more. False: there is no next job."""
        if self._session is not None:
            self._end(self._session, End(Ending.LOST, message))
        self._call(self.embeds.lose, message)
        self._call(_settle, self.lost, message)
        return False

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Runs a function on the loop, unless that is closed already."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


def guided(engine: Engine, files: dict[str, bytes]) -> tuple[EngineInfo, Grammar | None]:
    """Gives an engine that follows constraints its compiler; says what the engine is then.

    It is made while the model is loaded, because it holds up everything else.
    """
    info = engine.describe()
    if FEATURE not in info.features:
        return info, None
    try:
        grammar = grammar_for(engine, files)
    except TokenizerError as error:
        features = tuple(feature for feature in info.features if feature != FEATURE)
        warning = f"constraints are not offered, because of the model's tokenizer: {error}"
        return replace(info, features=features, warnings=(*info.warnings, warning)), None
    engine.guide_with(grammar)
    return info, grammar


def _settle(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)


def _settle_error(future: asyncio.Future[_T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _replaced(files: dict[str, bytes], overrides: dict[str, bytes]) -> dict[str, bytes]:
    """A model's files with others in their place.

    A chat template is for all conversations: it takes the place of those with a name, too.
    """
    if "chat_template.jinja" in overrides:
        more = "additional_chat_templates/"
        files = {name: data for name, data in files.items() if not name.startswith(more)}
    return files | overrides
