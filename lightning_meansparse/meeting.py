"""Where the processes of one job wait for each other, and hear when one of them has failed.

A collective alone does neither well: who waits in it hears nothing, handles no signal, and gives up
after a timeout that a slow rank may well exceed, or only then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

_FAILED, _HEARD = "failed", "heard"
_GONE = "the first process has ended without a word"
_FOREVER = timedelta(days=365)
_START = timedelta(minutes=10)  # for a process that is still reading its data
_LISTEN_EVERY = 1.0  # seconds; what others hear a second later they hear soon enough
_SPEAK_FOR = 3.0  # seconds; the process that told may take the store with it when it ends


class PeerError(ConnectionError):
    """Another process of the job has failed, so this one cannot go on either."""


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Say of talk among processes that breaks off what that means.

    Raises:
        PeerError: In place of what the backend says of its connections.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError("another process has ended or failed; its own output says why") from error


class Peers(Protocol):
    """The other processes of a job, to hear of and to wait for."""

    def listen(self) -> None:
        """Raise if one of them has failed; may be called often."""

    def meet(self) -> None:
        """Wait for all of them; raise if one has failed or ended."""


class Meeting:
    """The processes of the default process group; in one process alone nothing ever happens.

    Every process makes its own at the same point of the program. A dead process is noticed by
    those who wait, a failed one that has told so by all.

    Raises:
        PeerError: If a process does not get here.

    Examples:
        >>> with Meeting().telling() as meeting:
        ...     meeting.listen()  # now and then, during work that has no end in sight
        ...     meeting.meet()
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._heard = time.monotonic()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A group of its own: Gloo sees at once that a peer has died, whatever the backend of
            # the job, and may wait for as long as a slow one needs. Opening it would see nothing.
            try:
                if dist.get_backend() == "gloo":
                    _wait(dist.barrier(async_op=True), lambda: None, _START)
                group = dist.new_group(backend="gloo", timeout=_START)
            except RuntimeError as error:
                raise PeerError(
                    f"another process has ended, or has not begun within {_START.seconds:,} s; its "
                    "own output says why"
                ) from error
            assert isinstance(group, dist.ProcessGroup)  # with every process in it
            _set_timeout(_FOREVER, group)
            self._group, self._store = group, group.get_group_store()

    def meet(self) -> None:
        """Wait until all processes are here.

        Raises:
            PeerError: If one has failed or ended.
        """
        if self._group is None:
            return
        try:
            _wait(dist.barrier(self._group, async_op=True), self.listen, _FOREVER)
        except RuntimeError as error:
            self._raise_if_told()
            raise PeerError("another process has ended without a word") from error

    def listen(self) -> None:
        """See whether another process has failed; asks at most once a second.

        Raises:
            PeerError: If one has.
        """
        now = time.monotonic()
        if self._group is not None and now - self._heard >= _LISTEN_EVERY:
            self._heard = now
            self._raise_if_told()

    def tell(self, error: BaseException) -> str | None:
        """Let the others know that this process has failed; the first of several is heard.

        Returns:
            What another one has told before, or None. If `error` is a collective that broke off,
            this is why.
        """
        if self._group is None:
            return None
        text = f"process {dist.get_rank()} of {dist.get_world_size()} "
        if isinstance(error, PeerError):
            text = str(error)
        elif isinstance(error, Exception):
            text += f"has failed: {type(error).__name__}: {error}"
        else:
            text += "was told to stop"
        try:
            told: str = self._store.compare_set(_FAILED, "", text).decode()
            if told != text:
                self._store.add(_HEARD, 1)
                return told
            if isinstance(error, PeerError):
                return None
            silence = time.monotonic() + _SPEAK_FOR
            while self._store.add(_HEARD, 0) < dist.get_world_size() - 1:
                if time.monotonic() > silence:
                    break
                time.sleep(0.02)
        except RuntimeError:  # the store is gone, and with it who could hear
            return _GONE
        return None

    def close(self) -> None:
        """Take the group down; only after all have met."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @contextlib.contextmanager
    def telling(self) -> Iterator[Meeting]:
        """Tell the others of an exception inside the ``with`` block; else meet and close."""
        try:
            yield self
        except BaseException as error:
            self.tell(error)
            raise
        self.meet()
        self.close()

    def _raise_if_told(self) -> None:
        try:
            if not self._store.check([_FAILED]):
                return
            told = self._store.get(_FAILED).decode()
            self._store.add(_HEARD, 1)
        except RuntimeError as error:
            raise PeerError(_GONE) from error
        raise PeerError(told)


def _wait(arrived: dist.Work, listen: Callable[[], None], timeout: timedelta) -> None:
    """Wait for a barrier, in pieces between which signals are handled."""
    end, pause = time.monotonic() + timeout.total_seconds(), 0.001
    while not arrived.is_completed():
        listen()
        if time.monotonic() > end:
            raise RuntimeError("the barrier has timed out")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    arrived.wait()


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    public = getattr(dist, "set_timeout", None)  # new in torch 2.15
    (public or dist.distributed_c10d._set_pg_timeout)(timeout, group)
