"""Tokenizers of every family, small and trained here, whose tokens end at other places of a text."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from support.tokenizer_styles import PIECES

TEXTS = [
    "What is the capital of France? The capital of France is Paris.\n\nIt is on the Seine.",
    "def add(a, b):\n    return a + b\n\n# adds two numbers\nprint(add(1, 2))\r\n\tprint(3)",
    "Où est la gare ? Der schnelle Fuchs, 東京は日本の首都です。 привет мир, naïve café, नमस्ते दुनिया, שלום עולם",
    "🙂🙂 👩‍👩‍👧‍👦 👍🏽 🇫🇷 e\u0301 o\u0308 한국어 각 the sea is wide and the sea is blue",
]
THINKING = "<think>\n\n</think>\n\n"
CLOSED = "-</think>\n\n"
TEMPLATES = {
    "chatml": "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}",
    # writes BOS, strips the text, and ends it with a newline before its end token
    "trims": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]:\n{{ m.content | trim }}\n<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]:\n{% endif %}",
    # writes an empty thinking block before each response
    "thinks": "{% for m in messages %}<s>{{ m.role }}\n{{ 'THINKING' if m.role == 'assistant' else '' }}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}".replace(
        "THINKING", THINKING
    ),
    # opens a thinking block in the generation prompt, and closes it before each response
    "opens": "{% for m in messages %}<s>{{ m.role }}\n{{ '<think>\nCLOSED' if m.role == 'assistant' else '' }}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}".replace(
        "CLOSED", CLOSED
    ),
    # drops what is after the last newline of a response, if that is nothing
    "drops_newline": "{% for m in messages %}<s>{{ m.role }}>{{ m.content.removesuffix('\n') }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant>{% endif %}",
    "no_end": "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}",
}
SPECIAL = ["<unk>", "<bos>", "<s>", "</s>", "<end>"]
BYTES = pre_tokenizers.ByteLevel.alphabet()
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(pattern: str | None, *, trim: bool = False, prefix: bool = False, split: bool = True, size: int = 420):
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split and pattern is None)
    pieces = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer, trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=BYTES, show_progress=False
    )


def _metaspace(kind: str, *, scheme: str = "always", nfkc: bool = False):
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>", fuse_unk=True))
    if nfkc:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
    strip = [decoders.Strip(" ", 1, 0)] if scheme != "never" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    options = {"vocab_size": 520, "special_tokens": [*SPECIAL, *BYTE_TOKENS], "show_progress": False}
    if kind == "unigram":
        return tokenizer, trainers.UnigramTrainer(unk_token="<unk>", **options)
    return tokenizer, trainers.BpeTrainer(limit_alphabet=40, **options)


def _gemma():
    """BPE with byte fallback, spaces as U+2581, no prefix."""
    tokenizer, trainer = _metaspace("bpe", scheme="never")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer, trainer


def _wordpiece(*, lower: bool):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)


def _characters():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)


def _nfc():
    tokenizer, trainer = _byte_level(PIECES)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer, trainer


ZOO: dict[str, Callable] = {
    "gpt2": lambda: _byte_level(None),
    "llama3": lambda: _byte_level(PIECES),
    "bytes": lambda: _byte_level(PIECES, size=len(SPECIAL) + 256),
    # tokens reach over spaces and end inside characters
    "unsplit": lambda: _byte_level(None, split=False, size=700),
    "neox": lambda: _byte_level(None, trim=True),  # reports tokens without the spaces around them
    "neox_unsplit": lambda: _byte_level(None, trim=True, split=False, size=700),
    "roberta": lambda: _byte_level(None, trim=True, prefix=True),
    "nfc": _nfc,
    "t5": lambda: _metaspace("unigram", nfkc=True),
    "unigram": lambda: _metaspace("unigram", scheme="never"),
    "llama2": lambda: _metaspace("bpe", scheme="first"),
    "gemma": _gemma,
    "wordpiece": lambda: _wordpiece(lower=True),
    "cased_wordpiece": lambda: _wordpiece(lower=False),
    "characters": _characters,
    "strips_around_special": lambda: _byte_level(PIECES),
}


@cache
def _rules(family: str, texts: tuple[str, ...]) -> str:
    """Train a tokenizer; unigram training has other results each time."""
    tokenizer, trainer = ZOO[family]()
    more = [a + b for a in "東京日本の首都" for b in "東京日本の首都です"] if "unsplit" in family else []
    tokenizer.train_from_iterator([*texts] * 3 + more, trainer)
    if family == "strips_around_special":
        tokenizer.add_special_tokens([AddedToken(token, lstrip=True, rstrip=True) for token in ("</s>", "<mask>")])
    rules = json.loads(tokenizer.to_str())
    if BYTE_TOKENS[0] in str(rules["model"]["vocab"]):
        rules["model"]["byte_fallback"] = True
        rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] in SPECIAL]
    return json.dumps(rules)


def make_tokenizer(
    family: str, template: str | None = "chatml", texts: tuple[str, ...] = tuple(TEXTS)
) -> PreTrainedTokenizerFast:
    """A tokenizer of a family with one of `TEMPLATES`, trained on texts."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_rules(family, texts)),
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<s>", "<end>"],
        chat_template=TEMPLATES[template] if template else None,
        clean_up_tokenization_spaces=False,
    )
