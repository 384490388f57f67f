"""Modules of ``train.py``."""
