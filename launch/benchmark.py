"""Run a benchmark of the optimizer.

    python launch/benchmark.py [step] --device cpu --threads 1 2 --json runs/cpu.json --docs
    python launch/benchmark.py gpu-checks
    python launch/benchmark.py checkpoint --gb 1
    python launch/benchmark.py plan --ranks 1024
    python launch/benchmark.py exchange --ranks 2 4 8
    torchrun --nproc-per-node 4 launch/benchmark.py gather
    torchrun --nproc-per-node 2 launch/benchmark.py zero
    torchrun --nproc-per-node 2 launch/benchmark.py loop

``step`` times the optimizer step and is the default; ``gpu-checks`` checks the step on a GPU;
``checkpoint`` times saving and loading; ``plan`` measures the part of a save and a load that grows
with the number of ranks, in one process; ``gather`` measures the memory of gathering the optimizer
state; ``zero`` compares ZeRO with torch's; ``exchange`` times what the ranks of ZeRO exchange on
the host; ``loop`` compares whole training steps under several strategies. Each has its own
``--help``. A usage error prints one sentence, and the exit code is 2.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from training.errors import UsageError, exit_code

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(1, str(REPO))  # for a clone that is not installed

COMMANDS = ("step", "gpu-checks", "checkpoint", "plan", "gather", "zero", "exchange", "loop")


def main(argv: list[str]) -> int:
    command, args = "step", argv
    if argv and not argv[0].startswith("-"):
        command, *args = argv
    elif argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    return exit_code(lambda: run(command, args))


def run(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        raise UsageError(f"there is no benchmark {command!r}: use {', '.join(COMMANDS)}.")
    return importlib.import_module(f"bench.{command.replace('-', '_')}").main(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
