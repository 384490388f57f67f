"""Modules of ``benchmark.py``. Each subcommand is the ``main`` of the module of its name."""
