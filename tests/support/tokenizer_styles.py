"""Small fast tokenizers, trained here on a few sentences, with the chat templates of well-known model families."""

from dataclasses import dataclass
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Write a short poem about the sea.\n\nThe sea is wide, the sea is blue,\nand every wave is something new.",
    "def add(a, b):\n    return a + b\n\n# adds two numbers\nprint(add(1, 2))",
    "user\nHello there, how are you?\nassistant\nI am fine, thank you.\n\nsystem\nYou are a helpful assistant.\n",
    "Où est la gare ? Der schnelle Fuchs, 東京, привет, naïve café 🙂🙂",
]
# Llama 3's rule: a run of newlines is one piece, so the "\n\n" after its header does not depend on what follows.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Style:
    """A template, and its properties as the tests state them, independent of the code under test."""

    template: str
    end: str  # the end token, empty if the template writes none
    trailing: str  # what the template writes after it
    eos: str
    bos: str | None = None
    writes_bos: bool = False
    special: tuple[str, ...] = ()


def _turns(turn: str, generation: str, head: str = "", tail: str = "") -> str:
    return (
        f"{head}{{% for message in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{generation}{{% endif %}}{tail}"
    )


_CHATML = "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>"


def _chatml(turn: str, generation: str, trailing: str) -> Style:
    end = "<|im_end|>"
    return Style(_turns(turn, generation), end=end, trailing=trailing, eos=end, special=("<|im_start|>", end))


STYLES = {
    "llama3": Style(
        _turns(
            "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            head="{{ bos_token }}",
        ),
        end="<|eot_id|>",
        trailing="",
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        writes_bos=True,
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chatml": _chatml(_CHATML + "{{ '\n' }}", "<|im_start|>assistant{{ '\n' }}", trailing="\n"),
    "gemma": Style(
        _turns(
            "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
            "{{ message['content'] | trim }}<end_of_turn>{{ '\n' }}",
            "<start_of_turn>model{{ '\n' }}",
            head="{{ bos_token }}",
        ),
        end="<end_of_turn>",
        trailing="\n",
        eos="<eos>",
        bos="<bos>",
        writes_bos=True,
        special=("<start_of_turn>", "<end_of_turn>"),
    ),
    "zephyr": Style(
        _turns("<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}{{ '\n' }}", "<|assistant|>{{ '\n' }}"),
        end="</s>",
        trailing="\n",
        eos="</s>",
        bos="<s>",
    ),
    # Two special tokens after the answer: the first is the one the model stops at.
    "phi3": Style(
        _turns(
            "<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>{{ '\n' }}",
            "<|assistant|>{{ '\n' }}",
            tail="{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ),
        end="<|end|>",
        trailing="\n<|endoftext|>",
        eos="<|endoftext|>",
        special=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "chatml_bare": _chatml(_CHATML, "<|im_start|>assistant{{ '\n' }}", trailing=""),
    # The generation prompt opens a block that a finished conversation does not contain.
    "not_a_prefix": _chatml(_CHATML + "{{ '\n' }}", "<|im_start|>assistant\n<think>{{ '\n' }}", trailing="\n"),
    "no_end": Style(
        _turns("[{{ message['role'] }}]\n{{ message['content'] }}", "[assistant]{{ '\n' }}"),
        end="",
        trailing="",
        eos="</s>",
    ),
}


@cache
def make_tokenizer(style: str, *, pad: str | None = None, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. Where it has a BOS it adds it by default, so that a template's own BOS can double."""
    chosen = STYLES[style]
    special = list(dict.fromkeys([*(t for t in (chosen.bos, chosen.eos, pad) if t), *chosen.special]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    around = [chosen.bos or "", "$A", chosen.eos if adds_eos else ""]
    added = [token for token in (chosen.bos, chosen.eos) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in around if part),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in added],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chosen.bos,
        eos_token=chosen.eos,
        pad_token=pad or chosen.eos,
        extra_special_tokens=list(chosen.special),
        chat_template=chosen.template,
        clean_up_tokenization_spaces=False,
    )
