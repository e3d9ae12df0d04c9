"""Compare methods: the table of methods, failed trials, win rates."""

from collections.abc import Iterator
from typing import Any

from exo.reporting.formatting import interval, percent, percent_interval, plus_minus, without_empty_columns
from exo.reporting.reading import load_json
from exo.reporting.results import Results, Setting
from exo.reporting.statistics import Estimate


def methods_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: SFT and the best setting of each method and K; without the columns that are empty."""
    header = ["method", "best setting", "seeds", "reward", "gain over SFT", "KL (nats)"]
    header += ["wins over SFT", "wins over chosen", "accuracy"]
    rows = []
    if results.start:
        sft = results.start.last
        wins = percent(sft.win_rates.get("chosen"))
        rows.append(["SFT", "", "", plus_minus(sft.reward), "", "0", "", wins, percent(sft.accuracy)])
    for setting in results.best_per_series:
        name = setting.first.series + " FAILED" * setting.failed
        row = [name, setting.first.setting, str(len(setting.trials)), plus_minus(setting.mean("reward"))]
        row += [plus_minus(setting.gain), kl(setting), percent(setting.win_rate("reference"))]
        rows.append([*row, percent(setting.win_rate("chosen")), percent(setting.mean("accuracy"))])
    return without_empty_columns(header, rows)


def kl(setting: Setting) -> str:
    bound = setting.first.last.kl_bound
    return plus_minus(setting.mean("kl"), ".2f") if bound is None else f"≤ {bound:.2f}"


def failed_trials(results: Results) -> list[str]:
    """Return a line for every setting and seed of each method and K whose best setting failed."""
    failed = {setting.first.series for setting in results.best_per_series if setting.failed}
    return [
        f"{', '.join(filter(None, [trial.series, trial.setting]))}, seed {trial.seed}: "
        f"gain {plus_minus(trial.last.gain)}"
        for trial in results.evaluated
        if trial.series in failed
    ]


def win_rates(results: Results) -> dict[str, Any] | None:
    opponents = list(dict.fromkeys(name for trial in results.evaluated for name in trial.last.win_rates))
    rows = [
        [s.first.series, s.first.setting, *(percent_interval(s.win_rate(opponent)) for opponent in opponents)]
        for s in results.best_per_series
    ]
    header = ["method", "best setting", *(f"over {'SFT' if name == 'reference' else name}" for name in opponents)]
    header, rows = without_empty_columns(header, rows)
    files = [*results.directory.glob("judge/**/judge.json"), *results.directory.glob("label/**/label.json")]
    names = {str(path.parent.relative_to(results.directory)): path for path in sorted(files)}
    comparisons = {name: list(_flatten(load_json(path))) for name, path in names.items()}
    if not opponents and not comparisons:
        return None
    rates = [(setting.first.series, setting.win_rate("reference")) for setting in results.best_per_series]
    compared = [(series, rate) for series, rate in rates if rate]
    best = max(compared, key=lambda item: item[1].mean, default=None)
    return {"best": best, "header": header, "rows": rows, "comparisons": comparisons}


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Yield (key, value) of a nested object; a mean with its interval is one value."""
    for key, value in values.items():
        if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
            yield [prefix + key, interval(Estimate(value["mean"], value["low"], value["high"], 0.0), ".3f")]
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = "undecided" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            yield [prefix + key, text]
