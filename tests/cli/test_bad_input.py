"""Whatever is wrong with what a verb is given: a line or two, status 2, no traceback, and nothing written."""

import subprocess
import sys

import datasets
import pytest

import support.bad_inputs as bad_inputs
from prefdistill.cli import main

MODEL, PAIRS, OUT = ["--model", "model"], ["--data", "pairs.jsonl"], ["--out", "out"]
FAST = ["max_steps=1", "batch_size=2", "micro_batch_size=2"]
SIGNALS = ["signals", *MODEL, *OUT, *PAIRS]
ALL = ["batch_size=2", "micro_batch_size=2"]  # an epoch, so that every row is seen
URL = ["--url", "http://127.0.0.1:9/v1", "--judge-model", "j"]


def on(data):
    """Signals of a file."""
    return ["signals", *MODEL, *OUT, "--data", data]


def sft(data, model="model", *more):
    return ["sft", "--model", model, "--data", data, *OUT, *ALL, *more]


def dpo(data, model="model", *more):
    return ["dpo", "--model", model, "--data", data, *OUT, *ALL, *more]


def sample(data, model="model", *more):
    return ["sample", "--model", model, "--data", data, "--out", "o.jsonl", "--max-new-tokens", "2", *more]


def distill(*more, method="dpo", data="pairs.jsonl", stores=("reference",), student="model", out="out"):
    given = [part for store in stores for part in ("--signals", store)]
    return ["distill", "--student", student, "--data", data, "--method", method, *given, "--out", out, *ALL, *more]


def tvkd(*more, stores=("teacher", "reference")):
    return distill(*more, method="tvkd", stores=stores)


def dckd(student, store, data):
    return distill(method="dckd", student=student, stores=(store,), data=data)


def evaluate(*more, data="pairs.jsonl", model="model"):
    return ["evaluate", "--model", model, "--data", data, "--out", "e.json", *more]


def inspect(*more, data="pairs.jsonl", out="t.html"):
    return ["inspect", "--data", data, "--out", out, *more]


def run(*more, recipe="recipe.yaml"):
    return ["run", recipe, *OUT, *more]


def study(*more, file="study.yaml"):
    return ["study", file, *OUT, *more]


def answers(questions, *more, model="model"):
    return ["judge", "answers", "--model", model, "--out", "a.jsonl", "--questions", questions, *more]


def mt_bench(*more, **files):
    names = {"answers": "answers", "questions": "questions", "prompts": "prompts", "references": "answers"} | files
    return ["judge", "mt-bench", *URL, *OUT, *(p for k, v in names.items() for p in (f"--{k}", f"{v}.jsonl")), *more]


def alpaca(ours="outputs", theirs="outputs", prompt="prompt.txt", *more):
    files = ["--answers", f"{ours}.jsonl", "--against", f"{theirs}.jsonl", "--prompt", prompt]
    return ["judge", "alpaca-eval", *URL, *OUT, *files, *more]


