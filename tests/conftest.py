"""Small models, a tokenizer and pairs that every test can share. Nothing is downloaded."""

import gc
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from support.texts import sentence

pytest_plugins = ["support.report_pages"]

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def pytest_collection_finish():
    """Called in each process that runs tests. The one that hands them out imports no library, and starts sooner."""
    import torch

    torch.set_num_threads(1)  # tests run two at a time on two cores


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_not_collected():
    """Take what is imported by now out of later garbage collections.

    Every training of a `transformers.Trainer` begins with a full one. Over the objects of PyTorch, transformers and
    pytest it takes longer than the training of a tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    from prefdistill.models.scratch import train_tokenizer

    return train_tokenizer([sentence(20, k) for k in range(50)], vocab_size=320)


@pytest.fixture(scope="session")
def pairs():
    """24 conversations with responses of many lengths."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": sentence(2 + i % 5, i)}],
                "chosen": [{"role": "assistant", "content": sentence(1 + i % 9, i + 1)}],
                "rejected": [{"role": "assistant", "content": sentence(1 + (i * 5) % 11, i + 2)}],
                "score_chosen": 1.0 + i % 3,
                "score_rejected": float(i % 2),
            }
            for i in range(24)
        ]
    )


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A random Llama over the tokenizer's vocabulary, with weights large enough that log-probs differ."""
    import torch

    from prefdistill.models.scratch import random_model

    def make(seed: int = 0, scale: float = 8.0, **shape):
        model = random_model(tokenizer, SHAPE | shape, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(scale)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real preference pairs; tests that need them skip where they are not."""
    path = Path(os.environ.get("PREFDISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (path / "alpacaeval_pairs").is_dir():
        pytest.skip(f"no real data at {path} (set PREFDISTILL_DATA to the directory that holds alpacaeval_pairs)")
    return path


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Make the test's empty directory the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def workdir(in_tmp_path, make_model, tokenizer, pairs):
    """The working directory, with eight pairs in `pairs.jsonl` and a tiny model with its tokenizer in `model`."""
    from support.pairs import write_jsonl

    write_jsonl(in_tmp_path / "pairs.jsonl", pairs.select(range(8)).select_columns(["prompt", "chosen", "rejected"]))
    make_model(num_hidden_layers=1).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return in_tmp_path


@pytest.fixture
def judge(monkeypatch):
    """Starts servers; no proxy and no key of the machine's comes between."""
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    for name in (*proxies, *map(str.upper, proxies), "PREFDISTILL_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    from support.judges import Judge

    started = []

    def start(behave):
        started.append(Judge(behave))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray cluster with room for two workers of one thread."""
    ray = pytest.importorskip("ray", reason="workers run on a Ray cluster (extra ray)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers import what the tests import
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, as the system has it: nothing is downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pages are tested with playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("PREFDISTILL_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium to test pages in (install it, or set PREFDISTILL_CHROMIUM to its path)")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens a file in a new window; in the end none has had an error, a dialog, or asked for anything but its file."""
    contexts, troubles = [], []

    def open_(path: Path, fragment: str = "", **options):
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        url = path.resolve().as_uri()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.split("#")[0] == url else troubles.append(f"request: {r.url[:200]}"))
        page.goto(url + fragment)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []
