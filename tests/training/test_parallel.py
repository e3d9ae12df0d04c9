"""Many processes are one: the same weights, the same samples and scores, the same end after a kill.

Two processes with gloo, on CPUs; where one of them fails, all end.
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
from tests.interruptions import STAGES, lines, made

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return interruptions.given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def server(environment):
    found = Server()
    yield found
    found.close()


EVEN, UNEVEN, FEW, FAR = [5] * 6, [1, 60, 2, 3, 40, 1, 5], [9], [5, 9, 7, 3]
slow = pytest.mark.slow
SPLITS = [
    pytest.param(
        how, sizes, tokens, marks=() if (how, sizes) in (("fsdp", UNEVEN), ("ddp", FEW)) and tokens == 70 else slow
    )
    for how, sizes, tokens in product(("ddp", "fsdp"), (EVEN, UNEVEN, FEW), (70, 4096))
]


@pytest.mark.parametrize(("how", "sizes", "tokens"), SPLITS)
def test_eight_steps_of_two_processes_are_those_of_one(how, sizes, tokens, tmp_path, server):
    """In fp64, to the rounding of sums; where one process has no group, it waits for nothing and nobody for it."""
    found = []
    for name, processes, kind, most in (("one", 1, "ddp", 4096), ("two", 2, how, tokens)):
        arguments = [kind, str(tmp_path / name), json.dumps(sizes), str(most)]
        assert server.run("tests.parallel_worker", arguments, tmp_path / "log", ranks=processes) == 0
        found.append(load_file(tmp_path / name))
    one, two = found
    assert one.keys() == two.keys()
    assert torch.allclose(one.pop("losses"), two.pop("losses"), rtol=1e-14, atol=0)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-14


def run(stage, given, out, *more, processes=2):
    """The exit code of a stage in several processes, and what it said."""
    argv = [a for a in interruptions.arguments(stage, given, out, *more) if a != "--dropout"]
    child = subprocess.run(
        [sys.executable, "-m", f"exo.{stage}", *argv, f"--nproc={processes}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    return child.returncode, child.stdout


def forked(server, stage, given, out, *more, processes=2):
    """The same, without a launcher and its imports."""
    argv = [a for a in interruptions.arguments(stage, given, out, *more) if a != "--dropout"]
    log = out.with_name(f"{out.name}.log")
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    code = server.run(stage, argv, log, ranks=processes)
    return code, log.read_text()


def largest_difference(one, two):
    """The largest one between two runs' weights, without the biases of GPT-2's keys.

    Such a bias adds one number to all scores of a query, which softmax ignores: its gradient is rounding alone, and
    Adam divides that by its own size. So it moves by up to the learning rate a step, in a direction of chance.
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
    ("stage", "how"),
    [pytest.param(s, h, marks=slow)
     for s, h in product(("sft", "reward", "align", "ppo"), ("--fsdp", "--fsdp=false"))],
)  # fmt: skip
def test_a_stage_in_two_processes_makes_what_one_makes(stage, how, given, tmp_path, server):
    for name, processes in (("one", 1), ("two", 2)):
        code, said = forked(server, stage, given, tmp_path / name, how, processes=processes)
        assert code == 0, said
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert largest_difference(one, two) < 2e-5
    logs = [lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    for mine, theirs in zip(*logs, strict=True):
        for name in {"loss", "eval_loss", "eval_accuracy", "eval_rewards/accuracies"} & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], abs=2e-4), name


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--lora_r=4", "--gradient_checkpointing"], id="lora"),
        pytest.param(["--reference=live", "--share_prompt=on"], id="live", marks=slow),
        pytest.param(["--reference=live", "--lora_r=4", "--lora_output=adapter"], id="lora, live", marks=slow),
        pytest.param(["--ref_model", "{given}/other"], id="another reference", marks=slow),
        pytest.param(["--reference=none"], id="no reference", marks=slow),
    ],
)
def test_a_model_in_shards_from_16_bits_makes_what_a_whole_one_makes(options, given, tmp_path, server):
    """Its files are mapped, its references scored in shards."""
    for name, seed in (("start", 0), ("other", 1)):
        model, tokenizer = models.load(given / "start")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        models.save(model.to(torch.bfloat16), tokenizer, given / f"{name}-16")
    options = [option.format(given=given).replace("/other", "/other-16") for option in options]
    options += ["--model", str(given / "start-16"), "--save_dtype", "float32"]
    for name, how, processes in (("one", "--fsdp=false", 1), ("two", "--fsdp", 2)):
        more = [how, "--reference_cache", str(tmp_path / name / "kept"), *options]
        code, said = forked(server, "align", given, tmp_path / name / "run", *more, processes=processes)
        assert code == 0, said
    kept = [[f.read_bytes() for f in sorted((tmp_path / name / "kept").glob("*"))] for name in ("one", "two")]
    assert kept[0] == kept[1]
    assert bool(kept[0]) == (not any(option in ("--reference=live", "--reference=none") for option in options))
    file = "adapter_model.safetensors" if "--lora_output=adapter" in options else "model.safetensors"
    one, two = (load_file(tmp_path / name / "run" / file) for name in ("one", "two"))
    assert one.keys() == two.keys() and {t.dtype for t in two.values()} == {torch.float32}
    assert largest_difference(one, two) < 2e-6


