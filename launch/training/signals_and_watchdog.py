"""Stop signals, their deadline, and a watchdog for ranks that hang."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from training.errors import FAILED, STOPPED
from training.rendezvous import rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
DEFAULT_GRACE_S = 30.0  # the default of torchrun, Slurm and Kubernetes
USABLE_GRACE_FRACTION = 0.9
ABORTED = 128 + signal.SIGINT
POLL_S = 0.5
HANG_REPORT_S = 3.0  # time for every live rank to report that it hangs too


class StopTraining(Exception):  # noqa: N818  # no error
    """A rank was asked to stop; raised on all ranks together."""


class Supervisor:
    """A thread that handles stop signals and hangs, even while the main thread is blocked.

    A stop signal sets :attr:`requested`, which the training loop polls. The thread ends the process

    * when ``grace`` is almost over, which abandons a save in flight;
    * at once after a second Ctrl-C;
    * when the main thread has not called :meth:`beat` for ``step_timeout`` seconds.

    Use it as a context manager; on exit it restores the signal handlers.

    Attributes:
        grace: seconds between a stop signal and the end of the process.
        step_timeout: maximum seconds between two calls of :meth:`beat`; 0 disables the check.
        requested: True once this rank has received a stop signal or learned of another rank's.
    """

    def __init__(self) -> None:
        self.grace = DEFAULT_GRACE_S
        self.step_timeout = 0.0
        self.requested = False
        self._deadline = math.inf
        self._interrupts = 0
        self._announced = False
        self._doing = "the start"
        self._is_watched = False
        self._idle_s = 0.0
        self._closed = False

    def __enter__(self) -> Supervisor:
        # Python runs signal handlers on the main thread, which may be blocked, but writes the
        # signal's number to this file descriptor at once.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._receiver.settimeout(POLL_S)
        fileno = self._sender.fileno()
        self._wakeup_before = signal.set_wakeup_fd(fileno, warn_on_full_buffer=False)
        # nohup ignores SIGHUP, and a shell ignores SIGINT for a command in the background.
        handled = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        self._handlers_before = {s: signal.signal(s, self._handle) for s in handled}
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._handlers_before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._closed = True
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def beat(self, doing: str) -> None:
        """Record progress of the main thread; ``doing`` names its next task in messages."""
        self._doing = doing
        self._idle_s = 0.0
        self._is_watched = True

    def rest(self, doing: str) -> None:
        """Record that the next task of the main thread has no time limit."""
        self._doing = doing
        self._is_watched = False

    def request(self, seconds_left: float = math.inf) -> None:
        """Ask the loop to stop; end the process in ``seconds_left`` at the latest."""
        self._deadline = min(self._deadline, time.monotonic() + seconds_left)
        self.requested = True

    def stop_if_requested(self) -> None:
        """Raise StopTraining if a rank was asked to stop. Collective.

        All ranks adopt the earliest deadline.
        """
        # A CPU tensor, since reading one does not synchronize with the GPU.
        seconds_left = torch.tensor(self.seconds_left(), dtype=torch.float64)
        dist.all_reduce(seconds_left, op=dist.ReduceOp.MIN)
        if math.isfinite(seconds_left.item()):
            self.request(seconds_left.item())
            raise StopTraining

    def seconds_left(self) -> float:
        """Return the seconds until the process ends; inf without a stop signal."""
        return self._deadline - time.monotonic()

    def _handle(self, signum: int, frame: Any) -> None:
        # The rest of the grace period is for the interpreter and torchrun to exit.
        self.request(USABLE_GRACE_FRACTION * self.grace)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed:
            try:
                signals = self._receiver.recv(64)
            except TimeoutError:
                signals = b""
            for signum in signals:
                if signum in STOP_SIGNALS:
                    self._handle_in_thread(signal.Signals(signum))
            now = time.monotonic()
            # Time during which the whole process was suspended does not count as idle.
            elapsed = min(now - before, 2 * POLL_S)
            # beat() of the main thread sets it to 0. Threads switch at calls, so the read and the
            # write of this += have none between them.
            self._idle_s += elapsed
            before = now
            if self.seconds_left() < 0:
                end_now(STOPPED, f"--grace {self.grace:g} s is over in {self._doing}")
            if self._is_watched and 0 < self.step_timeout < self._idle_s:
                end_now(FAILED, self._reason_of_timeout())

    def _handle_in_thread(self, signum: signal.Signals) -> None:
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1:
            end_now(ABORTED, "aborted; the same command resumes from the last complete checkpoint")
        self._handle(signum, None)
        if rank() == 0 and (signum == signal.SIGINT or not self._announced):
            again = "; Ctrl-C again aborts" if signum == signal.SIGINT else ""
            print(f"\n{signum.name}: stopping after this step{again}", file=sys.stderr, flush=True)
            self._announced = True

    def _reason_of_timeout(self) -> str | None:
        """Return the reason on the lowest rank that can report it, None on the others."""
        reason = f"no progress for --step-timeout {self.step_timeout:g} s: "
        found: list[str | None] = [f"this rank is in {self._doing}, and the store does not answer"]
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return f"{reason}the process hangs in {self._doing}"
        thread = threading.Thread(
            target=lambda: found.__setitem__(0, self._report_hang()), daemon=True
        )
        thread.start()
        thread.join(2 * HANG_REPORT_S)
        return None if found[0] is None else reason + found[0]

    def _report_hang(self) -> str | None:
        # A new client, since the main thread may be blocked in a call on the existing one.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set(f"hangs/{rank()}", self._doing)
        time.sleep(HANG_REPORT_S)
        ranks = range(dist.get_world_size())
        doing = {r: store.get(f"hangs/{r}").decode() for r in ranks if store.check([f"hangs/{r}"])}
        if rank() != min(doing):
            time.sleep(POLL_S)  # let the lowest rank print before torchrun ends all ranks
            return None
        silent = [r for r in ranks if r not in doing]
        if silent:
            return (
                f"rank(s) {', '.join(map(str, silent))} gave no sign of life while the "
                f"others were in {self._doing}; a process is stopped or its machine hangs"
            )
        return "; ".join(f"rank {r} in {task}" for r, task in doing.items())


def end_now(code: int, reason: str | None) -> NoReturn:
    """End the process without waiting for any other thread."""
    if reason is not None:
        print(f"error: rank {rank()}: {reason}.", file=sys.stderr, flush=True)
    os._exit(code)
