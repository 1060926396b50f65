"""A Hugging Face hub of model repositories that answers inside this process, over the real client's HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

ERRORS = {"gated": (403, "GatedRepo"), "token": (401, None), "gone": (404, "RepoNotFound")}


class FakeHub:
    """Repositories by name, each a mapping of file names to bytes; every one has the commit `commit(name)` on main.

    `refused` maps a name to what stands in the way (see ERRORS; "down": no connection). `served` are the files that
    were sent, in order; sending `breaks_at` ends the connection half way, once.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, str] = {}
        self.served: list[str] = []
        self.breaks_at: str | None = None

    @staticmethod
    def commit(name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def snapshot(self, name: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / self.commit(name)

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/models").strip("/")
        name, _, rest = ("/".join(path.split("/")[:2]), "", "/".join(path.split("/")[2:]))
        refused = self.refused.get(name, "gone" if name not in self.repositories else None)
        if refused == "down":
            raise httpx.ConnectError("no route to the hub", request=request)
        if refused:
            status, code = ERRORS[refused]
            said = (
                {"X-Error-Code": code}
                if code
                else {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
            return httpx.Response(status, headers=said, request=request)
        verb, _, what = rest.partition("/")
        if verb == "resolve":
            return self._file(request, name, *what.split("/", 1))
        if verb == "revision" and what not in ("main", self.commit(name)):
            return httpx.Response(404, headers={"X-Error-Code": "RevisionNotFound"}, request=request)
        files = self.repositories[name]
        if verb == "tree":
            return httpx.Response(200, json=[self._entry(file, files[file]) for file in files], request=request)
        siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
        found = {"id": name, "sha": self.commit(name), "siblings": siblings}
        return httpx.Response(200, json={} if verb == "auth-check" else found, request=request)

    @staticmethod
    def _entry(file: str, content: bytes) -> dict:
        entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return entry | ({"lfs": large} if file.endswith(".safetensors") else {})

    def _file(self, request: httpx.Request, name: str, commit: str, file: str) -> httpx.Response:
        content = self.repositories[name][file]
        entry = self._entry(file, content)
        about = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": commit}
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        about["Content-Length"] = str(len(content) - start)
        if request.method == "HEAD":
            return httpx.Response(200, headers=about, request=request)
        self.served.append(file)
        if start:
            about["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        broken = self.breaks_at == file
        self.breaks_at = None if broken else self.breaks_at
        body = _cut(content) if broken else iter([content[start:]])
        return httpx.Response(206 if start else 200, headers=about, content=body, request=request)


def _cut(content: bytes) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    raise KeyboardInterrupt


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub that the client asks from now on instead of the real one, with an empty cache in `folder`."""
    hub = FakeHub(folder / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    hooks = {"request": [_http.hf_request_event_hook]}
    client = httpx.Client(transport=httpx.MockTransport(hub.answer), event_hooks=hooks, follow_redirects=True)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", client)
    return hub