@slow
@pytest.mark.parametrize("how", ["--fsdp", "--fsdp=false"])
def test_ranks_agree_on_weights_that_did_not_move_or_are_not_finite(how, given, tmp_path, server):
    for rate, said in (
        ("1e-60", "no weight has changed after 10 steps"),
        ("1e300", "the weights are not finite (model."),
    ):
        run = tmp_path / rate
        code, log = forked(server, "sft", given, run, how, "--learning_rate", rate, "--on_nan", "skip")
        assert code == 1 and said in log and "another process" not in log and "Traceback" not in log, log
        assert not (run / "model.safetensors").exists()
        assert bool(list(run.glob("checkpoints/step-*"))) == (rate == "1e-60"), "no poisoned checkpoint"


@slow
@pytest.mark.parametrize("how", ["--fsdp", "--fsdp=false"])
def test_ranks_save_the_dtype_of_the_start(how, given, tmp_path, server):
    model, tokenizer = models.load(given / "start")
    models.save(model.to(torch.bfloat16), tokenizer, tmp_path / "start")
    code, log = forked(server, "sft", given, tmp_path / "run", how, "--model", str(tmp_path / "start"))
    assert code == 0, log
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("known", [(4, 0), (1, 6)])
def test_processes_that_know_different_references_agree_on_what_is_missing(known, tmp_path, server):
    arguments = [str(tmp_path), *map(str, known)]
    assert server.run("tests.kept_worker", arguments, tmp_path / "log", ranks=2) == 0, (tmp_path / "log").read_text()


@slow
def test_a_directory_that_only_one_process_sees_is_refused_at_the_start(given, tmp_path):
    program = "import os\nfrom exo import align\n\ndef main(argv):\n    return align.main([*argv, '--output_dir', "
    (tmp_path / "apart.py").write_text(program + f"'{tmp_path}/run-' + os.environ['RANK']])\n")
    argv = [a for a in interruptions.arguments("align", given, tmp_path) if a != "--dropout"]
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
def test_every_family_of_models_in_shards_has_the_gradients_of_whole_ones(tmp_path, server):
    assert server.run("tests.shard_worker", [str(tmp_path / "found")], tmp_path / "log", ranks=2) == 0
    found = json.loads((tmp_path / "found").read_text())
    assert len(found) >= 12 and max(found.values()) < 1e-11, found


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=slow), "fsdp"])
def test_nothing_but_weights_is_rounded_to_bfloat16(how, tmp_path, server):
    """References and rewards reach the loss as they are: of sums near -1000 bfloat16 would leave steps of 4 nats."""
    losses = []
    for name, processes, kind in (("one", 1, "ddp-bf16"), ("two", 2, f"{how}-bf16")):
        arguments = [kind, str(tmp_path / name), json.dumps(FAR), "4096"]
        assert server.run("tests.parallel_worker", arguments, tmp_path / "log", ranks=processes) == 0
        losses.append(load_file(tmp_path / name)["losses"])
    assert torch.allclose(*losses, rtol=0.02, atol=0)


