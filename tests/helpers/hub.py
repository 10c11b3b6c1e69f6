"""A stand-in for the Hugging Face hub: the part of its HTTP interface that a download uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["Hub", "running_hub"]


@dataclass
class Hub:
    """What is on it, and what was asked of it.

    Attributes:
        address: for HF_ENDPOINT.
        models: {OWNER/NAME: folder with its files}.
        failures: {OWNER/NAME: (HTTP status, error code of the hub)} of models that are not given out.
        requests: path of each request.
    """

    address: str
    models: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A server on this machine, as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append(path)
            parts = path.removeprefix("/api/models").strip("/").split("/")
            name, rest = "/".join(parts[:2]), parts[2:]
            if name in hub.failures or name not in hub.models:
                status, code = hub.failures.get(name, (404, "RepoNotFound"))
                self.answer(b"{}", status, {"X-Error-Code": code})
                return
            folder = hub.models[name]
            files = sorted(each for each in folder.rglob("*") if each.is_file())
            commit = hashlib.sha1(name.encode()).hexdigest()
            if not path.startswith("/api/"):  # OWNER/NAME/resolve/COMMIT/FILE
                content = (folder / "/".join(rest[2:])).read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                self.answer(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})
            elif rest[:1] == ["tree"]:
                listed = [
                    {
                        "type": "file",
                        "path": each.relative_to(folder).as_posix(),
                        "size": each.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for each in files
                ]
                self.answer(json.dumps(listed).encode(), 200)
            else:
                siblings = [{"rfilename": each.relative_to(folder).as_posix()} for each in files]
                self.answer(json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), 200)

        def answer(self, content: bytes, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
