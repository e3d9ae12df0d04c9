"""Share sampling and scoring among ranks, and cache the results, so that a killed run does not compute them again."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from exo import data
from exo.data import Example
from exo.distributed.accelerator import Accelerator
from exo.distributed.gather import check_shared_directory, map_over_ranks
from exo.rollouts import samples, scorers
from exo.rollouts.generate import Job, Sample
from exo.rollouts.scorers import Scorer, Scores
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.runs.atomic import atomic_file
from exo.runs.jsonl import JsonlCache
from exo.runs.stage import Start


def sample_shared(jobs: Sequence[Job], accelerator: Accelerator, cache: JsonlCache | None = None) -> list[list[Sample]]:
    """Run each job of `generate.sample` on one rank and return all their samples on every rank."""
    rows = _map_cached([partial(_to_json, job) for job in jobs], accelerator, cache)
    return [samples.from_json(row) for row in rows]


def _to_json(job: Job) -> list[Any]:
    return samples.to_json(job())


def score_shared(
    scorer: Scorer,
    examples: Sequence[Example],
    accelerator: Accelerator,
    *,
    cache: JsonlCache | None = None,
    chunk_size: int = scorers.CHUNK_SIZE,
    progress: Callable[[int], object] | None = None,
) -> tuple[Scores, Counter[str]]:
    """Score each chunk of the examples on one rank and return all scores, with the scorer's counts, on every rank.

    Chunks do not depend on the number of ranks. `progress` is called with the number of examples just scored.
    """

    def score(chunk: Sequence[Example]) -> tuple[Scores, dict[str, int]]:
        scorer.counts.clear()
        scores = scorer.score(chunk)
        if progress is not None:
            progress(len(chunk))
        return scores, dict(scorer.counts)

    chunks = [examples[start : start + chunk_size] for start in range(0, len(examples), chunk_size)]
    results = _map_cached([partial(score, chunk) for chunk in chunks], accelerator, cache)
    scores = [tuple(row) for chunk_scores, _ in results for row in chunk_scores]  # JSON has no tuples
    return scores, sum((Counter(chunk_counts) for _, chunk_counts in results), Counter())


def _map_cached(jobs: Sequence[Callable[[], Any]], accelerator: Accelerator, cache: JsonlCache | None) -> list[Any]:
    """Run jobs that return JSON, one job per rank and round. The cache stores the results of each round."""
    if cache is None:
        return map_over_ranks(jobs, lambda job: job(), accelerator)
    results: list[Any] = []
    world = accelerator.num_processes
    for first in range(0, len(jobs), world):
        numbers = range(first, min(first + world, len(jobs)))

        def result(number: int) -> Any:
            return cache.entries[number] if number in cache.entries else jobs[number]()

        values = map_over_ranks(numbers, result, accelerator)
        for number, value in zip(numbers, values, strict=True):
            cache.put(number, value)
        results += values
    return results


def begin(start: Start, accelerator: Accelerator, rows: Mapping[str, Any]) -> JsonlCache:
    """Begin or resume the run of a stage and return its cache, which has the results of a resumed run."""
    if accelerator.is_main_process:
        run_stage.begin(start, keep=True, rows=rows)
    check_shared_directory(start, accelerator)
    cache = JsonlCache(Path(start.config.output_dir) / run_record.PIECES, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()  # no rank writes before all have read
    return cache


def end(
    cache: JsonlCache, name: str, rows: Iterable[dict[str, Any]], accelerator: Accelerator, result: Mapping[str, Any]
) -> Path:
    """Write the rows to the file of that name, finish the run and return its directory."""
    directory = cache.path.parent
    if accelerator.is_main_process:
        with atomic_file(directory / name) as file:
            data.write_jsonl(file, rows)
        cache.close()
        run_stage.finish(directory, result=result)
        run_directory.remove_resume_files(directory)
    return directory
