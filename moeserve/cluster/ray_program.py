"""Programs that live in detached actors: Ray starts them again when their process dies."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from moeserve.cluster.timing import END_DELAY_S, KILL_TIMEOUT_S, PROGRAM_RETRY_S
from moeserve.control.saved import StateUnreadable
from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.loops import LoopThread

log = logging.getLogger(__name__)


class Program(Protocol):
    """Something that is started and stopped in an event loop of its own."""

    async def start(self) -> None:
        """Returns when it is ready."""
        ...

    async def stop(self) -> None:
        """Stops in order; called once."""
        ...

    def describe(self) -> Any:
        """Its description, once it has started; from any thread."""
        ...


class _Runner:
    """Runs the program that `make` makes, in a thread with an event loop; its methods are called from other threads at once."""

    def __init__(self, make: Callable[[Callable[[str], None]], Program]) -> None:
        self._told: list[str] = []
        self._program = make(self._told.append)
        self._thread = LoopThread("program")
        self._thread.start()
        self._starting: asyncio.Task[None] | None = None
        self._started = self._thread.submit(self._start())

    def ready(self) -> Any:
        """The program's description, once it has started. Raises the error of its start."""
        self._started.result()
        return self._program.describe()

    def told(self, since: int) -> list[str]:
        """The log lines of its start, from the line `since` on."""
        return self._told[since:]

    def stop(self) -> None:
        """Stop the program, or give up starting it; returns when it has ended."""
        self._thread.call(self._stop())

    async def _start(self) -> None:
        self._starting = asyncio.create_task(self._program.start())
        try:
            await self._starting
        except StateUnreadable as error:
            log.error("it cannot start, and waits until it is replaced: %s", error)
            raise
        except Exception:
            if ray.get_runtime_context().was_current_actor_reconstructed:
                # No caller waits for the error of this start, as one did for the first incarnation.
                log.exception("it did not start again; Ray tries again")
                await asyncio.sleep(PROGRAM_RETRY_S)
                os._exit(1)
            raise

    async def _stop(self) -> None:
        starting = self._starting
        if starting is not None and not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
        elif starting is not None and not starting.cancelled() and starting.exception() is None:
            await self._program.stop()  # one that failed to start has stopped what it had started


# Ray names the process after the class.
@ray.remote
class MoEController(_Runner):
    """The controller's process."""


@ray.remote
class MoEFrontend(_Runner):
    """A frontend's process."""


KINDS: dict[str, Any] = {"controller": MoEController, "frontend": MoEFrontend}


def start_program(
    kind: str, name: str, namespace: str, make: Callable[[Callable[[str], None]], Program], where: dict[str, Any]
) -> ProgramActor:
    """Start a program in a detached actor of this name; Ray restarts it whenever it dies. `where` are options of the actor.

    Raises ExpertUnavailable when another is there by now.
    """
    actor = KINDS[kind].options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=8,
        num_cpus=0,
        **where,
    )
    try:
        return ProgramActor(name, actor.remote(make))
    except ValueError:  # as for a name that is taken
        if ProgramActor.find(name, namespace) is None:
            raise
        raise ExpertUnavailable(f"another {name} has been started in namespace {namespace} at the same moment") from None


class ProgramActor:
    """A handle on the actor of a program."""

    def __init__(self, name: str, actor: ActorHandle[Any]) -> None:
        self.name = name
        self._actor = actor

    @classmethod
    def find(cls, name: str, namespace: str) -> ProgramActor | None:
        """The actor of this name; None = there is none."""
        try:
            return cls(name, ray.get_actor(name, namespace=namespace))
        except ValueError:
            return None

    @classmethod
    def find_all(cls, namespace: str) -> list[ProgramActor]:
        """All actors with a name in the namespace."""
        names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["namespace"] == namespace]
        return [found for name in sorted(names) if (found := cls.find(name, namespace)) is not None]

    async def ready(self, tell: Callable[[str], None] = lambda _: None) -> Any:
        """The program's description, once it has started; `tell` gets the log lines of its start. Raises the error of its start."""
        heard, ready = 0, asyncio.ensure_future(self._call("ready"))
        while True:
            done, _ = await asyncio.wait({ready}, timeout=PROGRAM_RETRY_S)
            for line in await self._call("told", heard):
                heard += 1
                tell(line)
            if done:
                return ready.result()

    async def _call(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                return await getattr(self._actor, method).remote(*arguments)
            except ActorUnavailableError:
                await asyncio.sleep(PROGRAM_RETRY_S)
            except RayActorError as error:
                raise ExpertUnavailable(f"{self.name} is gone for good: {str(error).splitlines()[0]}") from None
            except RayTaskError as error:
                raise self._failure(error.cause) from None

    def _failure(self, cause: Exception) -> MoEServeError:
        if isinstance(cause, MoEServeError):
            return cause
        return ExpertUnavailable(f"{self.name} failed: {type(cause).__name__}: {cause}")

    async def stop(self, timeout_s: float) -> None:
        """Ask the program to stop, and end its process for good, after `timeout_s` in any case."""
        try:
            await asyncio.wait_for(self._call("stop"), timeout_s)
        except (TimeoutError, MoEServeError) as error:
            log.info("%s did not stop in order: %r", self.name, error)
        finally:
            self.kill()

    def kill(self) -> None:
        """End its process for good, at once."""
        ray.kill(self._actor, no_restart=True)


def end_this_process() -> None:
    """End the actor that this runs in, for good."""
    actor = ray.get_runtime_context().current_actor
    threading.Timer(END_DELAY_S, lambda: ray.kill(actor, no_restart=True)).start()
    threading.Timer(KILL_TIMEOUT_S, lambda: os._exit(1)).start()
