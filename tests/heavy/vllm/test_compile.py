"""Compiled libraries of starts that were killed: real processes, a real compiler."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.system.server import eventually

PROGRAM = """
from shards.engines.vllm_compile import whole_files_only
whole_files_only()
whole_files_only()  # changes nothing
from torch._inductor.codecache import CppCodeCache
print(CppCodeCache.load('extern "C" int answer() { return 42; }', "cpu").answer())
"""
# Passes everything on; but if it is to be slow, it has a library half written when it is killed.
COMPILER = """#!/bin/sh
if [ -n "$SLOW" ]; then
  previous=
  for word; do
    case "$previous $word" in "-o "*.main.so*) echo half >"$word"; : >"$SLOW"; sleep 600;; esac
    previous=$word
  done
fi
exec g++ "$@"
"""


def test_a_start_that_is_killed_while_it_compiles_does_not_spoil_the_next_one(
    tmp_path: Path,
) -> None:
    assert shutil.which("g++"), "vLLM compiles with it"
    compiler, started = tmp_path / "compiler", tmp_path / "started"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    command = [sys.executable, "-c", PROGRAM]
    env = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    slow = subprocess.Popen(command, env=env | {"SLOW": str(started)}, start_new_session=True)
    try:
        eventually(lambda: started.exists() or slow.poll() is not None, 120.0)
        assert started.exists()
    finally:
        os.killpg(slow.pid, signal.SIGKILL)
        slow.wait()
    again = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert again.stdout == "42\n"
    assert again.stderr == ""
