"""A server of plate archives that behaves as badly as real ones do."""

import http.server
import threading


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP with faults by file name: a list of faults, one used up by each GET."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests, self.ignore_range = folder, {}, [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        server, name = self.server, self.path.lstrip("/")
        path = server.folder / name
        wanted = self.headers.get("Range")
        if send:
            server.requests.append((name, wanted))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        fault = (server.faults.get(name) or [None]).pop(0) if send and server.faults.get(name) else None
        if fault == "truncated":
            content = content[: len(content) // 2]
        if fault == "corrupted":
            middle = len(content) // 2
            content = content[:middle] + bytes(255 - b for b in content[middle : middle + 64]) + content[middle + 64 :]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not server.ignore_range else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if send:
            if fault == "dropped":
                self.wfile.write(content[start : start + (len(content) - start) // 3])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
            else:
                self.wfile.write(content[start:])
