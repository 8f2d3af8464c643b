"""An OpenAI-compatible server on loopback that behaves as a test says, and files of answers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.pairs import write_jsonl


class Judge(ThreadingHTTPServer):
    """An OpenAI-compatible server whose `behave(text, number)` says what comes back: the text of a verdict, a status
    with headers and a body, or "hang".
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave):
        self.behave, self.seen, self.keys, self.lock = behave, [], set(), threading.Lock()
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = "\n".join(message["content"] for message in body["messages"])
        with self.server.lock:
            self.server.seen.append(body)
            self.server.keys.add(self.headers["authorization"])
            number = len(self.server.seen)
        made = self.server.behave(text, number)
        if made == "hang":
            self.server.over.wait(30)
            return
        if isinstance(made, str):
            made = completion(made)
        status, headers, payload = made
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


def completion(text, **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | more
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    payload = {"id": "x", "object": "chat.completion", "created": 1, "model": "judge-2026-01", "choices": [choice]}
    payload |= {"system_fingerprint": "fp_1", "usage": usage}
    return 200, {"content-type": "application/json"}, json.dumps(payload).encode()


def jsonl(path, rows):
    write_jsonl(path, rows)
    return path


def answers(path, turns):
    """FastChat's form, from question -> texts of the turns."""
    about = {"model_id": path.stem}
    return jsonl(path, [about | {"question_id": q, "choices": [{"index": 0, "turns": t}]} for q, t in turns.items()])
