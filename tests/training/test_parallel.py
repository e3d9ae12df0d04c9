"""Training and sampling on several ranks: the same results as on one, also after a kill; failures stop all ranks.

The ranks are processes on the CPU that communicate with gloo.
"""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exo import label, models
from exo.cli.main import run_ranks
from tests import interruptions
from tests.fork_server import Server
from tests.interruptions import STAGES, fingerprint, lines

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return interruptions.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def server(environment):
    fork_server = Server()
    yield fork_server
    fork_server.close()


EVEN, UNEVEN, FEW, FAR = [5] * 6, [1, 60, 2, 3, 40, 1, 5], [9], [5, 9, 7, 3]
slow = pytest.mark.slow
SPLITS = [
    pytest.param(
        strategy,
        sizes,
        tokens,
        marks=() if (strategy, sizes) in (("fsdp", UNEVEN), ("ddp", FEW)) and tokens == 70 else slow,
    )
    for strategy, sizes, tokens in product(("ddp", "fsdp"), (EVEN, UNEVEN, FEW), (70, 4096))
]


@pytest.mark.parametrize(("strategy", "sizes", "tokens"), SPLITS)
def test_eight_steps_on_two_processes_equal_those_on_one(strategy, sizes, tokens, tmp_path, server):
    """Check this in fp64, up to the order of sums; a rank without a group must not block the others."""
    weights = []
    for name, processes, kind, max_tokens in (("one", 1, "ddp", 4096), ("two", 2, strategy, tokens)):
        arguments = [kind, str(tmp_path / name), json.dumps(sizes), str(max_tokens)]
        assert server.run("tests.parallel_worker", arguments, tmp_path / "log", ranks=processes) == 0
        weights.append(load_file(tmp_path / name))
    one, two = weights
    assert one.keys() == two.keys()
    assert torch.allclose(one.pop("losses"), two.pop("losses"), rtol=1e-14, atol=0)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-14


