"""Time and memory of extraction and training against other implementations, and fault injection."""

import os


def quiet(**more: str) -> None:
    """Keep libraries from looking for the network and from drawing progress bars; set before they are imported."""
    names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    for name, value in {**dict.fromkeys(names, "1"), "TOKENIZERS_PARALLELISM": "false", **more}.items():
        os.environ.setdefault(name, value)
