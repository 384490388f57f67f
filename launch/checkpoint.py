"""Run ``python -m sharded_bf16_adamw.checkpoint`` from a source tree."""

import sys

from sharded_bf16_adamw.checkpoint.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
