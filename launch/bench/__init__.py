"""Modules of ``benchmark.py``; each that has a ``main`` is one of its subcommands."""
