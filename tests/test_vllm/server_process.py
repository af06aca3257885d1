"""Starts and stops a real `vllm serve` on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

START_SECONDS = 240


class Server(NamedTuple):
    """A running server: client, address, and what it printed so far."""

    client: Any
    address: str
    log: Path


@contextmanager
def serve(checkpoint: Path, log: Path, options: Sequence[str] = (), **environment: str) -> Iterator[Server]:
    """Serve a checkpoint without torch.compile until the context ends.

    Args:
        checkpoint: its folder.
        log: file for what the server prints.
        options: further ones of `vllm serve`.
        environment: further variables.
    """
    from openai import OpenAI

    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-num-seqs", "8"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**variables, **environment})
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address, process, log)
        yield Server(OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600), address, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"vllm serve ended with status {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vllm serve was not ready after {START_SECONDS} s:\n{log.read_text()[-4000:]}")
