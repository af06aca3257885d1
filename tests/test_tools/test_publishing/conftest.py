"""A stand-in for the Hub on the loopback interface, and checkpoints to publish."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.utils._http as hub_http
import pytest
import yaml
from safetensors.torch import load_file, save_file

TOKEN = "hf_of_the_stub"
PART_BYTES = 64 * 1024  # small parts, so that a toy's weights take several


@dataclass
class Repository:
    """A repository with one state per branch; a file is ("regular", bytes) or ("lfs", sha256)."""

    private: bool = False
    branches: dict[str, dict[str, tuple[str, Any]]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        """Return the commit that a branch is at."""
        return hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()

    def names(self, branch: str = "main") -> set[str]:
        return set(self.branches[branch])


@dataclass
class Hub:
    """The server's state, and the faults that a test asks for.

    Attributes:
        faults: status by "METHOD route"; the answer to every such request.
        drop: close the connection on every part but the first so many of an object, (sha256, how many).
        puts: address of each part that arrived.
    """

    url: str = ""
    role: str = "write"
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    fault_headers: dict[str, str] = field(default_factory=dict)
    drop: tuple[str, int] | None = None

    def content(self, repo_id: str, name: str, branch: str = "main") -> bytes:
        """Return a file of a repository."""
        kind, value = self.repositories[repo_id].branches[branch][name]
        return self.objects[value] if kind == "lfs" else value

    def counted(self, beginning: str) -> int:
        """Return how many requests began so."""
        return sum(request.startswith(beginning) for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    """The routes that huggingface_hub uses to publish a model."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        parsed = urlsplit(self.path)
        path, query = unquote(parsed.path), parse_qs(parsed.query)
        self.hub.requests.append(f"{method} {path}")
        if method == "PUT":
            oid, kept = self.hub.drop or ("", 0)
            if path.endswith(f"/{oid}") and oid and len(self.hub.parts.get(oid, {})) >= kept:
                self.close_connection = True
                self.connection.close()
                return
            self._store_part(path, query, self._body())
            return
        body = self._body()
        for beginning, status in self.hub.faults.items():
            if f"{method} {path}".startswith(beginning):
                self._send(status, {"error": f"stub says {status}"}, **self.hub.fault_headers)
                return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/complete/"):
            self._send(401, {"error": "Invalid credentials"})
            return
        self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> None:
        steps = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            self._send(200, {"name": "me", "orgs": [], "auth": {"accessToken": {"role": self.hub.role}}})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate_yaml(json.loads(body)["content"])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif steps[0] == "complete":
            self._complete(steps[1])
        elif steps[:2] == ["api", "models"]:
            repo_id, rest = "/".join(steps[2:4]), steps[4:]
            if repo_id not in self.hub.repositories:
                self._send(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            else:
                self._model(method, repo_id, rest, body)
        else:
            self._send(404, {"error": f"the stub does not know {method} {path}"})

    def _model(self, method: str, repo_id: str, rest: list[str], body: bytes) -> None:
        repository = self.hub.repositories[repo_id]
        what, branch = (rest[0] if rest else "revision"), (rest[1] if len(rest) > 1 else "main")
        if what == "branch":
            repository.branches[branch] = dict(repository.branches["main"])
            self._send(200, {})
        elif branch not in repository.branches:
            self._send(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            self._info(repo_id, branch)
        elif what == "preupload":
            self._preupload(repository.branches[branch], json.loads(body)["files"])
        elif what == "commit":
            self._commit(repo_id, branch, [json.loads(line) for line in body.splitlines()])
        else:
            self._send(404, {"error": f"the stub does not know {what}"})

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo_id in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo_id] = Repository(private, {"main": {".gitattributes": ("regular", b"")}})
        self._send(200, {"url": f"{self.hub.url}/{repo_id}"})

    def _validate_yaml(self, content: str) -> None:
        metadata = yaml.safe_load(content.split("---")[1])
        errors = [] if isinstance(metadata.get("tags", []), list) else [{"message": '"tags" must be an array'}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _info(self, repo_id: str, branch: str) -> None:
        repository = self.hub.repositories[repo_id]
        files = repository.branches[branch]
        card = files.get("README.md")
        answer: dict[str, Any] = {
            "_id": "0",
            "id": repo_id,
            "sha": repository.sha(branch),
            "private": repository.private,
            "tags": [],
            "siblings": [{"rfilename": name} for name in files],
        }
        if card is not None and card[1].startswith(b"---"):
            answer["cardData"] = yaml.safe_load(card[1].decode().split("---")[1])
        self._send(200, answer)

    def _preupload(self, present: dict[str, tuple[str, Any]], files: list[dict[str, Any]]) -> None:
        answer = []
        for file in files:
            kind, value = present.get(file["path"], (None, None))
            oid = value if kind == "lfs" else None
            if kind == "regular":
                oid = hashlib.sha1(b"blob %d\0" % len(value) + value).hexdigest()
            mode = "lfs" if file["path"].endswith((".safetensors", "tokenizer.json")) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answer})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        answer = []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            one: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                header = {"chunk_size": str(PART_BYTES)}
                for part in range(-(-size // PART_BYTES)):
                    header[f"{part + 1:05d}"] = f"{self.hub.url}/store/{oid}?part={part + 1}"
                one["actions"] = {"upload": {"href": f"{self.hub.url}/complete/{oid}", "header": header}}
            answer.append(one)
        self._send(200, {"transfer": "multipart", "objects": answer})

    def _store_part(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        oid, part = path.rpartition("/")[2], int(query["part"][0])
        self.hub.parts.setdefault(oid, {})[part] = body
        self.hub.puts.append(f"{oid} {part}")
        self._send(200, {}, ETag=f'"{part}"')

    def _complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        content = b"".join(parts[number] for number in sorted(parts))
        if hashlib.sha256(content).hexdigest() != oid:
            self._send(400, {"error": "the content is not what was announced"})
            return
        self.hub.objects[oid] = content
        self._send(200, {})

    def _commit(self, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[repo_id]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.sha(branch)):
            self._send(412, {"error": "A commit has happened since."})
            return
        files = repository.branches[branch]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.hub.objects, "committed before it was uploaded"
                files[value["path"]] = ("lfs", value["oid"])
            else:
                del files[value["path"]]
        repository.commits.append(header)
        oid = repository.sha(branch)
        self._send(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, answer: dict[str, Any], **headers: str) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running stub that huggingface_hub takes for the Hub, with a token that it accepts.

    Xet's storage protocol has a client in Rust and no public server, so the stub speaks LFS; waiting between retries
    is left out.
    """
    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "ENDPOINT": state.url,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,  # which a test run may set
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
    hub_http.close_session()


@pytest.fixture(scope="session")
def _published_toy(make_quad_toy: Callable[..., tuple[Any, Path]], toy_tokenizer: Any) -> Path:
    _, folder = make_quad_toy()
    toy_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(_published_toy: Path, tmp_path: Path) -> Path:
    """A QUAD checkpoint of a llama toy with tokenizer, to be changed at will."""
    return Path(shutil.copytree(_published_toy, tmp_path / "toy-quad"))


@pytest.fixture
def shard() -> Callable[[Path], list[str]]:
    """Return `shard(checkpoint)`, which splits the weights into two files with an index and returns their names."""

    def split(checkpoint: Path) -> list[str]:
        tensors = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").unlink()
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {name: files[index % 2] for index, name in enumerate(sorted(tensors))}
        for file in files:
            part = {name: tensors[name] for name, owner in weight_map.items() if owner == file}
            save_file(part, checkpoint / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        return files

    return split
