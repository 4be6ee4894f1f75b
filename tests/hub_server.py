"""A small Hub-like HTTP server in this process: what pushing and loading ask of huggingface.co, kept in memory.

Repositories hold the files of their last commit alone; every older commit answers with those. `requests` records what
was asked, and `fail` names a request to refuse: (method, part of the path, status).
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet")


class HubServer:
    """Start with `with HubServer(token) as hub:`; `hub.url` is what HF_ENDPOINT wants."""

    def __init__(self, token):
        self.token = token
        self.repositories = {}  # (kind, id) -> {"files": {path: bytes}, "titles": [str], "private": bool}
        self.objects = {}  # sha256 -> bytes
        self.collections = {}  # slug -> [(kind, id)]
        self.requests = []
        self.fail = None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Requests,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def put(self, kind, name, files):
        """A public repository of these files, as another would have pushed it."""
        self.repositories[kind, name] = {"files": dict(files), "titles": ["initial commit"], "private": False}

    def commits(self):
        return {name: len(repository["titles"]) for (_, name), repository in self.repositories.items()}


def sha_of(repository):
    return hashlib.sha1(str(len(repository["titles"])).encode()).hexdigest()


def entries(files, folder, recursive):
    """The Hub's tree of a folder: its files, and the folders on the way to them."""
    folder = f"{folder}/" if folder else ""
    found = {}
    for path, content in files.items():
        if not path.startswith(folder):
            continue
        parts = path.removeprefix(folder).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = folder + "/".join(parts[:depth])
            found[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            found[path] = {"type": "file", "path": path, "size": len(content), "oid": blob}
            if path.endswith(LARGE):
                oid = hashlib.sha256(content).hexdigest()
                found[path]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 1}
    return found


class Requests(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        hub = self.hub
        with hub.lock:
            hub.requests.append((self.command, path))
            if hub.fail and self.command == hub.fail[0] and hub.fail[1] in path:
                # a careless server that echoes the token, which must not reach the user's screen
                return self.refuse(hub.fail[2], f"the disk is full, {self.headers.get('Authorization')}")
            writing = self.command in ("POST", "PUT") and "/lfs-objects/" not in path and "paths-info" not in path
            if (writing or "whoami" in path) and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "Invalid credentials")
            self.route(path, query, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self, path, query, body):
        hub, parts = self.hub, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self.send({"name": "lab", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'lab'}/{wanted['name']}"
            key = (wanted.get("type") or "model", name)
            if key in hub.repositories:
                return self.refuse(409, "You already created this repo", {"url": f"{hub.url}/{name}"})
            files = {".gitattributes": b"*.safetensors filter=lfs\n"}
            if wanted.get("sdk") == "static":  # the page that a new static Space shows
                files |= {"README.md": b"---\nsdk: static\n---\n", "index.html": b"<p>Hi</p>", "style.css": b"p {}"}
            hub.put(*key, files)
            hub.repositories[key]["private"] = wanted.get("visibility") == "private"
            return self.send({"url": f"{hub.url}/{name}", "name": name, "id": name})
        if parts[:2] == ["api", "collections"]:
            return self.collect(parts[2:], json.loads(body) if body else {})
        if parts[0] == "lfs-objects":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return self.refuse(400, "checksum")
            hub.objects[parts[1]] = body
            return self.send({})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for item in json.loads(body)["objects"]:
                action = {"upload": {"href": f"{hub.url}/lfs-objects/{item['oid']}"}}
                objects.append(item | ({} if item["oid"] in hub.objects else {"actions": action}))
            return self.send({"transfer": "basic", "objects": objects})
        kind = "model"
        if parts[0] == "api":
            kind, parts = parts[1][:-1], parts[2:]
        elif parts[0] in ("datasets", "spaces"):
            kind, parts = parts[0][:-1], parts[1:]
        repository = hub.repositories.get((kind, "/".join(parts[:2])))
        if repository is None:
            return self.refuse(404, "Repository not found", code="RepoNotFound")
        if path.startswith("/api/"):
            return self.about("/".join(parts[:2]), repository, parts[2:], query, body)
        self.resolve(repository, "/".join(parts[4:]))

    def collect(self, rest, wanted):
        slug = "/".join(rest[:2]) or f"{wanted['namespace']}/{wanted['title'].lower()}-0123456789abcdef01234567"
        item = (wanted["item"]["type"], wanted["item"]["id"]) if rest[2:] == ["items"] else None
        if slug in self.hub.collections if not rest else item in self.hub.collections[slug]:
            return self.refuse(409, "exists", {"slug": slug})
        found = self.hub.collections.setdefault(slug, [])
        found += [item] if item else []
        items = [{"_id": name, "id": name, "type": kind, "position": 0} for kind, name in found]
        content = {"slug": slug, "title": slug, "owner": {"name": "lab", "type": "user"}, "items": items}
        content |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "upvotes": 0, "gating": False}
        self.send(content | {"theme": "blue", "private": False})

    def about(self, name, repository, rest, query, body):
        files, action = repository["files"], rest[0] if rest else "revision"
        if action == "preupload":
            modes = {True: "lfs", False: "regular"}
            asked = [file["path"] for file in json.loads(body)["files"]]
            known = entries(files, "", True)
            answers = [
                {"path": path, "uploadMode": modes[path.endswith(LARGE)], "shouldIgnore": False}
                | {"oid": (known.get(path) or {}).get("lfs", known.get(path) or {}).get("oid")}
                for path in asked
            ]
            return self.send({"files": answers})
        if action == "commit":
            lines = [json.loads(line) for line in body.decode().splitlines()]
            changed = dict(files)
            for key, value in ((line["key"], line["value"]) for line in lines[1:]):
                if key == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    changed[value["path"]] = self.hub.objects[value["oid"]]
                elif key == "deletedFile":
                    del changed[value["path"]]
            repository["files"] = changed
            repository["titles"].insert(0, lines[0]["value"]["summary"])
            return self.send({"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": sha_of(repository)})
        if action == "commits":
            about = {"authors": [{"user": "lab"}], "date": "2026-01-01T00:00:00.000Z", "message": "", "id": "0" * 40}
            return self.send([about | {"title": title} for title in repository["titles"]])
        if action == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            return self.send(list(entries(files, "/".join(rest[2:]), recursive).values()))
        if action == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            known = entries(files, "", True)
            return self.send([known[path] for path in wanted if path in known])
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "sha": sha_of(repository), "private": repository["private"], "siblings": siblings}
        self.send(about | {"tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"})

    def resolve(self, repository, path):
        content = repository["files"].get(path)
        commit = {"X-Repo-Commit": sha_of(repository)}
        if content is None:
            return self.refuse(404, "Entry not found", code="EntryNotFound", headers=commit)
        headers = commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, wanted, size = 200, self.headers.get("Range"), len(content)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first or 0), min(int(last or size - 1), size - 1)
            content, status = content[start : stop + 1], 206
            headers["Content-Range"] = f"bytes {start}-{stop}/{size}"
        self.reply(status, content, headers | {"Content-Type": "application/octet-stream"})

    def send(self, content):
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, message, more=None, *, code=None, headers=None):
        headers = (headers or {}) | {"Content-Type": "application/json", "X-Error-Message": message}
        headers |= {"X-Error-Code": code} if code else {}
        self.reply(status, json.dumps({"error": message} | (more or {})).encode(), headers)

    def reply(self, status, content, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
