"""The side of a pool that has the work: gives chunks to workers, replaces those that die, and keeps time."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from ...errors import CacheError, CapacitorError, InputError
from ...extras import require_extra
from ..failures import CRASHED, TIMEOUT
from ..sources import Streaming
from .helper import Helper
from .orders import Order, Result, Seat
from .ring import Allocator, SharedMemory, Span, pin, unpin
from .server import BROKEN, DIED, FORK, KILL, MESSAGE_BYTES, READY, Done, Failure, Setup, Task
from .work import Job, Meter, chunk_schema, to_batch

if TYPE_CHECKING:
    import torch

# workers that die at an image before it is blamed: the first may have been killed by something else
_DEATHS = 3
# of workers or helpers in a row, with nothing decoded between and no image to blame
_MOST_DEATHS = 8
_TICK_SECONDS = 0.25
_READABLE = select.POLLIN | select.POLLPRI


class Coordinator:
    """Starts helper and workers, and a thread that looks after them.

    Attributes:
        ready: chunks that are decoded and have not been waited for yet.

    Raises:
        CacheError: no shared memory; the source cannot be sent to the workers.
    """

    def __init__(self, job: Job, workers: int, ring_bytes: int, image_timeout: float, helper: Helper | None = None):
        require_extra("pyarrow")
        self._job, self._image_timeout = job, image_timeout
        is_streaming = isinstance(job.source, Streaming) and job.source.is_streaming
        self._containers = job.source.listing.containers if is_streaming else None
        self._schema = chunk_schema()
        self._memory = SharedMemory(workers, ring_bytes)
        self._allocator = Allocator(ring_bytes)
        self._setup = Setup(job, workers, ring_bytes)
        self._pinned = False
        self._seats = [Seat() for _ in range(workers)]
        self._queue: deque[Order] = deque()
        self._count = self.ready = 0
        self._deaths_in_vain = 0
        self._error: CapacitorError | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._is_ready = False
        # of the descriptors that the thread listens to; None when they have changed
        self._poll: select.poll | None = None
        self._helper = self._set_up(helper or Helper())
        self._thread = threading.Thread(target=self._run, name="decode-pool", daemon=True)
        self._thread.start()

    def place(self, ordinals: Sequence[int], views: tuple[int, ...] = (0,)) -> Order | None:
        """Order a chunk; None while the ring has no room.

        Raises:
            InputError: it never will.
        """
        nbytes = len(ordinals) * self._job.room(views)
        if nbytes > self._allocator.nbytes:
            raise InputError(
                f"{len(ordinals)} inputs do not fit into a ring of {self._allocator.nbytes} bytes: use shorter ranges"
            )
        with self._changed:
            span = self._allocator.take(nbytes) if nbytes else Span(0, 0)
            if span is None:
                return None
            self._count += 1
            order = Order(self._count, ordinals, span, views=views)
            if len(ordinals):
                if self._containers is not None:
                    order.container = int(self._containers[ordinals[0]])
                self._queue.append(order)
                # otherwise the next worker that is free takes it, and the thread need not be woken
                is_awaited = any(seat.takes(order) for seat in self._seats)
            else:
                is_awaited = False
                order.result = Result(to_batch([]), self._memory.ring[:0], np.empty(0, np.int64), Meter())
                self.ready += 1
        if is_awaited:
            self._wake()
        return order

    def wait(self, order: Order) -> tuple[Result, float]:
        """The chunk, and the seconds that it was waited for.

        Raises:
            CacheError: it will never come.
        """
        begin = time.perf_counter()
        with self._changed:
            while order.result is None:
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            self.ready -= 1
            return order.result, time.perf_counter() - begin

    def release(self, order: Order) -> None:
        """Its pixels are no longer needed."""
        with self._changed:
            self._allocator.give(order.span)
            order.span = Span(0, 0)

    def abandon(self, order: Order) -> None:
        """Drop a chunk that will not be waited for."""
        with self._changed:
            order.is_abandoned = True
            self.ready -= order.result is not None
            if order in self._queue:
                self._queue.remove(order)
            elif order.result is None and any(order in seat.orders for seat in self._seats):
                # its worker still writes there
                return
        self.release(order)

    def pin(self, device: torch.device) -> None:
        """Page-lock the ring, so that a GPU reads it directly."""
        self._pinned = self._pinned or pin(self._memory.ring, device)

    def leave_pinned(self) -> None:
        """Do not undo `pin` at the end."""
        self._pinned = False

    def close(self) -> None:
        """End helper and workers."""
        self._closing = True
        self._wake()
        self._thread.join()
        self._helper.end()
        for seat in self._seats:
            if seat.connection is not None:
                seat.connection.close()
        if self._pinned:
            unpin(self._memory.ring)
        self._memory.close()
        os.close(self._woken)
        os.close(self._waker)

    def _set_up(self, helper: Helper) -> Helper:
        self._is_ready = False
        self._poll = None
        try:
            helper.set_up(self._setup, self._memory.fd)
        except CacheError:
            helper.end()
            raise
        return helper

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):
            os.write(self._waker, b"\0")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._hand_out()
                ready = self._listen()
                if self._woken in ready:
                    os.read(self._woken, 4096)
                for seat in self._seats:
                    if seat.connection is not None and seat.connection.fileno() in ready:
                        self._receive(seat)
                if self._helper.control.fileno() in ready:
                    self._hear()
                self._look_at_the_clock()
        except CapacitorError as e:
            self._fail(e)
        except BaseException as e:
            self._fail(CacheError(f"decoding stopped: {type(e).__name__}: {e}"))

    def _listen(self) -> set[int]:
        """Descriptors that have something to be read, or are closed at the other end; none if that takes too long."""
        if self._poll is None:
            connections = [seat.connection.fileno() for seat in self._seats if seat.connection is not None]
            self._poll = select.poll()
            for descriptor in (self._woken, self._helper.control.fileno(), *connections):
                self._poll.register(descriptor, _READABLE)
        return {descriptor for descriptor, _ in self._poll.poll(1e3 * _TICK_SECONDS)}

    def _fail(self, error: CapacitorError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _hand_out(self) -> None:
        with self._changed:
            while self._queue:
                free = [s for s in self._seats if s.takes(self._queue[0])]
                if not free:
                    return
                seat = min(free, key=lambda s: len(s.orders))
                order = self._next_for(seat)
                self._move_down(order)
                seat.orders.append(order)
                span, careful = order.span, order.is_suspect
                task = Task(order.number, order.ordinals, span.begin, span.end, order.failed, careful, order.views)
                # that a worker is dead is noticed when its connection is read
                with suppress(OSError):
                    assert seat.connection is not None
                    seat.connection.send_bytes(pickle.dumps(task))

    def _next_for(self, seat: Seat) -> Order:
        """Take a chunk out of the queue: the first, but of containers that are streamed one that the worker is at, or
        else one that no other is at.
        """
        chosen = 0
        if self._containers is not None and not self._queue[0].is_suspect:
            others = {other.container for other in self._seats if other is not seat}
            fresh = None
            for at, order in enumerate(self._queue):
                if order.is_suspect:
                    continue
                if order.container == seat.container:
                    chosen, fresh = at, None
                    break
                if fresh is None and order.container not in others:
                    fresh = at
            chosen = chosen if fresh is None else fresh
        order = self._queue[chosen]
        del self._queue[chosen]
        seat.container = order.container
        return order

    def _move_down(self, order: Order) -> None:
        """Give a chunk that is about to be decoded a lower place: one that is free, or that of the chunk ordered last.

        So where decoding is what the others wait for, a few places take turns, and the rest of the ring, though it is
        spoken for, is never touched.
        """
        nbytes = order.span.end - order.span.begin
        self._allocator.give(order.span)
        order.span = self._allocator.take(nbytes) or order.span
        last = self._queue[-1] if self._queue else order
        if last.span.end - last.span.begin == nbytes and last.span.begin < order.span.begin:
            order.span, last.span = last.span, order.span

    def _receive(self, seat: Seat) -> None:
        """Take one message; a worker that is gone loses its connection."""
        assert seat.connection is not None
        try:
            message = pickle.loads(seat.connection.recv_bytes())
        except (EOFError, OSError):
            seat.connection.close()
            seat.connection = self._poll = None
            return
        if isinstance(message, Failure):
            if isinstance(message.error, CapacitorError):
                raise message.error
            trace = message.text.strip().splitlines()
            raise CacheError(f"a decoding worker failed: {trace[-1]}", trace)
        done: Done = message
        columns = require_extra("pyarrow").ipc.read_record_batch(
            require_extra("pyarrow").py_buffer(done.rows), self._schema
        )
        with self._changed:
            order = next(o for o in seat.orders if o.number == done.number)
            seat.orders.remove(order)
            self._deaths_in_vain = 0
            pixels = self._memory.ring[order.span.begin : order.span.end]
            order.result = Result(columns, pixels, np.frombuffer(done.offsets, np.int64), done.meter)
            self.ready += not order.is_abandoned
            self._changed.notify_all()
        if order.is_abandoned:
            self.release(order)

    def _hear(self) -> None:
        """A message of the helper."""
        try:
            message = self._helper.control.recv(MESSAGE_BYTES)
        except OSError:
            message = b""
        if not message:
            self._replace_helper()
            return
        word, number, detail = pickle.loads(message)
        if word == BROKEN:
            trace = detail.strip().splitlines()
            raise CacheError(f"decoding workers cannot be started: {trace[-1]}", trace)
        if word == READY:
            self._is_ready = True
            for i in range(len(self._seats)):
                self._fork(i)
        elif word == DIED:
            self._bury(number, detail)
            self._fork(number)

    def _fork(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        self._memory.inputs[number], self._memory.since[number] = -1, 0.0
        self._memory.of_pixels[number] = self._memory.of_files[number] = 0
        try:
            socket.send_fds(self._helper.control, [pickle.dumps((FORK, number))], [theirs.fileno()])
            self._seats[number].connection = Connection(ours.detach())
            self._poll = None
        except OSError:
            # the helper is gone: it will be replaced, and then there will be workers
            ours.close()
        finally:
            theirs.close()

    def _bury(self, number: int, code: int) -> None:
        """Order anew what a dead worker has left, without the image that it died of."""
        seat = self._seats[number]
        while seat.connection is not None:
            # what it had sent before
            self._receive(seat)
        ordinal = int(self._memory.inputs[number])
        blamed = next((o for o in seat.orders if ordinal in o.ordinals), None)
        if not self._is_ready:
            # it went with the helper
            pass
        elif blamed is None:
            self._count_in_vain(f"a worker {_ended(code)}")
            for order in seat.orders:
                order.is_doubted = True
        elif seat.late is not None and seat.late != ordinal:
            # it was done with the late one after all
            pass
        elif seat.late is not None:
            blamed.failed[ordinal] = (TIMEOUT, f"reading and decoding took longer than {self._image_timeout:g} s")
        else:
            blamed.deaths[ordinal] += 1
            if blamed.deaths[ordinal] >= _DEATHS:
                blamed.failed[ordinal] = (CRASHED, f"its decoding {_ended(code)}, {_DEATHS} times")
        with self._changed:
            left = [o for o in seat.orders if not o.is_abandoned]
            dropped = [o for o in seat.orders if o.is_abandoned]
            self._queue.extendleft(reversed(left))
            seat.orders, seat.late = [], None
        for order in dropped:
            self.release(order)

    def _replace_helper(self) -> None:
        """Start a new helper: the workers have died with the old one."""
        self._helper.end()
        self._is_ready = False
        self._count_in_vain(f"the helper {_ended(self._helper.returncode)}")
        for number in range(len(self._seats)):
            self._bury(number, -signal.SIGKILL)
        self._helper = self._set_up(Helper())

    def _count_in_vain(self, what: str) -> None:
        self._deaths_in_vain += 1
        if self._deaths_in_vain > _MOST_DEATHS + len(self._seats):
            raise CacheError(
                f"decoding workers end before they decode anything ({what}): is there enough memory? "
                "Use fewer workers, or a smaller --pixel-budget"
            )

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for number, seat in enumerate(self._seats):
            # a worker notes the time first: of an image that is begun meanwhile this may be that of the next one
            ordinal = int(self._memory.inputs[number])
            since = float(self._memory.since[number])
            if ordinal >= 0 and since > 0 and seat.late is None and now - since > self._image_timeout:
                seat.late = ordinal
                with suppress(OSError):
                    self._helper.control.send(pickle.dumps((KILL, number)))


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
