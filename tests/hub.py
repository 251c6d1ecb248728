"""A hub of one's own on this machine: the few requests that pushing makes, answered from memory."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the hub knows: tokens → role, and repositories → their files."""

    address: str = ""
    roles: dict[str, str] = field(default_factory=lambda: {"good": "write", "reader": "read"})
    orgs: tuple[str, ...] = ("the-org",)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    refuses_commits: bool = False

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) of a request."""
        path = path.partition("?")[0]
        if token not in self.roles:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            access = {"displayName": f"token-{token}", "role": self.roles[token]}
            orgs = [{"name": name} for name in self.orgs]
            return 200, {"name": "me", "orgs": orgs, "auth": {"accessToken": access}}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repository, action = path.removeprefix("/api/models/").removesuffix("/main").rsplit("/", 1)
        if action == "preupload":
            return self._preupload(json.loads(body))
        assert action == "commit", path
        return self._commit(repository, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in self.repositories:
            return 409, {"error": "You already created it", "url": f"{self.address}/{repository}"}
        self.repositories[repository] = {}
        if "private" in (asked.get("visibility"), "private" if asked.get("private") else ""):
            self.private.add(repository)
        return 200, {"url": f"{self.address}/{repository}"}

    def _preupload(self, asked: dict[str, Any]) -> tuple[int, Any]:
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        return 200, {"files": [{"path": file["path"]} | mode for file in asked["files"]]}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        if self.refuses_commits:
            return 403, {"error": "You are not allowed to write here"}
        for line in lines:
            if line["key"] == "header":
                self.commits.append(line["value"]["summary"])
            else:
                content = base64.b64decode(line["value"]["content"])
                self.repositories[repository][line["value"]["path"]] = content
        return 200, {
            "commitUrl": f"{self.address}/{repository}/commit/0a1b",
            "commitOid": "0a1b",
            "success": True,
        }


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens on a port of this machine until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            length = int(self.headers.get("content-length", 0))
            status, answer = hub.answer(self.path, token, self.rfile.read(length))
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