BAD = [
    # data: for every verb that reads them, through every one of its readers
    (on(""), "the name of the data is empty"),
    (on("nowhere.jsonl"), "nowhere.jsonl: no such file or directory. Give a .jsonl"),
    (on("nowhere/at-all"), "nowhere/at-all: no such file or directory, and loading it from the Hub failed"),
    (on("pairs.jsonl#test"), "pairs.jsonl: a file has no splits. Leave out '#test'"),
    (on("empty.jsonl"), "empty.jsonl: there are no rows in it"),
    (on("blank.jsonl"), "blank.jsonl: there are no rows in it"),
    (on("broken.jsonl"), "broken.jsonl, line 3: not valid JSON (column"),
    (on("latin.jsonl"), "latin.jsonl, line 1: not valid JSON ('utf-8' codec can't decode"),
    (on("deep.jsonl"), "deep.jsonl: cannot be read"),
    (on("digits.jsonl"), "digits.jsonl, line 1: not valid JSON"),
    (on("list.jsonl"), "list.jsonl, line 1: a line must be a JSON object, not [1, 2]"),
    (on("columns.jsonl"), "columns.jsonl: no column 'chosen', 'rejected'; it has 'question', 'answer'"),
    (on("nulls.jsonl"), "nulls.jsonl, row 0: 'chosen' must be text or a list of messages"),
    (on("one-null.jsonl"), "one-null.jsonl, row 4: 'rejected' must be text or a list of messages"),
    (on("numbers.jsonl"), "numbers.jsonl, row 0: 'chosen' must be text or a list of messages"),
    (on("no-messages.jsonl"), "no-messages.jsonl, row 1: 'chosen' must be text or a list of messages"),
    (on("no-content.jsonl"), "no-content.jsonl, row 0: 'chosen' must be text or a list of messages"),
    (on("roles.jsonl"), "roles.jsonl, row 1: 'rejected' has a message with the role 'user'"),
    (on("steering.jsonl"), "row 0: 'rejected' has a message with the role 'user\\x1b]0;owned\\x07'"),
    (on("a" * 300), "aaa...: the name is too long; give a shorter one"),
    (on("\udcff.jsonl"), "'\\udcff.jsonl' is not valid UTF-8"),
    (on("answered.jsonl"), "answered.jsonl, row 0: the prompt ends with an assistant message"),
    (on("scores.jsonl"), "scores.jsonl: column 'score_chosen' must hold numbers, it holds string"),
    (on("scores-mixed.jsonl"), "scores-mixed.jsonl: column 'score_chosen' must hold numbers, it holds values of sev"),
    (on("ended.jsonl"), "ended.jsonl: column 'chosen_ended' must hold true or false"),
    (on("ended-mixed.jsonl"), "ended-mixed.jsonl: column 'chosen_ended' must hold true or false, it holds values of"),
    (on("apart.jsonl"), "apart.jsonl, row 0: 'chosen' and 'rejected' do not start alike"),
    (on("mixed.jsonl"), "mixed.jsonl: row 2 ('prompt') is plain text and row 0 ('prompt') is a list of messages"),
    (on("data.tsv"), "data.tsv: unknown file type. Give a .jsonl"),
    (on("broken.parquet"), "broken.parquet: not a readable Parquet file"),
    (on("rowless.parquet"), "rowless.parquet: there are no rows in it"),
    (on("twice.parquet"), "twice.parquet: there are two columns 'chosen'. Rename or drop one of them"),
    (on("surrogate.jsonl"), "surrogate.jsonl, row 1: it holds an unpaired surrogate"),
    (on("text.jsonl.gz"), "text.jsonl.gz: cannot be read"),
    (on("cut.jsonl.gz"), "cut.jsonl.gz: cannot be read"),
    (on("unreadable.jsonl"), "unreadable.jsonl: cannot be read"),
    (on("empty"), "empty: no split 'train' could be loaded from this directory"),
    (on("full"), "full: no split 'train' could be loaded from this directory"),
    (sft("nulls.jsonl"), "nulls.jsonl, row 0: 'completion' must be text"),
    (sft("messages.jsonl"), "messages.jsonl, row 0: 'messages' must be a prompt and then an assistant message"),
    (sft("messages-text.jsonl"), "messages-text.jsonl, row 0: 'messages' must be a list of messages, not 'a'"),
    (sft("mixed.jsonl"), "row 2 ('prompt') is plain text"),
    (sft("unreadable.jsonl"), "unreadable.jsonl: cannot be read"),
    (sft("empty"), "empty: no split 'train'"),
    (dpo("nulls.jsonl"), "nulls.jsonl, row 0: 'chosen'"),
    (dpo("mixed.jsonl"), "row 2 ('prompt') is plain text"),
    (dpo("empty"), "empty: no split 'train'"),
    (sft("long.jsonl"), "dropped 6 rows: the prompt leaves no room for a response within max_length (6, first row 0)"),
    (dpo("long.jsonl"), "dropped 6 rows: the prompt leaves no room for a response within max_length (6, first row 0)"),
    (sample("broken.jsonl"), "broken.jsonl, line 3: not valid JSON"),
    (sample("mixed.jsonl"), "row 2 ('prompt') is plain text"),
    (sample("messages.jsonl"), "messages.jsonl, row 0: 'messages' must be a prompt and then"),
    (sample("empty"), "empty: no split 'train'"),
    (distill(data="nulls.jsonl"), "nulls.jsonl, row 0: 'chosen'"),
    (distill(data="mixed.jsonl"), "row 2 ('prompt') is plain text"),
    (evaluate("--generate", data="mixed.jsonl"), "row 2 ('prompt') is plain text"),
    (evaluate("--generations", "broken.jsonl"), "broken.jsonl, line 3: not valid JSON"),
    (evaluate("--generations", "empty"), "empty: no split 'train'"),
    (
        evaluate("--generations", "pairs.jsonl"),
        "the responses have no column 'response'; their columns: prompt, chosen",
    ),
    (evaluate("--generations", "wordless.jsonl"), "row 0 of the responses has no response: 'response' must be text"),
    (evaluate("--generations", "responses.jsonl", data="others.jsonl"), "6 prompts of the responses are not in"),
    (inspect("--signals", "teacher", data="broken.jsonl"), "broken.jsonl, line 3: not valid JSON"),
    (run("data.train=nulls.jsonl"), "nulls.jsonl, row 0: 'chosen'"),
    (run("data.train=mixed.jsonl"), "row 2 ('prompt') is plain text"),
    (study("data.train=nulls.jsonl"), "cell 'beta=0.1': nulls.jsonl, row 0: 'chosen'"),
    # models and tokenizers
    (["signals", "--model", "headless", *PAIRS, *OUT], "1 weights are missing, the first is lm_head.weight"),
    (["signals", "--model", "classifier", *PAIRS, *OUT], "1 weights are missing, the first is lm_head.weight"),
    (["signals", "--model", "no-template", *PAIRS, *OUT], "conversations but the tokenizer has no chat template"),
    (["signals", "--model", "bad-template", *PAIRS, *OUT], "The chat template refuses a user and an assistant message"),
    (["signals", "--model", "no-end", *PAIRS, *OUT], "the tokenizer of no-end has no end token (eos_token)"),
    (["signals", "--model", "no-config", *PAIRS, *OUT], "no-config exists but holds no tokenizer"),
    (["signals", "--model", "no-weights", *PAIRS, *OUT], "no-weights exists but holds no model"),
    (["signals", "--model", "cut-weights", *PAIRS, *OUT], "cut-weights exists but holds no model"),
    (["signals", "--model", "odd-type", *PAIRS, *OUT], "model type `gpt-17`"),
    (["signals", "--model", "few-rows", *PAIRS, *OUT], "embedding rows; use the tokenizer it was trained with"),
    (sft("pairs.jsonl", "few-rows"), "embedding rows; use the tokenizer it was trained with"),
    (dpo("pairs.jsonl", "few-rows"), "embedding rows; use the tokenizer it was trained with"),
    (sample("pairs.jsonl", "few-rows"), "embedding rows; use the tokenizer it was trained with"),
    (distill(student="few-rows", stores=(), method="sft"), "embedding rows; use the tokenizer it was trained with"),
    (["signals", "--model", "other-shape", *PAIRS, *OUT], "weights do not fit, the first is model."),
    (
        ["signals", "--model", "other-config", *PAIRS, *OUT],
        "Validation error for field 'hidden_size': TypeError: Field",
    ),
    (["signals", "--model", "config-list", *PAIRS, *OUT], "config-list exists but holds no tokenizer"),
    (["signals", "--model", "tokenizer-list", *PAIRS, *OUT], "tokenizer-list exists but holds no tokenizer"),
    (["signals", "--model", "tokenizer-empty", *PAIRS, *OUT], "tokenizer-empty exists but holds no tokenizer"),
    (["signals", "--model", "generation-list", *PAIRS, *OUT], "generation-list exists but holds no model"),
    (["signals", "--model", "index-away", *PAIRS, *OUT], "index-away exists but holds no model"),
    (["signals", "--model", "pickled", *PAIRS, *OUT], "pickled exists but holds no model"),
    (["signals", "--model", "adapter-list", *PAIRS, *OUT], "adapter_config.json names no base model"),
    (["signals", "--model", "adapter-type", *PAIRS, *OUT], "adapter-type exists but holds no model"),
    (["signals", "--model", "dividing-template", *PAIRS, *OUT], "(ZeroDivisionError: division by zero). Fix it"),
    (
        sample("pairs.jsonl", "dividing-template"),
        "The chat template refuses a user and an assistant message (ZeroDivisionErr",
    ),
    (sft("pairs.jsonl", "other-shape"), "weights do not fit, the first is model."),
    (evaluate("--generate", "--reward-model", ""), "no reward model at ''"),
    (inspect("--signals", "teacher", "--tokenizer", ""), "no tokenizer at ''"),
    ([*SIGNALS, "--dtype", ""], "dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got ''"),
    (["signals", "--model", "full", *PAIRS, *OUT], "full exists but holds no tokenizer"),
    (["signals", "--model", "pairs.jsonl", *PAIRS, *OUT], "pairs.jsonl exists but holds no tokenizer"),
    (["signals", "--model", "no/such", *PAIRS, *OUT], "no tokenizer at 'no/such'"),
    (sft("pairs.jsonl", "headless"), "1 weights are missing, the first is lm_head.weight"),
    (sft("pairs.jsonl", "no-template"), "conversations but the tokenizer has no chat template"),
    (sft("pairs.jsonl", "bad-template"), "The chat template refuses"),
    (dpo("pairs.jsonl", "headless"), "1 weights are missing, the first is lm_head.weight"),
    (dpo("pairs.jsonl", "no-template"), "conversations but the tokenizer has no chat template"),
    (dpo("pairs.jsonl", "bad-template"), "The chat template refuses"),
    (sample("pairs.jsonl", "headless"), "1 weights are missing"),
    (sample("pairs.jsonl", "no-template"), "conversations but the tokenizer has no chat template"),
    (distill(student="headless"), "1 weights are missing"),
    (distill(student="no-template", method="simpo", stores=()), "the tokenizer has no chat template"),
    (distill(student="no-template"), "made with another tokenizer"),
    (evaluate("--reference", "reference", model="headless"), "1 weights are missing"),
    (evaluate("--reward-model", "classifier"), "classifier has 2 labels; a reward model has one"),
    (run("model.student=headless", "teacher.dpo.max_steps=1"), "1 weights are missing"),  # before the teacher's
    (run("model.teacher=cut-weights"), "cut-weights exists but holds no model"),
    (study("model.student=headless"), "cell 'beta=0.1': headless exists but holds no model"),
    (
        run("model.student=other", "methods.dckd={}"),
        "dckd needs teacher.topk of chosen, rejected, but model has other tokens than the student",
    ),
    (run("model.teacher_tokenizer=other"), "other and model have different tokenizers"),
    (
        run("model.student=no-template", "model.teacher=other"),
        "no-template has no chat template; name one as model.chat",
    ),
    (
        run("model.teacher=no-template", "model.student=other", "methods.tvkd={}"),
        "name one as model.teacher_chat_templ",
    ),
    (run("model.teacher_tokenizer=nowhere"), "no tokenizer at 'nowhere'"),
    (answers("questions.jsonl", model="headless"), "1 weights are missing"),
    # logits that are not numbers: which row, and what to try
    (["signals", "--model", "nan", "--data", "poisoned.jsonl", *OUT], "not finite in 1 pairs, the first is row 3"),
    (["signals", "--model", "infinite", *PAIRS, *OUT], "not finite in 6 pairs, the first is row 0"),
    (evaluate("--reference", "reference-poisoned", data="poisoned.jsonl", model="nan"), "the first is row 3"),
    (sample("pairs.jsonl", "infinite"), "not finite after the prompt of row"),
    (sample("pairs.jsonl", "infinite", "--temperature", "0"), "not finite after the prompt of row"),
    (sample("questions-poisoned.jsonl", "nan"), "logits are not finite after the prompt of row 2 of the data"),
    (evaluate("--generate", model="infinite"), "not finite after the prompt of row"),
    (answers("questions.jsonl", model="infinite"), "not finite after the prompt of row 0"),
    (dckd("nan", "topk-poisoned", "poisoned.jsonl"), "rows [3, 0] of the data: try a"),
    (dckd("infinite", "topk", "pairs.jsonl"), "the loss is nan at step 1, rows ["),
    (distill(student="nan", data="poisoned.jsonl", stores=(), method="simpo"), "the loss is nan at step 2, rows ["),
    (
        distill(student="nan", data="poisoned.jsonl", stores=(), method="wpo"),
        "not finite in 1 pairs, the first is row 3",
    ),
    (sft("infinite-rows.jsonl", "infinite"), "the loss is nan at step 1, in the batch with '"),
    (dpo("poisoned.jsonl", "nan"), "the loss is nan at step 2, in the batch with '"),
    # options out of their range
    ([*SIGNALS, "--k", "-1"], "--k must be greater than 0 or 'vocab', got '-1'"),
    ([*SIGNALS, "--kind", "topk", "--k", "0"], "--k must be greater than 0 or 'vocab', got '0'"),
    ([*SIGNALS, "--k", "3"], "k and p apply to the kind topk"),
    ([*SIGNALS, "--kind", "topk", "--p", "2"], "--p must be less than or equal to 1, got '2'"),
    ([*SIGNALS, "--kind", "logprob_values"], "logprob_values at value_temperature 1 is 0 everywhere"),
    (
        [*SIGNALS, "--role", "techer"],
        "role must be 'teacher', 'teacher_reference', 'reference' or 'student', got",
    ),
    ([*SIGNALS, "--responses", ""], "--responses is empty"),
    ([*SIGNALS, "--responses", "nope"], "pairs.jsonl: no column 'nope'"),
    ([*SIGNALS, "--value-temperature", "nan"], "--value-temperature must be a finite number, got 'nan'"),
    ([*SIGNALS, "--positions", "some"], "--positions must be 'all' or 'endpoints', got 'some'"),
    ([*SIGNALS, "--positions", "endpoints"], "positions=endpoints stores values alone, not logps"),
    ([*SIGNALS, "--topk-coding", "float32"], "topk_coding applies to the kind topk"),
    ([*SIGNALS, "--ids-from", "topk"], "ids_from applies to the kind topk"),
    ([*SIGNALS, "--kind", "topk", "--ids-from", "topk"], "ids_from must be a teacher's store"),
    ([*SIGNALS, "--dtype", "int8"], "dtype must be 'auto', 'float32'"),
    ([*SIGNALS, "--quantization", "3bit"], "quantization must be '4bit' or '8bit', got '3bit'"),
    ([*SIGNALS, "--max-length", "2"], "No row is left: dropped 6 rows: the prompt leaves no room for a response"),
    ([*SIGNALS, "--max-length", "9", "--max-prompt-length", "9"], "max_prompt_length (9) leaves no room"),
    (evaluate("--generate", "--temperature", "-1"), "--temperature must be greater than or equal to 0"),
    (evaluate("--generate", "--max-new-tokens", "0"), "--max-new-tokens must be greater than 0"),
    (inspect("--signals", "teacher", "--discount", "2"), "--discount must be less than or equal to 1"),
    (inspect("--signals", "teacher", "--terminal", "first"), "--terminal must be 'last', 'bootstrap' or 'zero', got"),
    (inspect("--signals", "teacher", "--alpha", "nan"), "--alpha must be a finite number, got 'nan'"),
    (answers("questions.jsonl", "--max-length", "3"), "No prompt is left"),
    # methods and training
    (distill(method="tvdk"), "unknown method 'tvdk'; did you mean 'tvkd'?"),
    (tvkd("alpha=much"), "tvkd: alpha must be a number, got 'much'"),
    (tvkd("alpha=.nan"), "tvkd: alpha must be a finite number, got nan"),
    (tvkd("discount=2"), "tvkd: discount must lie in 0..1, got 2"),
    (tvkd("beta=-1"), "tvkd: beta must be positive, got -1"),
    (tvkd("terminal=first"), "tvkd: terminal must be 'last', 'bootstrap' or 'zero', got 'first'"),
    (tvkd("potential=reward"), "TVKD lacks data.score_chosen; data.score_rejected"),
    (tvkd("k=3"), "command line: unknown key 'k'; known there: learning_rate"),
    (distill("learning_rate=fast"), "command line: learning_rate must be a valid number, got 'fast'"),
    (distill("max_steps=0"), "command line: max_steps must be greater than 0, got 0"),
    (distill("lora={r: -1}"), "command line: lora.r must be greater than 0, got -1"),
    (distill("lora.target_modules=[nope]"), "the trainer cannot be made: Target modules {'nope'} not found"),
    (distill("report_to=[nobody]"), "training arguments: nobody is not supported"),
    (dpo("pairs.jsonl", "model", "lora.target_modules=[nope]"), "the trainer cannot be made: Target modules"),
    (distill("report_to=nobody"), "training arguments: nobody is not supported"),
    (dpo("pairs.jsonl", "model", "lora.target_modules=[q_proj,lm_head]"), "TRL's losses use the weight of lm_head"),
    (dpo("pairs.jsonl", "model", "report_to=nobody"), "training arguments: nobody is not supported"),
    (run("training.report_to=nobody"), "training arguments: nobody is not supported"),
    (distill("epochs=0.25", "arguments.num_train_epochs=3"), "arguments.num_train_epochs is set by epochs; leave it"),
    (dpo("pairs.jsonl", "model", "arguments.packing=true"), "arguments.packing has no effect: batch_size counts rows"),
    (distill("schedule=sideways"), "training arguments: sideways is not a valid SchedulerType"),
    (distill("arguments.nonsense=1"), "training arguments: "),
    (distill("arguments.adam_beta1=7"), "training arguments: Invalid beta parameter at index 0: 7"),
    (run("methods.dpo.training.arguments.adam_beta1=7"), "training arguments: Invalid beta parameter at index 0: 7"),
    (distill("arguments.resume_from_checkpoint=x"), "arguments.resume_from_checkpoint has no effect"),
    (distill("arguments.save_total_limit=0"), "arguments.save_total_limit=0: at least one checkpoint is kept"),
    (distill("arguments.save_only_model=true"), "arguments.save_only_model: a run cannot resume from such a checkpo"),
    (distill("arguments.hub_token=hf_secret"), "arguments.hub_token would be in the results; set HF_TOKEN"),
    (distill("=1"), "'=1' is not an override; write key=value"),
    (distill("epochs=[1"), "epochs: '[1' is not a YAML value"),
    # signals that do not fit
    (distill(stores=()), "DPO lacks reference.logps of chosen, rejected. Make it with `prefdistill signals"),
    (distill(stores=("reference", "reference")), "two signal stores have reference.logps of chosen"),
    (distill(stores=("reference-others",)), "the reference signals were made from other data ("),
    (distill(stores=("reference-tokens",)), "the reference signals were made with another tokenizer ("),
    (
        tvkd(stores=("teacher", "reference-short")),
        "differ in truncation.max_length (1024, 24)",
    ),
    (distill("--max-length", "9"), "the reference signals were made with Truncation(max_length=1024"),
    (tvkd("discount=0.9", stores=("endpoints", "reference")), "have positions=endpoints, the method needs all"),
    (tvkd("terminal=bootstrap", stores=("endpoints", "reference")), "have positions=endpoints, the method needs all"),
    (tvkd(stores=("warm", "reference")), "the teacher signals (values) have value_temperature=2.0"),
    (distill(method="vanillakd", stores=("teacher",)), "VanillaKD lacks teacher.topk of chosen"),
    (distill(method="adpa", stores=("topk",)), "pairs.jsonl: no column 'student_response'"),
    (distill(stores=("damaged",)), "damaged/shards/00000.parquet"),
    (distill(stores=("gone",)), "gone/shards/00000.parquet"),
    (distill(stores=("no-schema",)), "no-schema/manifest.json is not a signal manifest of schema"),
    (distill(stores=("no-json",)), "no-json/manifest.json is damaged (its checksum differs)"),
    (distill(stores=("unfinished",)), "unfinished"),
    (distill(stores=("pairs.jsonl",)), "no signals in pairs.jsonl: extract them with `prefdistill signals"),
    (distill(student="other"), "the reference signals were made with another tokenizer"),
    (distill(student="nan"), "the reference signals were made from another model ("),
    (dckd("other", "topk", "pairs.jsonl"), "are of other tokens than the student's"),
    (evaluate("--reference", "teacher"), "evaluation needs the reference's logps"),
    (evaluate("--reference", "reference", data="others.jsonl"), "the reference signals were made from other data"),
    (evaluate("--reference", "reference-tokens"), "the reference signals were made with another tokenizer"),
    (evaluate("--reference", "reference-others", "--generate"), "the reference signals were made from other data"),
    (evaluate("--reference", "teacher", "--generate"), "evaluation needs the reference's logps"),
    (evaluate("--reference", "reference-tokens", "--generate"), "signals were made with another tokenizer"),
    (evaluate("--reference", "damaged"), "damaged/shards/00000.parquet"),
    (evaluate("--reference", "nowhere", "--generate"), "no signals in nowhere: extract them with"),
    (inspect("--signals", "nowhere"), "no signals in nowhere: extract them with"),
    (inspect("--signals", "teacher", data="others.jsonl"), "the teacher signals were made from other data"),
    (inspect("--signals", "reference", "--tokenizer", "other"), "the reference signals were made with another tokeniz"),
    (inspect("--signals", "teacher", "--signals", "teacher"), "two signal stores have teacher."),
    # places that hold other work, or cannot be
    ([*SIGNALS, "--out", "full"], "full is not empty and was not made by prefdistill; give another --out"),
    ([*SIGNALS, "--out", "reference"], "reference holds work of another request (kinds is"),
    ([*SIGNALS, "--out", "pairs.jsonl/x"], "pairs.jsonl/x cannot be written, because"),
    (distill(out="full"), "full is not empty and was not made by prefdistill; give another --out"),
    (distill(out="model"), "model is not empty and was not made by prefdistill; give another --out"),
    (distill(out="pairs.jsonl/x"), "cannot make the directory pairs.jsonl/x"),
    (evaluate("--reference", "reference", "--out", "full"), "full is a directory; --out names the file"),
    (evaluate("--reference", "reference", "--out", "pairs.jsonl/e.json"), "pairs.jsonl/e.json cannot be written"),
    (inspect("--signals", "teacher", out="full"), "full is a directory; --out names the file"),
    (inspect("--signals", "teacher", out="pairs.jsonl/t.html"), "pairs.jsonl/t.html cannot be written, because"),
    # files that are the user's, most of all what is read
    (evaluate("--generate", "--out", "pairs.jsonl"), "pairs.jsonl was not made by `prefdistill evaluate`"),
    (evaluate("--generate", "--out", "model/config.json"), "model/config.json was not made by"),
    (evaluate("--generations", "responses.jsonl", "--out", "responses.jsonl"), "responses.jsonl was not made"),
    (inspect("--signals", "teacher", out="pairs.jsonl"), "pairs.jsonl was not made by `prefdistill inspe"),
    (inspect("--signals", "teacher", out="teacher/manifest.json"), "teacher/manifest.json was not made"),
    (inspect("--signals", "teacher", out=""), "--out is empty; give a value"),
    (
        inspect("--signals", "reference", "--tokenizer", "other", "--max-pairs", "1"),
        "extract them again with `prefdistill signals --tokenizer other`",
    ),
    (["report", "run-good", "--out", "pairs.jsonl", "--format", "html"], "pairs.jsonl was not made by"),
    (
        ["report", "run-good", "--out", "run-good/results.json", "--format", "md"],
        "run-good/results.json was not made by",
    ),
    (["report", "run-good", "--out", "pairs.jsonl"], "pairs.jsonl: unknown file type"),
    (["report", "run-good", "--out", "pairs.jsonl", "--format", "md"], "pairs.jsonl was not made by"),
    (["report", "run-good", "--out", ""], "--out is empty; give a value"),
    (["report", "run-good", "--out="], "--out is empty"),
    (["report", "run-good", "--out", "r.pdf"], "r.pdf: unknown file type. Give --out a name that ends in .html or .md"),
    (["report", "full", "--out", "r.html"], "full holds no results.json of a run: name a directory that `prefdistill"),
    (run("--out", ""), "--out is empty; give a value"),
    ([*SIGNALS, "--out", ""], "--out is empty; give a value"),
    (run("--out", "."), ". is not empty and was not made by `prefdistill run`; give another --out"),
    (["report", "run-good", "--out", "full"], "full"),
    (run("--out", "full"), "full is not empty and was not made by `prefdistill run`; give another --out"),
    (run("--out", "pairs.jsonl"), "cannot make the directory pairs.jsonl"),
    (["quickstart", "--out", "full"], "full is not empty and was not made by `prefdistill run`"),
    (study("--out", "full"), "full is not empty and was not made by `prefdistill study`"),
    (study("--stages", "pairs.jsonl"), "is a file; give another --stages"),
    (["judge", "answers", *MODEL, "--questions", "questions.jsonl", "--out", "pairs.jsonl"], "is not as `prefdistill"),
    (["judge", "answers", *MODEL, "--questions", "questions.jsonl", "--out", "a.txt"], "that ends in .jsonl"),
    # recipes
    (run(recipe="itself.yaml"), "itself.yaml: extends goes in a circle (itself.yaml -> itself.yaml)"),
    (run(recipe="round.yaml"), "trip.yaml: extends goes in a circle (round.yaml -> trip.yaml -> round.yaml); take"),
    (run(recipe="above.yaml"), "no recipe at nowhere.yaml"),
    (run(recipe="number.yaml"), "number.yaml: extends must name another recipe file, got 3"),
    (run(recipe="tab.yaml"), "tab.yaml is not valid YAML: found character '\\t' that cannot start any token (line 2"),
    (run(recipe="list.yaml"), "list.yaml is not a recipe: it must be a mapping"),
    (run(recipe="nothing.yaml"), "nothing.yaml is not a recipe: it must be a mapping"),
    (run(recipe="tagged.yaml"), "tagged.yaml is not valid YAML: could not determine a constructor"),
    (run(recipe="key-twice.yaml"), 'key-twice.yaml is not valid YAML: found duplicate key "dpo"'),
    (run(recipe="half.yaml"), "half.yaml is not valid YAML: 'a \\ud800' holds half a surrogate pair"),
    (run("seeds=010"), "seeds: '010' is not a YAML value: 010 is not a plain number; quote it"),
    (run("seeds=1:30"), "seeds must be a valid integer, got '1:30'"),
    (run(recipe="octal.yaml"), "octal.yaml is not valid YAML: 010 is not a plain number"),
    (run("methods={dpo: {beta: 1, beta: 2}}"), "is not a YAML value"),
    (run("seed=4294967295", "seeds=2"), "seed + seeds - 1 must be less than 2**32"),
    (run("threads=100000"), "threads must be less than or equal to 1024, got 100000"),
    (run(recipe="twice.yaml"), "methods.tvkd.start: 'dpo' must be a method defined before it"),
    (run(recipe="endless.yaml"), "endless.yaml: task must be a valid string"),
    (run(recipe="endless-options.yaml"), "cyclic reference detected"),
    (run(recipe="slash.yaml"), "'../x' names a directory: use letters, digits and . _ + - only"),
    (run(recipe="trusting.yaml"), "trusting.yaml asks to run code from the models' repositories"),
    (run("--fast"), "recipe.yaml has no section `fast`, the overrides of --fast; add one"),
    (run("methods.tvkd.bogus=1", "--methods", "dpo"), "tvkd is not among the methods that run (dpo); see --methods"),
    (
        ["quickstart", *OUT, "methods.dckd.k=-1"],
        "methods.dckd.k=-1: dckd is not among the methods that run (sft-chosen, dpo",
    ),
    (run("methods.dpo.start=dpo"), "methods.dpo.start: 'dpo' must be a method defined before it"),
    (run("methods.dpo.bata=1"), "methods.dpo: dpo has no option 'bata'; did you mean 'beta'?"),
    (run("methods.x.method=dop"), "methods.x: unknown method 'dop'; did you mean 'dpo'?"),
    (run("methods=[dpo]"), "methods must be a mapping of names to values, got ['dpo']"),
    (run("trainin.learning_rate=1"), "unknown key 'trainin'; did you mean 'training'?"),
    (run("training.learning_rate=-1"), "training: learning_rate must be greater than 0, got -1"),
    (run("signals.k=-1"), "signals.k must be greater than 0 or 'vocab', got -1"),
    (run("signals.positions=endpoint"), "must be 'all' or 'endpoints', got 'endpoint'"),
    (run("sampling.top_p=1.5"), "sampling.top_p must be less than or equal to 1, got 1.5"),
    (run("data.train=3"), "data.train must be a valid string, got 3"),
    (run("data.max_length=2"), "No row is left"),
    (run("seed=-1"), "seed must be greater than or equal to 0, got -1"),
    (run("baseline=tvkd"), "baseline 'tvkd' is not among the methods: dpo"),
    (run("methods.adpa={}"), "needs the model the teacher's DPO started from: name it as model.teacher_reference"),
    (
        run("methods.tvkd.potential=reward", "data.train=scored.jsonl", "data.test=unscored.jsonl"),
        "methods.tvkd needs a number in 'score_chosen' for every pair; 1 of data.test have none, the first",
    ),
    (
        run("methods.tvkd.potential=reward", "data.train=unscored.jsonl"),
        "methods.tvkd needs a number in 'score_chosen' for every pair; 1 of data.train have none, the first",
    ),
    (run("methods.tvkd.potential=reward"), "methods.tvkd needs a column 'score_chosen', a number for every pair"),
    (["quickstart", *OUT, "model.scratch.student.hiden_size=3"], "has no 'hiden_size'; did you mean 'hidden_size'?"),
    (["quickstart", *OUT, "data.synthetic.pairs=-1"], "data.synthetic.pairs must be greater than 0, got -1"),
    (["quickstart", *OUT, "evaluate.prompts=1"], "a synthetic task knows its reward and its prompts"),
    # studies
    (study(file="nowhere.yaml"), "no study at nowhere.yaml; the shipped ones are under studies/"),
    (study(file="nothing.yaml"), "nothing.yaml is not a study: it must be a mapping"),
    (study(file="study-metric.yaml"), "metric 'chosen_logq' is not measured; known: reward"),
    (study(file="study-method.yaml"), "has no method 'dop'; it has dpo"),
    (study(file="study-key.yaml"), "unknown key 'gird'; did you mean 'grid'?"),
    (study(file="study-option.yaml"), "cell 'betta=0.1': recipe.yaml: methods.dpo: dpo has no option 'betta'"),
    (study(file="study-value.yaml"), "cell 'beta=-0.2': recipe.yaml: methods.dpo: dpo: beta must be positive"),
    (study(file="study-recipe.yaml"), "no recipe at nowhere.yaml"),
    (study(file="study-empty.yaml"), "the study has no cells"),
    (study(file="study-grid.yaml"), "grid.methods.dpo.beta must be a valid list, got 0.1"),
    (study(file="study-log.yaml"), "x_scale: log: training.weight_decay=0 of cell 'weight_decay=0' is not positive"),
    (study(file="study-trusting.yaml"), "study-trusting.yaml asks to run code from the models' repositories"),
    (study("seed=3"), "seed is set by the study"),
    (study("methods.dpo.beta=1"), "cell 'beta=0.1' of the study sets methods.dpo.beta; leave it out"),
    # runs
    (["report", "run-broken", "--out", "r.html"], "run-broken/results.json is not valid JSON"),
    (["report", "run-list", "--out", "r.html"], 'run-list/results.json has no "methods"'),
    (["report", "run-scores", "--out", "r.html"], '"methods" -> "dpo" must be {METRIC: number}, not 3'),
    (["report", "run-deep", "--out", "r.html"], "run-deep/results.json is not valid JSON"),
    (["report", "pairs.jsonl", "--out", "r.html"], "pairs.jsonl is not a directory"),
    # the doctor, whose findings are no mistakes of its own
    (["doctor"], "there is nothing to check: give --data, --teacher, --student or --recipe"),
    (["doctor", "--recipe", "round.yaml"], "goes in a circle (round.yaml -> trip.yaml -> round.yaml)"),
    (["doctor", "--recipe", "trusting.yaml"], "trusting.yaml asks to run code from the models' repositories"),
    (["doctor", *PAIRS, "a=1"], "'a=1' is an override of a recipe; give --recipe with it"),
    # judges
    (answers("nowhere.jsonl"), "nowhere.jsonl cannot be read: No such file or directory"),
    (answers("empty"), "empty cannot be read: Is a directory"),
    (answers("empty.jsonl"), "empty.jsonl: there are no rows in it"),
    (answers("broken.jsonl"), "broken.jsonl, line 3: not valid JSON"),
    (answers("deep.jsonl"), "deep.jsonl, line 1: not valid JSON"),
    (answers("digits.jsonl"), "digits.jsonl, line 1: not valid JSON"),
    (answers("latin.jsonl"), "latin.jsonl cannot be read: not UTF-8 text"),
    (answers("unreadable.jsonl"), "unreadable.jsonl cannot be read"),
    (answers("list.jsonl"), "list.jsonl, row 0: not a JSON object"),
    (answers("turnless.jsonl"), "turnless.jsonl, row 1: a question has `turns`, a list of texts"),
    (answers("category.jsonl"), "category.jsonl, row 0: a question has a `category`"),
    (answers("same-id.jsonl"), "same-id.jsonl, row 1: a question has a `question_id` of its own"),
    (
        answers("list-id.jsonl"),
        "list-id.jsonl, row 0: a question has a `question_id` of its own, a whole number or text",
    ),
    (answers("half-turn.jsonl"), "half-turn.jsonl, row 0: it holds half a surrogate pair"),
    *(
        (answers(f"temperature-{name}.jsonl"), f"temperature-{name}.jsonl, row 0: `required_temperature` is a finite")
        for name in ("word", "null", "true", "below", "nan", "huge")
    ),
    (mt_bench(questions="list-id"), "list-id.jsonl, row 0: a question has a `question_id` of its own"),
    (mt_bench(answers="nowhere"), "nowhere.jsonl cannot be read"),
    (mt_bench(answers="answers-short"), "answers-short.jsonl, row 0"),
    (mt_bench(answers="answers-other"), "answers-other.jsonl"),
    (mt_bench(prompts="columns"), "columns.jsonl, row 0: a prompt has `name`, `prompt_template` and"),
    (mt_bench(prompts="prompts-name"), "prompts-name.jsonl, row 0: a prompt has `name`, `prompt_template` and"),
    (mt_bench(prompts="prompts-prompt_template"), "prompts-prompt_template.jsonl, row 0: a prompt has `name`"),
    (mt_bench(prompts="prompts-system_prompt"), "prompts-system_prompt.jsonl, row 0: a prompt has `name`"),
    (mt_bench(references="answers-short"), "answers-short.jsonl, row 0"),
    (mt_bench("--kind", "sing"), "--kind must be 'single' or 'pair', got 'sing'"),
    (mt_bench("--kind", "pair"), "--kind pair compares two files of answers"),
    (mt_bench("model=x"), "model cannot be set: it differs"),
    (mt_bench("api_key=sk-secret"), "api_key would be written into the results; keys go into PREFDISTILL_JUDGE_KEY"),
    (mt_bench("--url", "localhost:8000"), "--url is not an http:// or https:// URL"),
    (mt_bench("--url", "http://me:sk-secret@localhost/v1"), "--url holds more than an address"),
    (alpaca("broken"), "broken.jsonl, line 3: not valid JSON"),
    (alpaca("columns"), "columns.jsonl, row 0"),
    (alpaca("outputs-number"), "outputs-number.jsonl, row 0"),
    (alpaca("outputs", "outputs-other"), "outputs-other.jsonl"),
    (alpaca("outputs", "outputs", "placeless.txt"), "placeless.txt: the prompt has no {instruction}"),
    (alpaca("outputs", "outputs", "nowhere.txt"), "nowhere.txt is neither a file nor an evaluator"),
    (alpaca("outputs", "outputs", "latin.txt"), "latin.txt cannot be read: not UTF-8 text"),
    (alpaca("outputs", "outputs", "prompt.txt", "--answers", "cut.jsonl.gz"), "cut.jsonl.gz: cannot be read"),
    (alpaca("outputs", "outputs", "prompt.txt", "--labels", "A"), "--labels takes two or three different words"),
    (
        alpaca("outputs", "outputs", "weighted_alpaca_eval_gpt4_turbo", "--labels", "A,B"),
        "--labels goes with a prompt file, which weighted_alpaca_eval_gpt4_turbo is not",
    ),
    (["judge", "nothing"], "No such command 'nothing'"),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory, make_model, tokenizer, pairs):
    place = tmp_path_factory.mktemp("bad")
    bad_inputs.write_all(place, make_model, tokenizer, pairs)
    return place


