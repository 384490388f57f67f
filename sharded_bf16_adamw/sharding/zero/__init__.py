"""ZeRO: optimizer states (stage 1) and gradients (stage 2) partitioned over data-parallel ranks."""
