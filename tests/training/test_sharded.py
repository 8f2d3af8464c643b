"""Training with weights that are spread over processes follows the trajectory of one process."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from prefdistill.core.errors import UserError
from prefdistill.core.files import write_jsonl, write_sealed
from prefdistill.data.load import load_pairs
from prefdistill.methods import METHODS
from prefdistill.models.sharded import local_part
from prefdistill.signals import extract_signals
from prefdistill.training.checkpoints import WHOLE, check_engine_of
from prefdistill.training.engines import check_trainable
from prefdistill.training.factory import check_training
from prefdistill.training.options import Training
from prefdistill.training.universal import UNIVERSAL, load_universal
from support.methods import MODELS, NUMBERS, SAMPLED, SIDES, Stores, with_responses
from support.train_sharded import OPTIONS, train

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tests" / "support" / "train_sharded.py"
DDP: dict[str, dict[str, str]] = {"ddp": {}}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ENGINES = {
    "fsdp2": FSDP2,
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(REPOSITORY / "configs" / f"zero{stage}.json"),
            "DS_ACCELERATOR": "cpu",
        }
        for stage in (2, 3)
    },
}
NARROW = {"gradient_checkpointing": True, "bf16": True}
LORA = {"lora": {"r": 4}}
TIED = {"method": "sft", "model": "tied", "stores": []}
LOGGED = ("loss", "grad_norm", "rewards/margins", "kl/chosen")


@pytest.fixture
def start(tmp_path, make_model, pairs, tokenizer):
    """A directory with a model and pairs."""
    for name, tied in (("model", False), ("tied", True)):
        make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "pairs.jsonl", list(with_responses(pairs)))
    return tmp_path


@pytest.fixture
def with_two_stores(start, make_model, tokenizer):
    """The directory with signals for TVKD and DCKD."""
    rows, signals = load_pairs(str(start / "pairs.jsonl")), start / "signals"
    extract_signals(make_model(5), rows, tokenizer, ("values", "topk"), signals / "teacher", k=7)
    extract_signals(make_model(), rows, tokenizer, ("logps",), signals / "reference", role="reference")
    return start


def launch(start, trainings, variables, processes=2):
    """Run trainings on several processes; return the results of each process and what they said."""
    out = start / "sharded"
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *(str(SCRIPT), str(start), str(out), json.dumps(trainings)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"results-{rank}.json").read_text()) for rank in range(processes)], done.stderr


def skip_without(engine):
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip('DeepSpeed is not installed: pip install "prefdistill[deepspeed]"')


def check_trajectory(one, other, tolerance=2e-5) -> float:
    """The logged numbers of each step agree; return their largest difference."""
    steps = [[entry for entry in run["history"] if "loss" in entry] for run in (one, other)]
    assert len(steps[0]) == len(steps[1]) == 4
    largest = 0.0
    for name in LOGGED:
        if name in steps[0][0]:
            first, second = ([entry[name] for entry in log] for log in steps)
            assert len(set(first)) == 4
            np.testing.assert_allclose(first, second, atol=tolerance, err_msg=name)
            largest = max(largest, *np.abs(np.subtract(first, second)))
    return largest


def check_saved(one: Path, other: Path, tolerance=2e-4) -> float:
    """Both directories load in transformers and give the same logits; return the largest difference of a weight."""
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(place, dtype="auto") for place in (one, other)]
        expected, actual = (model(input_ids=ids).logits for model in models)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert type(models[1]).__name__ == "LlamaForCausalLM" == models[1].config.architectures[0]
    torch.testing.assert_close(actual, expected, atol=tolerance * float(expected.std()), rtol=0)
    first, second = (model.state_dict() for model in models)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.slow
def test_fsdp2_follows_one_process_and_resumes(with_two_stores):
    """All weights, interrupted by Ctrl-C after two of four steps; tied embeddings, bf16 and gradient checkpointing;
    a LoRA."""
    start = with_two_stores
    trainings = {
        "stopped": {"method": "tvkd", "out": "tvkd", "stop_after": 2},
        "tvkd": {"method": "tvkd"},
        "dckd": {"method": "dckd", "model": "tied", "stores": ["teacher"], **NARROW},
        "lora": {"method": "vanillakd", **LORA},
    }
    results, said = launch(start, trainings, FSDP2)
    one = {name: train(start, start / name, **trainings[name]) for name in ("tvkd", "dckd", "lora")}
    assert said.count("here the weights are sharded by FSDP2") == 1
    assert said.count("tvkd: resuming from step 2") == 1
    assert not [line for line in said.splitlines() if "differ by" in line and "lora" not in line]  # what is saved
    for name, run in one.items():
        parts = [result[name] for result in results]
        assert (run["engine"], run["sharded"]) == ("ddp", False)
        for part in parts:
            assert (part["engine"], part["sharded"], part["kinds"]) == ("fsdp2", True, ["DTensor"])
            assert part["local"] < 0.6 * run["local"]
        assert sum(part["local"] for part in parts) == run["local"]
        check_trajectory(run, parts[0])
        check_saved(start / name, start / "sharded" / name)
    assert (start / "sharded" / "lora" / "adapter" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP1 is asked for; set fsdp_version: 2"):
        check_training(Training())
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_training(Training())
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(UserError, match="set fsdp_cpu_ram_efficient_loading: false"):
        check_training(Training())
    two = SimpleNamespace(world_size=2, fsdp_plugin_args=None, deepspeed_plugin=None)
    with pytest.raises(UserError, match="quantised weights are not sharded; train them under DDP"):
        check_trainable(SimpleNamespace(is_quantized=True), two)
    narrow, bf16 = SimpleNamespace(dtype=torch.bfloat16), SimpleNamespace(**vars(two), bf16=True)
    with pytest.raises(UserError, match="makes float32 of weights in bfloat16 if bf16 is true; set dtype to float32"):
        check_trainable(narrow, bf16)
    check_trainable(narrow, SimpleNamespace(**vars(two), bf16=False))
    check_trainable(SimpleNamespace(dtype=torch.float32), bf16)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [("adafactor", "the state of adafactor cannot be converted"), ("adamw_torch", r"cannot convert it \(KeyError")],
)
def test_what_deepspeed_cannot_convert_is_refused(optimizer, message, tmp_path, monkeypatch):
    def convert(args):
        raise KeyError("exp_avg")

    for name in ("deepspeed", "deepspeed.checkpoint", "deepspeed.checkpoint.ds_to_universal"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(main=convert))
    (tmp_path / "latest").write_text("global_step1")
    trainer = SimpleNamespace(args=SimpleNamespace(optim=SimpleNamespace(value=optimizer)))
    with pytest.raises(
        UserError, match=f"of 2 processes under DeepSpeed, here are 1.*{message}.*: launch 2, or delete it"
    ):
        load_universal(trainer, tmp_path, 2)


def test_a_checkpoint_of_another_engine_is_refused(tmp_path):
    write_sealed(tmp_path / WHOLE, {"files": {}, "engine": "fsdp2", "processes": 2})
    check_engine_of(tmp_path, "fsdp2")  # on one process as well
    with pytest.raises(UserError, match="is of a training under fsdp2, this one is under ddp"):
        check_engine_of(tmp_path, "ddp")
    write_sealed(tmp_path / WHOLE, {"files": {}, "engine": "zero3", "processes": 2})
    check_engine_of(tmp_path, "zero3")
    write_sealed(tmp_path / WHOLE, {"files": {}})  # of an earlier version, which knew DDP only
    check_engine_of(tmp_path, "ddp")


WAYS = {"all weights": {}, "LoRA": LORA, "bf16, checkpointing": NARROW}
KINDS = {
    "tied": TIED,
    "checkpointing": {"method": "tvkd", "gradient_checkpointing": True},
    "bf16": {"method": "tvkd", "bf16": True},
    "LoRA, bf16, checkpointing": {"method": "dckd", **LORA, **NARROW},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", DDP | ENGINES)
def test_every_method_under_every_engine(engine, start, make_model, tokenizer):
    """Every method with all weights, with LoRA, and with bf16 and gradient checkpointing; TVKD and the other kinds of
    training are interrupted and resumed."""
    skip_without(engine)
    rows = load_pairs(str(start / "pairs.jsonl"), responses=(*SIDES, *SAMPLED), reads=tuple(NUMBERS))
    Stores(start / "signals", lambda role: make_model(MODELS[role][0]), rows, tokenizer)(k=7)
    trainings = {f"{name}: {way}": {"method": name, **WAYS[way]} for way in WAYS for name in METHODS} | KINDS
    interrupted = (*(f"tvkd: {way}" for way in WAYS), *KINDS)
    stopped = {f"stopped {name}": {**trainings[name], "out": name, "stop_after": 2} for name in interrupted}
    results, said = launch(start, stopped | trainings, (DDP | ENGINES)[engine])
    assert said.count("resuming from step 2") == len(interrupted)
    for name, settings in trainings.items():
        run = train(start, start / name, **settings)
        assert results[0][name]["engine"] == engine
        assert results[0][name]["sharded"] == (engine in ("fsdp2", "zero3"))
        if results[0][name]["sharded"]:
            assert results[0][name]["local"] + results[1][name]["local"] == run["local"]
        assert run["keeps_copies"] == settings.get("bf16", False)
        assert not (results[0][name]["keeps_copies"] and engine == "fsdp2")
        # with bf16, DeepSpeed also gathers weights and reduces gradients of linear layers in bfloat16
        rounded = settings.get("bf16", False) and engine.startswith("zero")
        steps = check_trajectory(run, results[0][name], tolerance=2e-2 if rounded else 2e-5)
        weights = check_saved(start / name, start / "sharded" / name, tolerance=5e-2 if rounded else 2e-4)
        print(f"{engine}, {name}: steps within {steps:.1e}, weights within {weights:.1e}")  # seen with -rP


@pytest.mark.slow
@pytest.mark.parametrize("engine", DDP | ENGINES)
def test_resumes_on_another_number_of_processes(engine, with_two_stores):
    """Each step on another number of processes than the one before: 2, 3, 2 and 1, where FSDP2 ends on 3.

    The learning rate changes with each step, and the two groups of the optimizer differ in weight decay."""
    skip_without(engine)
    start, options = with_two_stores, {"method": "tvkd", "schedule": "linear", "weight_decay": 0.5}
    trainings = {"tvkd": options, "lora": options | LORA, "tied": options | TIED}
    for step, processes in enumerate((2, 3, 2), start=1):
        stopped = {name: {**settings, "stop_after": step} for name, settings in trainings.items()}
        launch(start, stopped, (DDP | ENGINES)[engine], processes)
        for name in trainings:  # as a kill leaves it while a checkpoint is converted
            left = start / "sharded" / name / "checkpoints" / f"checkpoint-{step}" / UNIVERSAL / "zero"
            left.mkdir(parents=True)
            (left / "optimizer_state.pt").write_text("half")
    results, said = launch(start, trainings, (DDP | ENGINES)[engine], processes=3 if engine == "fsdp2" else 1)
    converted = said.count("is of 2 processes under DeepSpeed, here are 1: converting it")
    assert converted == (len(trainings) if engine.startswith("zero") else 0)
    for name, settings in trainings.items():
        run = train(start, start / name, **settings)
        steps = check_trajectory(run, results[0][name])
        weights = check_saved(start / name, start / "sharded" / name)
        print(f"{engine}, {name}: steps within {steps:.1e}, weights within {weights:.1e}")  # seen with -rP


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["sft", "dpo", "dpo with LoRA"])
def test_the_trainers_of_trl_under_every_engine(kind, engine, start):
    """The same command on two processes and on one: the logs of the steps and the saved model."""
    skip_without(engine)
    verb, _, lora = kind.partition(" with ")
    more = {"lora.r": 4, "gradient_checkpointing": "true"} if lora else {}
    options = [f"{name}={value}" for name, value in {**OPTIONS, "save_steps": 2, **more}.items()]
    call = ["prefdistill", verb, "--model", "model", "--data", "pairs.jsonl", *options, "--out"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    for prefix, out, variables in (([], "one", {}), (torchrun, "two", ENGINES[engine])):
        done = subprocess.run(
            [sys.executable, "-m", *prefix, *call, out],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            cwd=start,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert ("here the weights are sharded by FSDP2" in done.stderr) == (engine == "fsdp2")
    one, two = (
        {"history": [json.loads(line) for line in (start / out / "metrics.jsonl").read_text().splitlines()]}
        for out in ("one", "two")
    )
    check_trajectory(one, two)
    check_saved(start / "one", start / "two")


@pytest.mark.slow
def test_the_reference_of_trl_is_sharded_layer_by_layer(start):
    results, _ = launch(start, {"reference": {"method": "dpo of TRL"}}, FSDP2)
    for result in results:
        assert result["reference"] == {"layers": ["FSDPLlamaDecoderLayer"] * 2, "trainable": 0}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2-two-nodes", "zero3"])
def test_two_machines_follow_the_trajectory_of_one_process(config, with_two_stores):
    """Two launchers, each with one process, as on two machines of one GPU: the command of docs/clusters.md."""
    skip_without(config)
    start, settings = with_two_stores, {"tvkd": {"method": "tvkd"}}
    out = start / "sharded"
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/{config}.yaml"),
                *("--num_machines=2", "--num_processes=2", f"--machine_rank={rank}", "--main_process_ip=127.0.0.1"),
                *(f"--main_process_port={port}", str(SCRIPT), str(start), str(out), json.dumps(settings)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            cwd=REPOSITORY,
            stderr=(start / f"machine-{rank}.log").open("w"),
        )
        for rank in (0, 1)
    ]
    statuses = [machine.wait(timeout=1200) for machine in machines]
    assert statuses == [0, 0], "".join((start / f"machine-{rank}.log").read_text()[-2000:] for rank in (0, 1))
    results = [json.loads((out / f"results-{rank}.json").read_text())["tvkd"] for rank in (0, 1)]
    assert results[0]["engine"] == config.removesuffix("-two-nodes")
    assert results[0]["sharded"]
    check_trajectory(train(start, start / "tvkd", "tvkd"), results[0])
    check_saved(start / "tvkd", out / "tvkd")


CONFIGS = {path.stem: path for path in (REPOSITORY / "configs").glob("*.yaml") if path.stem != "skypilot"}
EXPECTED = {
    "one-gpu": ("NO", 1, 1),
    "fsdp2": ("FSDP", 8, 1),
    "fsdp2-two-nodes": ("FSDP", 16, 2),
    "zero2": ("DEEPSPEED", 8, 1),
    "zero3": ("DEEPSPEED", 8, 1),
}


def test_configs_are_what_their_names_say():
    from accelerate.commands.config.config_args import load_config_from_file

    assert CONFIGS.keys() == EXPECTED.keys()
    for name, path in CONFIGS.items():
        config = load_config_from_file(str(path))
        configured = (config.distributed_type.value, config.num_processes, config.num_machines)
        assert configured == EXPECTED[name], name
        if name.startswith("fsdp2"):
            assert config.fsdp_config["fsdp_version"] == 2
            assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
        if name.startswith("zero"):
            file = REPOSITORY / config.deepspeed_config["deepspeed_config_file"]
            assert json.loads(file.read_text())["zero_optimization"]["stage"] == int(name[-1])


def test_the_cluster_examples_start_the_configs_that_are_there():
    script, sky = REPOSITORY / "configs" / "slurm.sbatch", REPOSITORY / "configs" / "skypilot.yaml"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    task = YAML(typ="safe").load(sky.read_text())
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (1, "H100:8")
    assert task["file_mounts"]["/work"]["source"] == "s3://${BUCKET}"  # a `name` would be a new, empty bucket
    for command in (script.read_text(), task["run"]):
        (config,) = re.findall(r"--config_file (\S+)", command)
        assert (REPOSITORY / config).is_file()
        assert "-m prefdistill distill" in command


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_finished_training_is_saved_from_its_checkpoint(engine, with_two_stores):
    """As after a kill while it was saved: no weights are there, and nothing is trained again."""
    skip_without(engine)
    start, trainings = with_two_stores, {"tvkd": {"method": "tvkd"}, "lora": {"method": "tvkd", **LORA}}
    launch(start, trainings, ENGINES[engine])
    for name in trainings:
        shutil.copytree(start / "sharded" / name, start / name)
        for path in (start / "sharded" / name).rglob("*.safetensors"):
            if "checkpoints" not in path.parts:
                path.unlink()
    _, said = launch(start, trainings, ENGINES[engine])
    assert said.count("already trained, only saving") == len(trainings)
    for name in trainings:
        check_saved(start / name, start / "sharded" / name, tolerance=1e-6)


@pytest.mark.parametrize(("rank", "own"), [(0, 4), (1, 1), (2, 0)])
def test_padding_of_zero3_is_no_weight(rank, own):
    """Five weights on three processes of four: nobody has written the rest."""
    part = torch.tensor([1.0, 2.0, 3.0, 4.0])
    part[own:] = torch.nan
    weight = SimpleNamespace(ds_tensor=part, ds_numel=5, ds_zero_partition_rank=rank)
    assert torch.equal(local_part(weight), part[:own])
