"""Modules of ``benchmark.py``. Each of its subcommands is the ``main`` of one of them."""
