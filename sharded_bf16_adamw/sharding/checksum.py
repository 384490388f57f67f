"""The old name of :mod:`.replica_checksum`, for ``zero/checks.py`` until it imports the new one."""

from .replica_checksum import checksums as checksums
from .replica_checksum import text_checksum as text_checksum
