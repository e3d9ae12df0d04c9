"""`--help` of every command: its text, and that it does not import torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from exo import align, judge

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "exo").glob("*.py") if path.stem != "__init__")

DRIVER = """
import runpy, sys
command = sys.argv[1]
sys.argv = ["-m", "--help"]
try:
    runpy.run_module(f"exo.{command}", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = {"torch", "transformers", "accelerate", "matplotlib", "rich", "yaml", "datasets"} & sys.modules.keys()
sys.exit(f"loaded: {sorted(loaded)}" if loaded else 0)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_neither_torch_nor_transformers(command):
    child = subprocess.run([sys.executable, "-c", DRIVER, command], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("usage: ") == 1 and "--output_dir" in child.stdout


def help_text(main, option, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([option])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_main_options_and_help_all_shows_every_group(capsys):
    brief, full, underscored = (help_text(align.main, option, capsys) for option in ("-h", "--help-all", "--help_all"))
    assert "--model" in brief and "--beta_pi" in brief and "--nproc" in brief and "--help-all shows all" in brief
    assert "--adam_beta1" not in brief and brief.count("\n  --") < 30
    titles = ("Model:", "Data:", "Objective:", "Optimization:", "Memory and speed:", "LoRA:", "Checkpoints:", "Run:")
    assert all(f"\n{title}\n" in full for title in titles) and "--help-all shows all" not in full
    assert full == underscored and all(f"--{name} " in full for name in align.Config.__dataclass_fields__)


def test_help_shows_the_options_that_only_one_command_has(capsys):
    assert "--endpoint" in help_text(judge.main, "--help", capsys)
