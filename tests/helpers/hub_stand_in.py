"""The HTTP interface of a model hub, as far as an upload needs it, on a port of this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["TOKEN", "Hub", "hub_stand_in"]

TOKEN = "hf_of_this_test"
_LARGE = 10_000  # bytes, from which a file goes to the store of large files


@dataclass
class Hub:
    """What it holds, and how it fails.

    Attributes:
        endpoint: its address.
        private: {repository: whether it is}.
        branches: {(repository, branch): {file: content}}.
        messages: of the commits.
        stored: large files by sha256.
        requests: method and path of each request.
        failing: {beginning of a path: (status, what it says)}.
    """

    endpoint: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, repo: str, *, private: bool = False) -> None:
        """A repository that is there already."""
        self.private[repo] = private
        self.branches[repo, "main"] = {}


@contextlib.contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A hub that answers until the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.state.requests.append(f"{self.command} {path}")
        for beginning, (status, words) in self.state.failing.items():
            if path.startswith(beginning):
                return self._reply(
                    status,
                    {"error": words, "errors": [{"message": words}]},
                    {"X-Error-Message": words} if words else {},
                )
        if not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply(401, {"error": "Invalid username or password."})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if parts[0] == "store":
            return self._store(parts[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        repo = "/".join(parts[2:4])
        if repo not in self.state.private:
            return self._reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if len(parts) == 4:
            info = {
                "id": repo,
                "modelId": repo,
                "private": self.state.private[repo],
                "tags": [],
                "siblings": [],
            }
            return self._reply(200, info)
        revision = "/".join(parts[5:])
        if parts[4] == "branch":
            self.state.branches.setdefault((repo, revision), dict(self.state.branches[repo, "main"]))
            return self._reply(200, {})
        if (repo, revision) not in self.state.branches:
            return self._reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if parts[4] == "preupload":
            return self._preupload(json.loads(body))
        if parts[4] == "commit":
            return self._commit(repo, revision, body)
        return self._reply(501, {"error": f"the stand-in does not know {path}"})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.state.private:
            return self._reply(
                409, {"url": f"{self.state.endpoint}/{repo}", "error": "You already created it"}
            )
        self.state.add(repo, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._reply(200, {"url": f"{self.state.endpoint}/{repo}"})

    def _preupload(self, asked: dict[str, Any]) -> None:
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["size"] >= _LARGE else "regular",
                "shouldIgnore": False,
            }
            for each in asked["files"]
        ]
        self._reply(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            known = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.state.stored:
                known["actions"] = {
                    "upload": {"href": f"{self.state.endpoint}/store/{each['oid']}", "header": {}}
                }
            objects.append(known)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self._reply(400, {"error": "these bytes have another sha256"})
        self.state.stored[oid] = content
        return self._reply(200, {})

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        found: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.state.messages.append(value["summary"])
            elif entry["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                found[value["path"]] = self.state.stored[value["oid"]]
        self.state.branches[repo, revision].update(found)
        oid = hashlib.sha1(body).hexdigest()
        self._reply(200, {"commitUrl": f"{self.state.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def _reply(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
