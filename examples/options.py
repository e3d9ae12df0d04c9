"""Learning curves of one alignment with each option that changes its speed or memory, a panel for each file of data.

python examples/options.py --data FILE ... --out DIR [--model tiny] [--steps 40]. Curves that lie on each other are the
point: LoRA alone trains something else. Prints the largest difference of losses from the plain run and tokens a second.
The same command again draws what is there, and goes on with what is not.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

OPTIONS = {
    "plain": ["--share_prompt=off", "--reference=cache"],
    "shared prompt": ["--share_prompt=on"],
    "live reference": ["--share_prompt=off", "--reference=live"],
    "small micro-batches": ["--share_prompt=off", "--max_tokens_per_batch=1024"],
    "checkpointing": ["--share_prompt=off", "--gradient_checkpointing"],
    "shared, live, checkpointing, small": [
        "--share_prompt=on", "--reference=live", "--gradient_checkpointing", "--max_tokens_per_batch=1024",
    ],
    "LoRA": ["--share_prompt=off", "--lora_r=8"],
    "LoRA, shared, live": ["--share_prompt=on", "--lora_r=8", "--reference=live"],
}  # fmt: skip


def run(name: str, data: str, arguments: argparse.Namespace) -> list[dict]:
    out = arguments.out / Path(data).name.split(".")[0] / name.replace(", ", "-").replace(" ", "_")
    command = [sys.executable, "-m", "exo.align", "--model", arguments.model, "--data", data]
    command += [f"--max_steps={arguments.steps}", f"--output_dir={out}", "--batch_size=8"]
    command += ["--learning_rate=1e-4", "--beta_pi=0.5", "--max_length=128", *arguments.more, *OPTIONS[name]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "learning_rate" in line]  # without those of evaluations


def draw(axis, data: str, arguments: argparse.Namespace) -> None:
    print(data)
    base: dict[bool, list[float]] = {}
    for i, name in enumerate(OPTIONS):
        lines = run(name, data, arguments)
        losses = [line["loss"] for line in lines]
        plain = base.setdefault("LoRA" in name, losses)
        off = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
        rate = statistics.median(line["tokens_per_second"] for line in lines[2:])
        print(f"  {name:36s} largest difference {off:.1e}   {rate:8,.0f} tokens/s", flush=True)
        width = 6 - 0.6 * i  # so that what lies below is seen at the sides
        label = name if plain is losses else f"{name}: off by {off:.0e}"
        axis.plot(range(1, len(losses) + 1), losses, linewidth=width, alpha=0.75, label=label)
    axis.set(xlabel="optimizer step", ylabel="loss (nats)", title=f"{Path(data).name}, model {arguments.model}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--more", nargs="*", default=[], help="further options of exo.align")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(arguments.data), figsize=(6.5 * len(arguments.data), 5), squeeze=False)
    for axis, data in zip(axes[0], arguments.data, strict=True):
        draw(axis, data, arguments)
    figure.tight_layout()
    figure.savefig(arguments.out / "options.png", dpi=150)
    print(arguments.out / "options.png")


if __name__ == "__main__":
    main()
