"""What vLLM has compiled is there whole or not at all, whenever the worker is killed.

On CPUs PyTorch's compiler has a C++ compiler write each library straight to its place in a cache,
and takes any file of that name for a finished one. A worker that is killed meanwhile, as one is
that loads for too long, would leave a part of a library there, and no later start could load it.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

Compile = Callable[[str, str], None]
"""Runs a command line in a folder; ``torch._inductor.cpp_builder`` has it."""


def whole_files_only() -> None:
    """Makes compilers write beside the file, which gets its name when it is finished."""
    from torch._inductor import cpp_builder

    compile_: Compile = cpp_builder._run_compile_cmd  # noqa: SLF001 - there is no other place
    if not getattr(compile_, "whole_files_only", False):
        cpp_builder._run_compile_cmd = _wrapped(compile_)  # noqa: SLF001


def _wrapped(compile_: Compile) -> Compile:
    def compile_whole(command: str, folder: str) -> None:
        words = shlex.split(command)
        if words.count("-o") != 1:
            compile_(command, folder)
            return
        place = words.index("-o") + 1
        target = Path(folder, words[place])
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        words[place] = str(partial)
        try:
            compile_(shlex.join(words), folder)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    compile_whole.whole_files_only = True  # type: ignore[attr-defined]
    return compile_whole
