"""Learning curves of one alignment with each option that changes its speed or memory, on one picture.

python examples/options.py --data FILE --out DIR [--model tiny] [--steps 40]. Curves that lie on each other are the
point: LoRA alone trains something else. Prints the largest difference of losses from the plain run and tokens a second.
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


def run(name: str, arguments: argparse.Namespace) -> list[dict]:
    out = arguments.out / name.replace(", ", "-").replace(" ", "_")
    command = [sys.executable, "-m", "exo.align", "--model", arguments.model, "--data", arguments.data]
    command += [f"--max_steps={arguments.steps}", f"--output_dir={out}", "--overwrite_output_dir", "--batch_size=8"]
    command += ["--learning_rate=1e-4", "--beta_pi=0.5", "--max_length=128", *arguments.more, *OPTIONS[name]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--more", nargs="*", default=[], help="further options of exo.align")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(7, 4.2))
    base: dict[bool, list[float]] = {}
    for i, name in enumerate(OPTIONS):
        lines = run(name, arguments)
        losses = [line["loss"] for line in lines]
        plain = base.setdefault("LoRA" in name, losses)
        off = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
        rate = statistics.median(line["tokens_per_second"] for line in lines[2:])
        print(f"{name:36s} largest difference {off:.1e}   {rate:8,.0f} tokens/s", flush=True)
        width = 6 - 0.6 * i  # so that what lies below is seen at the sides
        axis.plot(range(1, len(losses) + 1), losses, linewidth=width, alpha=0.75, label=f"{name}: off by {off:.0e}")
    axis.set(
        xlabel="optimizer step", ylabel="loss (nats)", title=f"{Path(arguments.data).name}, model {arguments.model}"
    )
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.out / "options.png", dpi=150)
    print(arguments.out / "options.png")


if __name__ == "__main__":
    main()