def test_sampling_scoring_and_evaluation_in_two_processes_are_those_of_one(given, tmp_path, server):
    """To the byte: each batch is drawn by one of them, in the batches of one process."""
    model, data = ["--model", str(given / "start")], ["--data", str(given / "ppo.jsonl")]
    common = ["--device", "cpu", "--max_new_tokens", "6"]
    for n in (1, 2):
        out = tmp_path / str(n)
        commands = {
            "sample": [*model, *data, *common, "--k", "3", "--batch_size", "7"],
            "score": ["--data", str(out / "sample"), "--device", "cpu", "--oracle", "tests.tasks:reward"],
            "evaluate": [*model, *data, *common, "--reference", str(given / "start"), "--k", "2", "--batch_size", "5",
                         "--max_length", "32", "--oracle", "tests.tasks:reward", "--max_tokens_per_batch", "64"],
        }  # fmt: skip
        for stage, argv in commands.items():
            argv += ["--output_dir", str(out / stage)]
            if (stage, n) == ("score", 2):  # by the launcher itself
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


def killed(server, given, out, how):
    """An alignment in two processes that were killed after a state was saved, well before the end."""
    argv = [a for a in interruptions.arguments("align", given, out, how) if a != "--dropout"]
    first = server.begin("align", argv, out.with_name("killed.log"), ranks=2)
    while not list(out.glob("checkpoints/step-*4")):
        time.sleep(0.005)
    for pid in subprocess.check_output(["pgrep", "-P", str(first)]).split():
        os.kill(int(pid), signal.SIGKILL)
    assert server.end() == 137


@pytest.mark.parametrize("how", [pytest.param("--fsdp", marks=slow), pytest.param("--fsdp=false", marks=slow)])
def test_two_processes_that_are_killed_go_on_to_the_same_end(how, given, tmp_path, server):
    assert forked(server, "align", given, tmp_path / "whole", how)[0] == 0
    killed(server, given, tmp_path / "run", how)
    code, said = forked(server, "align", given, tmp_path / "run", how)
    assert code == 0, said
    assert "resuming after step" in said
    assert made(tmp_path / "run") == made(tmp_path / "whole")


@pytest.fixture(scope="module")
def in_one(given, server):
    assert forked(server, "align", given, given / "in-one", processes=1)[0] == 0
    return load_file(given / "in-one" / "model.safetensors")


@pytest.mark.parametrize(
    ("before", "after", "processes"),
    [
        ("--fsdp", "--fsdp", 3),
        pytest.param("--fsdp", "--fsdp=false", 1, marks=slow),
        pytest.param("--fsdp", "--fsdp=false", 2, marks=slow),
        pytest.param("--fsdp=false", "--fsdp", 2, marks=slow),
        pytest.param("--fsdp=false", "--fsdp=false", 3, marks=slow),
    ],
)
def test_a_state_of_two_processes_goes_on_in_others(before, after, processes, given, in_one, tmp_path, server):
    """In other shards, or in none, if that is allowed; to the end that one process comes to."""
    killed(server, given, tmp_path / "run", before)
    code, said = forked(server, "align", given, tmp_path / "run", after, processes=processes)
    assert code == 1 and "saved by a run with 2 processes" in said and "pass --allow_changes to resume" in said
    code, said = forked(server, "align", given, tmp_path / "run", after, "--allow_changes", processes=processes)
    assert code == 0 and "resuming after step" in said, said
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert found.keys() == in_one.keys()
    assert max(float((found[name] - in_one[name]).abs().max()) for name in found) < 2e-5