def run_launched(stage, inputs, out, *more, processes=2):
    """Run a stage with its own launcher; return the exit code and the output."""
    argv = [a for a in interruptions.arguments(stage, inputs, out, *more) if a != "--dropout"]
    child = subprocess.run(
        [sys.executable, "-m", f"exo.{stage}", *argv, f"--nproc={processes}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    return child.returncode, child.stdout


def run_forked(server, stage, inputs, out, *more, processes=2):
    """Run a stage on several ranks in the fork server, without the launcher and its imports."""
    argv = [a for a in interruptions.arguments(stage, inputs, out, *more) if a != "--dropout"]
    log = out.with_name(f"{out.name}.log")
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    code = server.run(stage, argv, log, ranks=processes)
    return code, log.read_text()


def largest_difference(one, two):
    """Return the largest difference between the weights of two runs, without the key biases of GPT-2.

    A key bias adds one number to all scores of a query, which softmax ignores. Its gradient is pure rounding error,
    which Adam normalizes, so it moves by up to the learning rate per step in a random direction.
    """
    steps, rate = interruptions.STEPS, 3e-3
    largest = 0.0
    for name in one:
        difference = (one[name] - two[name]).abs()
        if name.endswith("attn.c_attn.bias"):
            queries, keys, values = difference.chunk(3)
            assert float(keys.max()) <= 2 * steps * rate
            difference = torch.cat([queries, values])
        largest = max(largest, float(difference.max()))
    return largest


@pytest.mark.parametrize(
    ("stage", "option"),
    [pytest.param(s, h, marks=slow)
     for s, h in product(("sft", "reward", "align", "ppo"), ("--fsdp", "--fsdp=false"))],
)  # fmt: skip
def test_a_stage_on_two_processes_gives_the_same_weights_as_on_one(stage, option, inputs, tmp_path, server):
    for name, processes in (("one", 1), ("two", 2)):
        code, output = run_forked(server, stage, inputs, tmp_path / name, option, processes=processes)
        assert code == 0, output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert largest_difference(one, two) < 2e-5
    logs = [lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    for line_one, line_two in zip(*logs, strict=True):
        for name in {"loss", "eval_loss", "eval_accuracy", "eval_rewards/accuracies"} & line_one.keys():
            assert line_one[name] == pytest.approx(line_two[name], abs=2e-4), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--lora_r=4", "--gradient_checkpointing"], id="lora"),
        pytest.param(["--reference=live", "--share_prompt=on"], id="live", marks=slow),
        pytest.param(["--reference=live", "--lora_r=4", "--lora_output=adapter"], id="lora, live", marks=slow),
        pytest.param(["--ref_model", "{inputs}/other"], id="another reference", marks=slow),
        pytest.param(["--reference=none"], id="no reference", marks=slow),
    ],
)
def test_a_sharded_16_bit_model_gives_the_same_weights_as_an_unsharded_one(options, inputs, tmp_path, server):
    """Check mapped weight files and reference log-probs computed by the sharded model."""
    for name, seed in (("start", 0), ("other", 1)):
        model, tokenizer = models.load(inputs / "start")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        models.save(model.to(torch.bfloat16), tokenizer, inputs / f"{name}-16")
    options = [option.format(inputs=inputs).replace("/other", "/other-16") for option in options]
    options += ["--model", str(inputs / "start-16"), "--save_dtype", "float32"]
    for name, sharding, processes in (("one", "--fsdp=false", 1), ("two", "--fsdp", 2)):
        more = [sharding, "--reference_cache", str(tmp_path / name / "cache"), *options]
        code, output = run_forked(server, "align", inputs, tmp_path / name / "run", *more, processes=processes)
        assert code == 0, output
    caches = [[f.read_bytes() for f in sorted((tmp_path / name / "cache").glob("*"))] for name in ("one", "two")]
    assert caches[0] == caches[1]
    assert bool(caches[0]) == (not any(option in ("--reference=live", "--reference=none") for option in options))
    file = "adapter_model.safetensors" if "--lora_output=adapter" in options else "model.safetensors"
    one, two = (load_file(tmp_path / name / "run" / file) for name in ("one", "two"))
    assert one.keys() == two.keys() and {t.dtype for t in two.values()} == {torch.float32}
    assert largest_difference(one, two) < 2e-6


@slow
@pytest.mark.parametrize("option", ["--fsdp", "--fsdp=false"])
def test_ranks_agree_on_weights_that_did_not_move_or_are_not_finite(option, inputs, tmp_path, server):
    for rate, message in (
        ("1e-60", "no weight has changed after 10 steps"),
        ("1e300", "the weights are not finite (model."),
    ):
        run = tmp_path / rate
        code, log = run_forked(server, "sft", inputs, run, option, "--learning_rate", rate, "--on_nan", "skip")
        assert code == 1 and message in log and "another process" not in log and "Traceback" not in log, log
        assert not (run / "model.safetensors").exists()
        assert bool(list(run.glob("checkpoints/step-*"))) == (rate == "1e-60"), "no poisoned checkpoint"


@slow
@pytest.mark.parametrize("option", ["--fsdp", "--fsdp=false"])
def test_ranks_save_the_dtype_of_the_start(option, inputs, tmp_path, server):
    model, tokenizer = models.load(inputs / "start")
    models.save(model.to(torch.bfloat16), tokenizer, tmp_path / "start")
    code, log = run_forked(server, "sft", inputs, tmp_path / "run", option, "--model", str(tmp_path / "start"))
    assert code == 0, log
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("cached_lines", [(4, 0), (1, 6)])
def test_ranks_with_different_reference_caches_agree_on_what_is_missing(cached_lines, tmp_path, server):
    arguments = [str(tmp_path), *map(str, cached_lines)]
    assert server.run("tests.reference_cache_worker", arguments, tmp_path / "log", ranks=2) == 0, (
        tmp_path / "log"
    ).read_text()


@slow
def test_a_directory_that_only_one_process_sees_is_refused_at_the_start(inputs, tmp_path):
    program = "import os\nfrom exo import align\n\ndef main(argv):\n    return align.main([*argv, '--output_dir', "
    (tmp_path / "apart.py").write_text(program + f"'{tmp_path}/run-' + os.environ['RANK']])\n")
    argv = [a for a in interruptions.arguments("align", inputs, tmp_path) if a != "--dropout"]
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import apart; sys.exit(apart.main(sys.argv[1:]))"
    argv = [a for a in argv if a not in ("--output_dir", str(tmp_path))]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        assert "expected a directory that all ranks see" in rank.communicate(timeout=120)[1] and rank.returncode == 1


@slow
def test_sharded_models_have_the_gradients_of_unsharded_ones(tmp_path, server):
    assert server.run("tests.shard_worker", [str(tmp_path / "differences")], tmp_path / "log", ranks=2) == 0
    differences = json.loads((tmp_path / "differences").read_text())
    assert len(differences) >= 12 and max(differences.values()) < 1e-11, differences


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=slow), "fsdp"])
def test_nothing_but_weights_is_rounded_to_bfloat16(strategy, tmp_path, server):
    """Check that references and rewards are not rounded: near -1000 the bfloat16 spacing is 4 nats."""
    losses = []
    for name, processes, kind in (("one", 1, "ddp-bf16"), ("two", 2, f"{strategy}-bf16")):
        arguments = [kind, str(tmp_path / name), json.dumps(FAR), "4096"]
        assert server.run("tests.parallel_worker", arguments, tmp_path / "log", ranks=processes) == 0
        losses.append(load_file(tmp_path / name)["losses"])
    assert torch.allclose(*losses, rtol=0.02, atol=0)


