"""Write the files of a recipe's run as the stages would write them; nothing is trained."""

import json
import math
import random
import statistics

from exo.evaluation import metrics

PROMPTS = [f"prompt {i}" for i in range(8)]
ALIGNMENT = {"beta_pi": 0.5, "beta_r": 0.5, "reward_norm": "none"}  # options
WHEN = "2026-01-02T03:04:{:02d}+00:00"


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) if isinstance(value, dict) else "".join(json.dumps(row) + "\n" for row in value))


def put_step(directory, stage: str, started: int, **facts):
    record = {"stage": stage, "command": ["python", "-m", f"exo.{stage}"], "versions": {"python": "3"}, "inputs": {}}
    record["makes"] = {"evaluate": "evaluation.json", "train": "run.json"}.get(stage, ".")
    times = {"platform": "Linux", "started": WHEN.format(started), "finished": WHEN.format(started + 1)}
    arguments = {"output_dir": str(directory)} | facts.pop("arguments", {})
    put(directory / "run.json", record | times | {"arguments": arguments} | facts)


def summary(values):
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - 2 * error, "high": mean + 2 * error, "standard_error": error}


def rewards(mean: float, seed: int):
    """Two samples a prompt; prompts and samples differ."""
    draw = random.Random(seed)
    return [[mean + 0.3 * i + draw.gauss(0, 0.5) for _ in range(2)] for i in range(len(PROMPTS))]


def put_evaluation(directory, checkpoints, baseline=None, bound=None, text="fine"):
    """`checkpoints`: (name, step, KL, rewards)."""
    entries = []
    for name, step, kl, scores in checkpoints:
        means = metrics.means(scores)
        entry = {"name": name, "step": step, "reward": summary(means), "spread": metrics.spread(scores)}
        entry |= {"accuracy": summary(metrics.accuracies(scores)), "unfinished": 0.25, "win_rate": {}}
        if baseline:
            gains = [a - b for a, b in zip(means, metrics.means(baseline), strict=True)]
            wins = summary(metrics.win_rates(scores, baseline))
            entry |= {"rise": summary(gains), "win_rate": {"reference": wins}}
        if bound:
            entry["kl_bound"] = bound
        else:
            kls = [kl + 0.01 * i for i in range(-4, 5)]
            entry |= {"kl": summary(kls), "kl_k3": summary([1.1 * x for x in kls])}
        entries.append(entry)
        samples = [
            {"prompt": prompt, "completions": [text, f"{text} again"], "rewards": row}
            for prompt, row in zip(PROMPTS, scores, strict=True)
        ]
        put(directory / "samples" / f"{name}.jsonl", samples)
    settings = {"k": 2, "temperature": 0.8, "top_p": 1.0, "scorer": "an oracle", "prompts": len(PROMPTS)}
    put(directory / "evaluation.json", settings | {"checkpoints": entries})
    put_step(directory, "evaluate", 50)


def make_run(directory, trials, text="fine"):
    """`trials`: (method, k, varied, seed, mean reward at the last checkpoint); half of the gain comes before it."""
    plan = [{"name": "sft", "stage": "sft", "needs": []}]
    plan.append({"name": "evaluation/sft", "stage": "evaluate", "needs": ["sft"], "method": "sft"})
    put_step(directory / "sft", "sft", 1, rows={"format": "x", "rows": 9, "skipped": {"empty": 2}, "noted": {}})
    put(directory / "sft" / "metrics.jsonl", [{"step": i, "loss": 1 / i, "clipped": 0.0} for i in (1, 2, 3)])
    start = rewards(0.0, 99)
    put_evaluation(directory / "evaluation/sft", [("final", 3, 0.0, start)], text=text)
    for i, (method, k, varied, seed, mean) in enumerate(trials):
        name = f"{method}/{i}-seed{seed}"
        facts = {"method": method, "k": k, "seed": seed, "varied": varied} | ({"n": 4} if method == "bon" else {})
        plan.append({"name": name, "stage": "align", "needs": ["sft"]})
        plan.append({"name": f"evaluation/{name}", "stage": "evaluate", "needs": [name], **facts})
        put_step(directory / name, "align", 10, arguments=ALIGNMENT)
        lines = [
            {"step": s, "loss": 2.0, "grad_norm": 3.0, "clipped": float(s == 1), "rewards/stuck": 0.0} for s in (1, 2)
        ]
        put(directory / name / "metrics.jsonl", [*lines, {"step": 2, "eval_loss": 7.0}])
        half, last = rewards(mean / 2, 10 + i), rewards(mean, 20 + i)
        points = [("step-4", 4, 0.5 + 0.1 * i, half), ("final", 8, 1.0 + 0.1 * i, last)]
        bound = {"bound": math.log(4) - 0.75} if method == "bon" else {}
        put_evaluation(directory / "evaluation" / name, points[-1:] if bound else points, start, text=text, **bound)
        draw = random.Random(i)
        ref = [draw.gauss(-20, 3) for _ in range(64)]
        rows = [{"prompt": PROMPTS[0], "logps": ref, "ref_logps": ref, "rewards": [draw.random() for _ in ref]}]
        put(directory / "evaluation" / name / "density.jsonl", rows)
    recipe = {"title": f"A title {text}", "seeds": [0, 1]}
    put_step(directory, "train", 0, recipe=recipe, plan=plan)
    return directory


TRIALS = [
    ("exo-rw", 2, {"beta_pi": 0.1}, 0, 1.0), ("exo-rw", 2, {"beta_pi": 0.1}, 1, 1.4),
    ("exo-rw", 2, {"beta_pi": 0.5}, 0, 2.0), ("exo-rw", 2, {"beta_pi": 0.5}, 1, 2.4),
    ("exo-rw", 4, {"beta_pi": 0.5}, 0, 1.5), ("dpo-rw", 2, {"beta_pi": 0.1}, 0, 0.01),
    ("dpo-rw", 2, {"beta_pi": 0.5}, 0, -0.5), ("bon", None, {}, 0, 3.0),
]  # fmt: skip
