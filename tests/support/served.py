"""A language model behind OpenAI's completions API on loopback, with exact log-probabilities of prompts."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class ServedModel(ThreadingHTTPServer):
    """Answers as servers do.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        form: "vllm" has `prompt_logprobs`, "echo" has `echo` and `logprobs`, "generated" gives log-probabilities of
            generated tokens alone, "bos" is vLLM that adds a token to each prompt.
        most: log-probabilities of a state, at most.
    """

    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any, form: str = "vllm", most: int = 20) -> None:
        self.model, self.tokenizer, self.form, self.most = model, tokenizer, form, most
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.answers = 10**9  # requests that are answered; the others are refused with status 503
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the status and the content of a reply."""
        if len(self.seen) > self.answers:
            return 503, {"error": {"message": "out of memory"}}
        ids, k = body["prompt"], body.get("prompt_logprobs")
        if self.form == "bos":
            ids = [self.tokenizer.eos_token_id, *ids]
        if k is not None and k > self.most:
            return 400, {"error": {"message": f"prompt logprobs of {k} are greater than max allowed: {self.most}"}}
        with torch.no_grad():
            logps = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
        if k is not None and self.form in ("vllm", "bos"):
            choice["prompt_logprobs"] = [None, *(self.entry(logps[t], ids[t + 1], k) for t in range(len(ids) - 1))]
            if body.get("return_token_ids"):
                choice["prompt_token_ids"] = ids
        elif body.get("echo") and self.form == "echo":
            choice["logprobs"] = {
                "tokens": [self.tokenizer.decode([token]) for token in [*ids, 0]],
                "token_logprobs": [None, *(float(logps[t, ids[t + 1]]) for t in range(len(ids) - 1)), -1.0],
            }
        elif body.get("logprobs") is not None:
            choice["logprobs"] = {"tokens": ["x"], "token_logprobs": [-1.0]}
        return 200, {"id": "1", "object": "text_completion", "created": 1, "model": "served", "choices": [choice]}

    def entry(self, logps: torch.Tensor, token: int, k: int) -> dict[str, Any]:
        """Return the log-probabilities of the token and of the k most likely ones, by their ids."""
        top = [token, *logps.topk(k).indices.tolist()]
        return {str(one): {"logprob": float(logps[one]), "rank": 1, "decoded_token": "x"} for one in top}


class _Handler(BaseHTTPRequestHandler):
    server: ServedModel

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.keys.add(self.headers["authorization"])
            status, content = self.server.answer(body)
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: Any) -> None:
        pass