def test_one_that_fails_ends_all_and_says_why_once(given, tmp_path):
    """A loss that is not finite on one rank alone: its rank and rows are named; the other does not wait for ever."""
    began = time.monotonic()
    program = (
        "import os, sys\nfrom exo import align\n"
        "from exo.training import preference\nforward = preference.PreferenceLoss.forward\n"
        "def bad(self, batch, n):\n    share = forward(self, batch, n)\n"
        "    return share._replace(loss=share.loss * float('nan')) if n and os.environ['RANK'] == '1' else share\n"
        "preference.PreferenceLoss.forward = bad\nsys.exit(align.main(sys.argv[1:]))\n"
    )
    (tmp_path / "poisoned.py").write_text(program)
    argv = [a for a in interruptions.arguments("align", given, tmp_path / "run") if a != "--dropout"]
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
    assert child.returncode == 1 and time.monotonic() - began < 60
    errors = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert "step 1, rank 1: the loss is nan; stopped before the update; rows at lines" in errors[0]
    assert "Traceback" not in child.stderr and len(errors) <= 2


@slow
def test_told_to_stop_two_processes_stop_at_one_step(given, tmp_path):
    argv = [a for a in interruptions.arguments("align", given, tmp_path / "run") if a != "--dropout"]
    command = [sys.executable, "-m", "exo.align", *argv, "--nproc=2", "--max_steps=4000", "--save_steps=0"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    log = tmp_path / "run" / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size > 2000):
        time.sleep(0.01)
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    error = child.communicate()[1]
    assert child.returncode == 143 and time.monotonic() - began < 10, error
    assert "stopped: after step" in error and list((tmp_path / "run").glob("checkpoints/step-*"))


@slow
def test_told_to_stop_two_processes_do_not_wait_for_an_evaluation(given, tmp_path):
    """Of half a minute, a second for each of its micro-batches."""
    program = (
        "import sys, time\nfrom exo import align\n"
        "from exo.training import preference\nforward = preference.PreferenceLoss.forward\n"
        "def slow(self, batch, n):\n"
        "    if n is None:\n        print('evaluating', flush=True)\n        time.sleep(1)\n"
        "    return forward(self, batch, n)\n"
        "preference.PreferenceLoss.forward = slow\nsys.exit(align.main(sys.argv[1:]))\n"
    )
    (tmp_path / "slow.py").write_text(program)
    argv = [a for a in interruptions.arguments("align", given, tmp_path / "run") if a != "--dropout"]
    argv += ["--eval_data", str(given / "align.jsonl"), "--eval_fraction", "0"]
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
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    error = child.communicate()[1]
    assert child.returncode == 143 and time.monotonic() - began < 10, error
    assert "stopped: after step 3 of 10" in error and list((tmp_path / "run").glob("checkpoints/step-3"))


@slow
def test_processes_whose_launcher_is_killed_stop_with_their_state(given, tmp_path):
    argv = [a for a in interruptions.arguments("sft", given, tmp_path / "run") if a != "--dropout"]
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


def test_a_signal_while_ranks_start_ends_all_of_them(given, tmp_path):
    argv = interruptions.arguments("sft", given, tmp_path / "run")
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
    ("stage", "more", "said"),
    [
        ("ppo", ["--dtype=float16"], "expected --dtype bfloat16 or float32"),
        ("align", ["--compile"], "does not go together with --compile"),
        ("sft", ["--dtype=float16"], "expected --dtype bfloat16 or float32"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(stage, more, said, given, tmp_path, monkeypatch, capsys):
    """Before any process waits for another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert STAGES[stage].main(interruptions.arguments(stage, given, tmp_path / stage, "--fsdp", *more)) == 2
    assert said in capsys.readouterr().err


def test_a_stage_for_one_process_refuses_several(given, tmp_path, monkeypatch, capsys):
    """Each of them would write its files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--systems", f"one={given},two={given}", "--matchups", "one:two", "--output_dir", str(tmp_path / "out")]
    assert label.main(argv) == 1
    assert capsys.readouterr().err == "error: label: runs in one process; got 2 (WORLD_SIZE)\n"
    assert not (tmp_path / "out").exists()


def test_every_stage_is_here():
    assert set(STAGES) == {"sft", "reward", "align", "ppo"}
