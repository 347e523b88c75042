"""A server on this machine that answers as the Hugging Face hub does when a model's files are read and committed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_token_of_the_owner"
READER = "hf_token_that_may_only_read"


@dataclass
class Hub:
    """Commits of repositories, branches by name, and what was asked for.

    repos: repository -> branch or commit -> the commit and its files.
    private: repositories that only the owner's token reads.
    stored: large files by their SHA-256.
    """

    url: str = ""
    repos: dict[str, dict[str, tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds a commit to a branch and gives its hash; files that it does not name stay."""
        revisions = self.repos.setdefault(repo, {})
        before = revisions[branch][1] if branch in revisions else {}
        sha = hashlib.sha1(f"{repo}{len(revisions)}".encode() + b"".join(files.values())).hexdigest()
        revisions[sha] = revisions[branch] = (sha, {**before, **files})
        return sha

    # -- what is asked for by POST; each gives a status and what is answered

    def create(self, asked: Any) -> tuple[int, Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        if asked.get("visibility") == "private":
            self.private.add(repo)
        self.commit(repo, {".gitattributes": b"*.safetensors filter=lfs"})
        return 200, {"url": f"{self.url}/{repo}"}

    def validated(self, asked: Any) -> tuple[int, Any]:
        """The card's metadata is YAML, and what its model-index must have is there."""
        _, block, _ = asked["content"].split("---\n", 2)
        for entry in yaml.safe_load(block).get("model-index", []):
            for result in entry["results"]:
                complete = {"task", "dataset", "metrics"} <= set(result) and {"name", "type"} <= set(result["dataset"])
                if not complete:
                    return 400, {"errors": [{"message": '"model-index" is not complete'}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def batch(self, asked: Any) -> tuple[int, Any]:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.url}/large/{entry['oid']}", "header": {}}}}
            for entry in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def committed(self, repo: str, branch: str, lines: list[Any]) -> tuple[int, Any]:
        files = {}
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.stored[value["oid"]]
        sha = self.commit(repo, files, branch)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}

    def posted(self, parts: list[str], body: bytes) -> tuple[int, Any]:
        """What a POST to a path is answered by one who may write."""
        match parts:
            case ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case [_, _, "info", "lfs", "objects", "batch"]:
                return self.batch(json.loads(body))
        repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if what == "branch":
            known = self.repos[repo]
            if revision in known:
                return 409, {"error": "Reference already exists"}
            known[revision] = known["main"]
            return 200, {}
        if revision not in self.repos[repo]:
            return 404, {"error": "Revision not found"}
        if what == "preupload":
            named = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in named}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        return self.committed(repo, revision, [json.loads(line) for line in body.splitlines()])


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, status: int, value: Any, **headers: str) -> None:
            self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

        def parts(self) -> list[str]:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            return [unquote(part) for part in path.strip("/").split("/")]

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            parts = self.parts()
            api = parts[:2] == ["api", "models"]
            repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            closed = repo in hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            if repo not in hub.repos or closed:
                return self.answer(401 if closed else 404, X_Error_Code="RepoNotFound")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in hub.repos[repo]:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            sha, files = hub.repos[repo][revision]
            if api:
                siblings = [{"rfilename": name} for name in files]
                return self.json(200, {"id": repo, "sha": sha, "private": repo in hub.private, "siblings": siblings})
            name = "/".join(rest[2:])
            if name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            parts, body = self.parts(), self.body()
            if parts == ["api", "validate-yaml"]:  # which asks for no token
                return self.json(*hub.validated(json.loads(body)))
            match (self.headers.get("Authorization") or "").removeprefix("Bearer "):
                case token if token == TOKEN:
                    return self.json(*hub.posted(parts, body))
                case token if token == READER:
                    return self.json(403, {"error": "You don't have the rights to create a model under this namespace"})
            told = "Invalid credentials in Authorization header"
            return self.json(401, {"error": told}, X_Error_Message=told)

        def do_PUT(self) -> None:
            (_, oid), body = self.parts(), self.body()
            if hashlib.sha256(body).hexdigest() != oid:
                return self.answer(400)
            hub.stored[oid] = body
            return self.answer(200)

    return Handler


def hub_environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment of a user with an empty cache. (The client reads it when it is imported.)"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **given, **({} if token is None else {"HF_TOKEN": token})}


def point_client_at(url: str, home: Path, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """The hub's client in this process asks the server, with an empty cache; what it read of the environment when it
    was imported is changed."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", token or "")


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The server, on a free port of 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
