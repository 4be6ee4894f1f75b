"""A small Hub-like HTTP server in this process: what pushing and loading ask of huggingface.co, kept in memory.

Repositories hold the files of their last commit alone; every older commit answers with those. `requests` records what
was asked, and `fail` names a request to refuse: (method, part of the path, how many to let through before, status).
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
        # (kind, id) -> {"files": {path: bytes}, "commits": int, "titles": [str], "private": bool, "sdk": str}
        self.repositories = {}
        self.objects = {}  # sha256 -> bytes
        self.collections = {}  # slug -> {"title", "items": [(kind, id)]}
        self.requests = []
        self.fail = None
        self.lock = threading.Lock()
        hub = self

        class Handler(Requests):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commits(self):
        return {name: repository["commits"] for (_, name), repository in self.repositories.items()}


def sha_of(repository):
    return hashlib.sha1(str(repository["commits"]).encode()).hexdigest()


class Requests(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer_one(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        hub = self.hub
        with hub.lock:
            hub.requests.append((self.command, path))
            if hub.fail and self.command == hub.fail[0] and hub.fail[1] in path:
                if hub.fail[2] == 0:
                    # a careless server that echoes the token, which must not reach the user's screen
                    return self.refuse(hub.fail[3], f"the disk is full, {self.headers.get('Authorization')}")
                hub.fail = (*hub.fail[:2], hub.fail[2] - 1, hub.fail[3])
            writing = self.command in ("POST", "PUT") and "/lfs-objects/" not in path
            signed_in = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if (writing or "whoami" in path) and not signed_in and "paths-info" not in path:
                return self.refuse(401, "Invalid credentials")
            self.route(path, query, body)

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
            private = wanted.get("visibility") == "private"
            files = {".gitattributes": b"*.safetensors filter=lfs\n"}
            if wanted.get("sdk") == "static":  # the page that a new static Space shows
                files |= {
                    "README.md": b"---\nsdk: static\n---\n",
                    "index.html": b"<p>Welcome</p>",
                    "style.css": b"p {}",
                }
            repository = {"files": files, "commits": 1, "titles": ["initial commit"], "private": private}
            hub.repositories[key] = repository | {"sdk": wanted.get("sdk")}
            return self.send({"url": f"{hub.url}/{name}", "name": name, "id": name})
        if parts[:2] == ["api", "collections"]:
            return self.route_collections(parts[2:], body)
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
        if parts[0] == "api" and parts[1] in ("models", "datasets", "spaces"):
            return self.route_repository(parts[1][:-1], "/".join(parts[2:4]), parts[4:], query, body)
        kind = "model"
        if parts[0] in ("datasets", "spaces"):
            kind, parts = parts[0][:-1], parts[1:]
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve(hub.repositories.get((kind, "/".join(parts[:2]))), "/".join(parts[4:]))
        return self.refuse(404, f"nothing is at {path}")

    def route_collections(self, rest, body):
        hub = self.hub
        wanted = json.loads(body) if body else {}
        if not rest:
            slug = f"{wanted['namespace']}/{wanted['title'].lower()}-0123456789abcdef01234567"
            if slug in hub.collections:
                return self.refuse(409, "exists", {"slug": slug})
            hub.collections[slug] = {"title": wanted["title"], "items": []}
        else:
            slug = "/".join(rest[:2])
            if rest[2:] == ["items"]:
                item = (wanted["item"]["type"], wanted["item"]["id"])
                if item in hub.collections[slug]["items"]:
                    return self.refuse(409, "exists")
                hub.collections[slug]["items"].append(item)
        items = [
            {"_id": str(index), "id": name, "type": kind, "position": index}
            for index, (kind, name) in enumerate(hub.collections[slug]["items"])
        ]
        owner = {"name": slug.split("/")[0], "type": "user"}
        collection = {"slug": slug, "title": hub.collections[slug]["title"], "owner": owner, "items": items}
        times = {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "upvotes": 0}
        return self.send(collection | times | {"theme": "blue", "private": False, "gating": False})

    def route_repository(self, kind, name, rest, query, body):
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self.refuse(404, "Repository not found", code="RepoNotFound")
        files, action = repository["files"], rest[0] if rest else "revision"
        if action == "preupload":
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.send({"files": answers})
        if action == "commit":
            changed = dict(files)
            for line in body.decode().splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    titles = [value["summary"], *repository["titles"]]
                elif item["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        return self.refuse(400, f"the object of {value['path']} was never uploaded")
                    changed[value["path"]] = self.hub.objects[value["oid"]]
                elif item["key"] == "deletedFile":
                    del changed[value["path"]]
            repository["files"], repository["titles"] = changed, titles
            repository["commits"] += 1
            return self.send({"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": sha_of(repository)})
        if action == "commits":
            about = {"authors": [{"user": "lab"}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
            return self.send([about | {"id": "0" * 40, "title": title} for title in repository["titles"]])
        if action == "tree":
            folder = "/".join(rest[2:])
            return self.send(self.entries(files, folder, query.get("recursive", ["false"])[0].lower() == "true"))
        if action == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            listed = {entry["path"]: entry for entry in self.entries(files, "", True)}
            return self.send([listed[path] for path in wanted if path in listed])
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "sha": sha_of(repository), "private": repository["private"], "siblings": siblings}
        return self.send(about | {"tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"})

    @staticmethod
    def entries(files, folder, recursive):
        entries, folders = [], set()
        for path, content in files.items():
            if folder and not path.startswith(folder + "/"):
                continue
            below = path[len(folder) + 1 if folder else 0 :].split("/")
            for depth in range(1, len(below) if recursive else min(len(below), 2)):
                folders.add("/".join(([folder] if folder else []) + below[:depth]))
            if recursive or len(below) == 1:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
                if path.endswith(LARGE):
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                entries.append(entry)
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]

    def resolve(self, repository, path):
        if repository is None:
            return self.refuse(404, "Repository not found", code="RepoNotFound")
        content = repository["files"].get(path)
        commit = {"X-Repo-Commit": sha_of(repository)}
        if content is None:
            return self.refuse(404, "Entry not found", code="EntryNotFound", headers=commit)
        headers = commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, wanted = 200, self.headers.get("Range")
        if wanted and wanted.startswith("bytes="):
            first, last = wanted.removeprefix("bytes=").split("-")
            size, start = len(content), int(first or 0)
            stop = min(int(last) if last else size - 1, size - 1)
            content, status = content[start : stop + 1], 206
            headers["Content-Range"] = f"bytes {start}-{stop}/{size}"
        self.reply(status, content, headers | {"Content-Type": "application/octet-stream"})

    def send(self, content):
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, message, more=None, *, code=None, headers=None):
        headers = (headers or {}) | {"Content-Type": "application/json", "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.reply(status, json.dumps({"error": message} | (more or {})).encode(), headers)

    def reply(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
