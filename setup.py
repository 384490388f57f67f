"""Build the optional native CPU library. Metadata is in pyproject.toml.

The library is plain C behind ctypes: it needs the C compiler, but neither Python headers nor
torch, so one wheel serves every Python 3. Without a compiler, or if it fails, the package installs
without the library and uses the reference back end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("sharded_bf16_adamw/kernels/csrc")
# Fused or reordered arithmetic would change the bits: no -ffast-math, no -march=native, no fma.
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-pthread",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
]


class BuildNative(build_ext):
    """A build of all of csrc into one library: ``_native.so``, for any Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never leave a library of older sources behind
        compiler = os.environ.get("CC", "").split() or [
            next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "cc")
        ]
        try:
            subprocess.run([*compiler, *FLAGS, *ext.sources, "-o", str(target), "-lm"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"the native CPU library was not built, so steps use the slower reference: {error}"
            )


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform: ``py3-none-<platform>``."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "sharded_bf16_adamw.kernels._native",
            sources=sorted(str(source) for source in CSRC.glob("*.c")),
            depends=sorted(str(header) for header in CSRC.glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildNative},
)