def test_sampling_scoring_and_evaluation_on_two_processes_equal_those_on_one(inputs, tmp_path, server):
    """Check that the files are equal: each rank samples some of the batches of a single process."""
    model, data = ["--model", str(inputs / "start")], ["--data", str(inputs / "ppo.jsonl")]
    common = ["--device", "cpu", "--max_new_tokens", "6"]
    for n in (1, 2):
        out = tmp_path / str(n)
        commands = {
            "sample": [*model, *data, *common, "--k", "3", "--batch_size", "7"],
            "score": ["--data", str(out / "sample"), "--device", "cpu", "--oracle", "tests.tasks:reward"],
            "evaluate": [*model, *data, *common, "--reference", str(inputs / "start"), "--k", "2", "--batch_size", "5",
                         "--max_length", "32", "--oracle", "tests.tasks:reward", "--max_tokens_per_batch", "64"],
        }  # fmt: skip
        for stage, argv in commands.items():
            argv += ["--output_dir", str(out / stage)]
            if (stage, n) == ("score", 2):  # with the launcher
                assert run_ranks(f"exo.{stage}", argv, n) == 0
            else:
                assert server.run(f"exo.{stage}", argv, tmp_path / "log", ranks=n) == 0
    for file in (
        "sample/samples.jsonl",
        "score/scored.jsonl",
        "evaluate/evaluation.json",
        "evaluate/samples/final.jsonl",
    ):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


def kill_midway(server, inputs, out, option):
    """Start an alignment on two ranks; kill both after a checkpoint, well before the end."""
    argv = [a for a in interruptions.arguments("align", inputs, out, option) if a != "--dropout"]
    parent_pid = server.start("align", argv, out.with_name("killed.log"), ranks=2)
    while not list(out.glob("checkpoints/step-*4")):
        time.sleep(0.005)
    for pid in subprocess.check_output(["pgrep", "-P", str(parent_pid)]).split():
        os.kill(int(pid), signal.SIGKILL)
    assert server.wait() == 137


