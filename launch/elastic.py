"""torchrun for ``train.py`` under a scheduler, with torchrun's arguments.

    python launch/elastic.py --nproc-per-node 8 --max-restarts 3 launch/train.py --preset 1b

torchrun exits with code 1 whatever ended its workers. This command exits with the code of the
worker that failed first, or with 1 if a signal killed it. After a signal to torchrun itself, even
while that waits for other nodes, it exits with 75: the same command continues the run. SIGUSR1,
which would kill torchrun, is passed on to the workers.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun
from training.errors import FAILED, STOPPED

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(argv: list[str] | None = None) -> int:
    # torchrun reads the defaults of its options from PET_*
    handled = os.environ.setdefault("PET_SIGNALS_TO_HANDLE", SIGNALS)
    for name in handled.split(","):  # torchrun handles them only once it starts workers
        with suppress(KeyError, OSError):  # as torchrun, which warns of unknown names
            signal.signal(signal.Signals[name.strip()], _stop)
    try:
        torchrun(argv)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        return STOPPED
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        print(
            f"local rank {failure.local_rank} (process {failure.pid}) ended with exit code "
            f"{failure.exitcode}",
            file=sys.stderr,
        )
        return failure.exitcode if failure.exitcode > 0 else FAILED
    return 0


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SignalException("stopped", signal.Signals(signum))


if __name__ == "__main__":
    sys.exit(main())