@pytest.fixture
def place(filled, monkeypatch):
    """The working directory; every test leaves it as it was."""
    datasets.disable_progress_bars()
    monkeypatch.chdir(filled)
    return filled


def files(directory):
    return {path: path.is_dir() or path.lstat().st_mtime_ns for path in directory.rglob("*")}


def test_the_table_has_no_duplicates():
    assert len(BAD) >= 60
    assert len({tuple(arguments) for arguments, _ in BAD}) == len(BAD)


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments)[:100] for arguments, _ in BAD])
def test_bad_input(place, capsys, arguments, message):
    if "unreadable.jsonl" in arguments and not (place / "unreadable.jsonl").exists():
        pytest.skip("needs /proc/self/mem")
    before = files(place)
    status = main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert message in err
    *notes, last = err.strip().splitlines()
    assert last.startswith("prefdistill: ")
    assert len(notes) <= 1
    assert "Traceback" not in err
    assert "secret" not in err
    assert files(place) == before


@pytest.mark.parametrize("student", ["bad-template", "few-rows", "infinite"])
def test_a_study_reports_what_a_run_reports(place, capsys, student):
    before = files(place)
    assert main(run(f"model.student={student}")) == 2
    reason = capsys.readouterr().err.strip().splitlines()[-1].removeprefix("prefdistill: ")
    assert main(study(f"model.student={student}")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"prefdistill: study.yaml: cell 'beta=0.1': {' '.join(reason.split())}"
    assert files(place) == before


def test_transformers_prints_no_table_of_weights(place):
    """It is written to the stderr that was there when transformers was imported."""
    commands = [sample("pairs.jsonl", model) for model in ("headless", "model")]
    code = f"import sys; from prefdistill.cli import main; print([main(c) for c in {commands}][::-1], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    refused, _, after = done.stderr.partition("\n")
    assert done.stderr.strip().endswith("[0, 2]")
    assert refused.startswith("prefdistill: "), refused
    assert "[transformers]" not in after