@pytest.mark.parametrize("option", [pytest.param("--fsdp", marks=slow), pytest.param("--fsdp=false", marks=slow)])
def test_two_killed_processes_resume_to_the_same_bits(option, inputs, tmp_path, server):
    assert run_forked(server, "align", inputs, tmp_path / "undisturbed", option)[0] == 0
    kill_midway(server, inputs, tmp_path / "run", option)
    code, output = run_forked(server, "align", inputs, tmp_path / "run", option)
    assert code == 0, output
    assert "resuming after step" in output
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def single_process_weights(inputs, server):
    assert run_forked(server, "align", inputs, inputs / "single", processes=1)[0] == 0
    return load_file(inputs / "single" / "model.safetensors")


@pytest.mark.parametrize(
    ("first", "second", "processes"),
    [
        ("--fsdp", "--fsdp", 3),
        pytest.param("--fsdp", "--fsdp=false", 1, marks=slow),
        pytest.param("--fsdp", "--fsdp=false", 2, marks=slow),
        pytest.param("--fsdp=false", "--fsdp", 2, marks=slow),
        pytest.param("--fsdp=false", "--fsdp=false", 3, marks=slow),
    ],
)
def test_a_checkpoint_of_two_processes_resumes_on_another_number(
    first, second, processes, inputs, single_process_weights, tmp_path, server
):
    """Check that --allow_changes resumes on other shards, or on none, to the weights of a single process."""
    kill_midway(server, inputs, tmp_path / "run", first)
    code, output = run_forked(server, "align", inputs, tmp_path / "run", second, processes=processes)
    assert code == 1 and "saved by a run with 2 processes" in output and "pass --allow_changes to resume" in output
    code, output = run_forked(server, "align", inputs, tmp_path / "run", second, "--allow_changes", processes=processes)
    assert code == 0 and "resuming after step" in output, output
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert weights.keys() == single_process_weights.keys()
    assert max(float((weights[name] - single_process_weights[name]).abs().max()) for name in weights) < 2e-5


