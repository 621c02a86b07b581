"""A stand-in for the Hugging Face hub on this machine: the part of its HTTP API by which huggingface_hub creates a
repository and uploads a folder. Files are kept in memory. Files that are not text go the way of Git LFS, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_jane"
REPOSITORY = r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Hub:
    """What the stand-in holds, and what it refuses."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # name -> path -> bytes
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)  # of Git LFS, by their SHA-256
    calls: list[tuple[str, str]] = field(default_factory=list)  # method and path
    faults: dict[str, int] = field(default_factory=dict)  # pattern of a path -> status of the answer

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON of the answer to a request."""
        self.calls.append((method, path))
        for pattern, status in self.faults.items():
            if re.search(pattern, path):
                return status, {"error": f"refused by the stand-in with {status}"}
        if method == "PUT" and path.startswith("/lfs/"):  # an address that was given out; it needs no token
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        routes = {
            "GET /api/whoami-v2": lambda: (200, {"type": "user", "name": "jane", "auth": {}}),
            "POST /api/repos/create": lambda: self.create(json.loads(body)),
            "POST /api/validate-yaml": lambda: self.validate(json.loads(body)["content"]),
            f"GET {REPOSITORY}/auth-check/write": lambda: (200, {}),
            f"GET {REPOSITORY}/tree/main": lambda: self.tree(repo),
            f"GET {REPOSITORY}": lambda: (200, {"id": repo, "private": repo in self.private, "siblings": []}),
            f"POST {REPOSITORY}/preupload/main": lambda: self.preupload(json.loads(body)["files"]),
            r"POST /(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch": lambda: self.batch(json.loads(body)),
            f"POST {REPOSITORY}/commit/main": lambda: self.commit(repo, body),
        }
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, f"{method} {path}"):
                repo = found.groupdict().get("repo", "")
                if repo and repo not in self.repositories:
                    return 404, {"error": "Repository not found"}
                return route()
        return 404, {"error": f"the stand-in has no {method} {path}"}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner = asked.get("organization") or "jane"
        if owner != "jane":
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        name = f"{owner}/{asked['name']}"
        there = name in self.repositories
        if not there:
            self.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.private |= {name} if asked.get("visibility") == "private" or asked.get("private") else set()
        return 409 if there else 200, {"url": f"{self.address}/{name}"}

    def validate(self, card: str) -> tuple[int, Any]:
        data = yaml.safe_load(card.split("---\n")[1])
        errors = [f"{key} is empty" for key, value in data.items() if value in (None, "", [])]
        if "base_model" in data and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data["base_model"]):
            errors.append("base_model is not the name of a model")
        return 400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []}

    def tree(self, repo: str) -> tuple[int, Any]:
        files = self.repositories[repo].items()
        return 200, [{"type": "file", "path": path, "size": len(content), "oid": ""} for path, content in files]

    def preupload(self, files: list[dict[str, Any]]) -> tuple[int, Any]:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", "tokenizer.json")) else "regular"

        answer = [{"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False} for file in files]
        return 200, {"files": answer}

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.address}/lfs/{wanted['oid']}"}}}
            for wanted in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        files = self.repositories[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/1", "commitOid": "1", "success": True}


@contextmanager
def serve() -> Iterator[Hub]:
    """Start a stand-in, and end it."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, content = hub.answer(self.command, path, self.headers.get("Authorization", ""), body)
            said = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = respond  # noqa: N815 - names of http.server

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