def test_a_failing_rank_ends_all_ranks_with_one_error(inputs, tmp_path):
    """Check that a NaN on one rank is reported with its rank and rows, and that the other rank does not hang."""
    start = time.monotonic()
    program = (
        "import os, sys\nfrom exo import align\n"
        "from exo.training import preference\nforward = preference.PreferenceLoss.forward\n"
        "def bad(self, batch, n):\n    share = forward(self, batch, n)\n"
        "    return share._replace(loss=share.loss * float('nan')) if n and os.environ['RANK'] == '1' else share\n"
        "preference.PreferenceLoss.forward = bad\nsys.exit(align.main(sys.argv[1:]))\n"
    )
    (tmp_path / "poisoned.py").write_text(program)
    argv = [a for a in interruptions.arguments("align", inputs, tmp_path / "run") if a != "--dropout"]
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from exo.cli.main import run_ranks; "
        "sys.exit(run_ranks('poisoned', sys.argv[1:], 2))"
    )
    child = subprocess.run(
        [sys.executable, "-c", program, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:."},
    )
    assert child.returncode == 1 and time.monotonic() - start < 60
    errors = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert "step 1, rank 1: the loss is nan; stopped before the update; rows at lines" in errors[0]
    assert "Traceback" not in child.stderr and len(errors) <= 2


@slow
def test_a_stop_signal_stops_both_ranks_at_the_same_step(inputs, tmp_path):
    argv = [a for a in interruptions.arguments("align", inputs, tmp_path / "run") if a != "--dropout"]
    command = [sys.executable, "-m", "exo.align", *argv, "--nproc=2", "--max_steps=4000", "--save_steps=0"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    log = tmp_path / "run" / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size > 2000):
        time.sleep(0.01)
    start = time.monotonic()
    child.send_signal(signal.SIGTERM)
    error = child.communicate()[1]
    assert child.returncode == 143 and time.monotonic() - start < 10, error
    assert "stopped: after step" in error and list((tmp_path / "run").glob("checkpoints/step-*"))


@slow
def test_a_stop_signal_interrupts_an_evaluation(inputs, tmp_path):
    """Check this for an evaluation of half a minute: one second per micro-batch."""
    program = (
        "import sys, time\nfrom exo import align\n"
        "from exo.training import preference\nforward = preference.PreferenceLoss.forward\n"
        "def slow(self, batch, n):\n"
        "    if n is None:\n        print('evaluating', flush=True)\n        time.sleep(1)\n"
        "    return forward(self, batch, n)\n"
        "preference.PreferenceLoss.forward = slow\nsys.exit(align.main(sys.argv[1:]))\n"
    )
    (tmp_path / "slow.py").write_text(program)
    argv = [a for a in interruptions.arguments("align", inputs, tmp_path / "run") if a != "--dropout"]
    argv += ["--eval_data", str(inputs / "align.jsonl"), "--eval_fraction", "0"]
    command = [
        sys.executable,
        "-c",
        "import sys; from exo.cli.main import run_ranks; sys.exit(run_ranks('slow', sys.argv[1:], 2))",
    ]
    child = subprocess.Popen(
        [*command, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:."},
    )  # fmt: skip
    assert any("evaluating" in line for line in child.stdout)
    start = time.monotonic()
    child.send_signal(signal.SIGTERM)
    error = child.communicate()[1]
    assert child.returncode == 143 and time.monotonic() - start < 10, error
    assert "stopped: after step 3 of 10" in error and list((tmp_path / "run").glob("checkpoints/step-3"))


@slow
def test_ranks_save_a_checkpoint_and_stop_if_their_launcher_is_killed(inputs, tmp_path):
    argv = [a for a in interruptions.arguments("sft", inputs, tmp_path / "run") if a != "--dropout"]
    command = [sys.executable, "-m", "exo.sft", *argv, "--nproc=2", "--max_steps=4000", "--save_steps=0"]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "metrics.jsonl"
    while launcher.poll() is None and not (log.exists() and log.stat().st_size > 2000):
        time.sleep(0.01)
    workers = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(launcher.pid)]).split()]
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers)
    assert list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_signal_while_ranks_start_ends_all_of_them(inputs, tmp_path):
    argv = interruptions.arguments("sft", inputs, tmp_path / "run")
    launcher = subprocess.Popen([sys.executable, "-m", "exo.sft", *argv, "--nproc=2"], stderr=subprocess.DEVNULL)
    while not (ranks := subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True).stdout.split()):
        time.sleep(0.001)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 143
    until = time.monotonic() + 20
    while (alive := [pid for pid in ranks if Path(f"/proc/{int(pid)}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("ppo", ["--dtype=float16"], "expected --dtype bfloat16 or float32"),
        ("align", ["--compile"], "does not go together with --compile"),
        ("sft", ["--dtype=float16"], "expected --dtype bfloat16 or float32"),
    ],
)
def test_options_incompatible_with_fsdp_are_refused(stage, options, message, inputs, tmp_path, monkeypatch, capsys):
    """Check that they are refused before any rank waits for another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert STAGES[stage].main(interruptions.arguments(stage, inputs, tmp_path / stage, "--fsdp", *options)) == 2
    assert message in capsys.readouterr().err


def test_a_stage_for_one_process_refuses_several(inputs, tmp_path, monkeypatch, capsys):
    """Check that `label` refuses to run on two ranks, because each would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--systems", f"one={inputs},two={inputs}", "--matchups", "one:two", "--output_dir", str(tmp_path / "out")]
    assert label.main(argv) == 1
    assert capsys.readouterr().err == "error: label: runs in one process; got 2 (WORLD_SIZE)\n"
    assert not (tmp_path / "out").exists()


def test_all_training_stages_are_covered():
    assert set(STAGES) == {"sft", "reward", "align", "ppo"}
