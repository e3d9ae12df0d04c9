"""A head sharded over two processes: results equal those of one process to 1e-12 in fp64, and both ranks agree.

Starting processes is slow, so one pair of processes runs all jobs, and the tests read its results. If the ranks call
different numbers of collectives, the run ends with a timeout. Tensors are on the CPU, because the backend is gloo.
"""

import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import IGNORED, seeded
from conftest import INTERPRETED
from linear_cases import HEAD, LAYOUT, LinearCase, linear_answer, make_linear_case
from torch import Tensor

import exo_kernels
from exo_kernels.schedules.plan import Plan

IMPL = "triton" if INTERPRETED else "chunked"
VOCAB, WIDTH = 37, 8
SMALL = 2500  # bytes: chunks of 4 or 5 rows, less than the up to 9 rows of a group
EVERYTHING = ("hidden", "weight", "bias")
CUTS = {"20+17": (20, 17), "1+36": (1, 36), "36+1": (36, 1)}  # ranks with 1 and 36 columns would choose other chunks
Answer = dict[str, Any]


class Job(NamedTuple):
    """A call; `changes` are keyword arguments of make_linear_case."""

    function: str  # "loss", "tokens" (log-probs), "entropy" (log-probs and entropies), "sums" (per sequence)
    schedule: str
    changes: dict[str, Any] = {}
    cut: tuple[int, int] = CUTS["20+17"]
    budget: int = SMALL
    edit: str = ""  # a key of EDITS
    needs: tuple[str, ...] = EVERYTHING
    tolerance: float = 1e-12  # relative to the largest number of the tensor

    def case(self) -> LinearCase:
        changes = {"n": 4, "t": 6, "width": WIDTH, "vocab": VOCAB, "dtype": torch.float64, "seed": 3} | self.changes
        return EDITS[self.edit](make_linear_case(**changes), self.cut)


def labels_within(first: int, end: int, case: LinearCase) -> LinearCase:
    labels = torch.randint(first, end, case.labels.shape, generator=seeded(1))
    return case._replace(labels=labels.where(case.labels != IGNORED, IGNORED))


def dead(first: int, end: int, case: LinearCase) -> LinearCase:
    """Set the bias of some columns to -inf."""
    bias = case.options["bias"].clone()
    bias[first:end] = -torch.inf
    return case.with_options(bias=bias)


def with_nan(case: LinearCase) -> LinearCase:
    """Put NaN into one row with loss, and +inf into another."""
    hidden = case.hidden.clone()
    hidden[0, 1], hidden[1, 2] = torch.nan, torch.inf
    return case._replace(hidden=hidden, labels=case.labels.clamp(min=0))


def on_a_grid(case: LinearCase) -> LinearCase:
    """Make the fp32 logits exact around -32768, where fp32 has steps of 1/512."""
    hidden, weight = (
        (4 * torch.randn(x.shape, generator=seeded(i))).round() / 4 for i, x in enumerate((case.hidden, case.weight))
    )
    return case.with_options(bias=torch.full((VOCAB,), -32768.0))._replace(hidden=hidden, weight=weight)


EDITS = {
    "": lambda case, cut: case,
    "labels-first": lambda case, cut: labels_within(0, cut[0], case),
    "labels-second": lambda case, cut: labels_within(cut[0], VOCAB, case),
    "dead-first": lambda case, cut: dead(0, cut[0], labels_within(cut[0], VOCAB, case)),
    "dead-second": lambda case, cut: dead(cut[0], VOCAB, labels_within(0, cut[0], case)),
    "dead-labels": lambda case, cut: dead(0, cut[0], case),  # log-probs of -inf
    "dead": lambda case, cut: dead(0, VOCAB, case),
    "nothing": lambda case, cut: case._replace(
        labels=torch.full_like(case.labels, IGNORED),
        ref_logps=None if case.ref_logps is None else torch.zeros_like(case.ref_logps),
    ),
    "nan": lambda case, cut: with_nan(case),
    "grid": lambda case, cut: on_a_grid(case),
}
CURVED = {"softcap": 25.0, "logit_scale": 0.7, "temperature": 0.8}
PADDED = {"n": 6, "rewards": True, "group_size": torch.tensor([1, 3, 2]), **CURVED}
PACKED = {"lengths": [4, 0, 9, 5, 2], "rewards": True, "group_size": torch.tensor([2, 3]), **CURVED}
PAIRS = {"n": 6, "objective": "dpo"}
SCHEDULES = ["group", "deferred", "store", "recompute"]


def make_jobs() -> dict[str, Job]:
    jobs = {}
    for s in SCHEDULES:
        loss = [
            ("padded", Job("loss", s, PADDED)),
            ("packed", Job("loss", s, PACKED, CUTS["1+36"])),
            ("dpo-no-bias", Job("loss", s, PAIRS | {"bias": False}, CUTS["36+1"], needs=EVERYTHING[:2])),
            ("one-chunk", Job("loss", s, PADDED, CUTS["1+36"], 10**6)),
            ("ref-stacked", Job("loss", s, PADDED | {"reference_model": "hidden"}, CUTS["36+1"])),
            ("ref-own", Job("loss", s, PACKED | {"reference_model": "own"}, CUTS["1+36"])),
            ("ref-tokens", Job("loss", s, PACKED | {"reference_model": "tokens"})),
            ("offset", Job("loss", s, PAIRS | {"offset": -2000.0}, tolerance=1e-11)),
            ("frozen-head", Job("loss", s, PADDED, needs=("hidden",))),
            ("head-alone", Job("loss", s, PADDED, needs=("weight", "bias"))),
            ("float32", Job("loss", s, PADDED | {"dtype": torch.float32}, tolerance=1e-4)),
        ]
        edits = ["labels-first", "labels-second", "dead-first", "dead-second", "nothing"]
        loss += [(edit, Job("loss", s, PAIRS, edit=edit)) for edit in edits]
        jobs |= {f"loss-{s}-{name}": job for name, job in loss if (s, name) != ("deferred", "head-alone")}  # refused
    for s in SCHEDULES[1:]:
        jobs[f"loss-{s}-none"] = Job("loss", s, PADDED | {"reduction": "none", "weights": True})
        for function in ("tokens", "sums"):
            jobs[f"{function}-{s}"] = Job(function, s, PACKED, CUTS["36+1"])
        for edit in ("nan", "dead-labels"):
            jobs[f"tokens-{s}-{edit}"] = Job("tokens", s, {}, edit=edit)
    jobs["tokens-fp32-digits"] = Job("tokens", "recompute", {"dtype": torch.float32}, edit="grid", tolerance=2e-6)
    for name, cut in CUTS.items():
        jobs[f"entropy-{name}"] = Job("entropy", "recompute", PADDED, cut)
    for edit in ("dead-first", "dead-second", "dead-labels", "dead", "nan", "nothing", "labels-first"):
        jobs[f"entropy-{edit}"] = Job("entropy", "recompute", {}, edit=edit)
    jobs["entropy-offset"] = Job("entropy", "auto", {"offset": -2000.0}, tolerance=1e-11)
    jobs["entropy-score"] = Job("entropy", "auto", PACKED, CUTS["1+36"], needs=())
    jobs["loss-score"] = Job("loss", "auto", PACKED, needs=())
    jobs["loss-auto"] = Job("loss", "auto", PACKED, CUTS["1+36"])
    return jobs


JOBS = make_jobs()
# The interpreter runs only these, because a program takes it a millisecond.
SAMPLE = [
    "loss-group-padded", "loss-group-ref-stacked", "loss-group-dead-first", "loss-store-offset", "tokens-deferred",
    "tokens-recompute-nan", "entropy-1+36", "entropy-dead-second", "entropy-dead",
]  # fmt: skip
NAMES = SAMPLE if INTERPRETED else list(JOBS)
every_job = pytest.mark.parametrize("name", NAMES)


def shard(case: LinearCase, cut: tuple[int, int], rank: int) -> LinearCase:
    sharded = ("bias", "ref_weight", "ref_bias")
    options = {k: v.split(cut)[rank] if k in sharded and v is not None else v for k, v in case.options.items()}
    return case._replace(weight=case.weight.split(cut)[rank], options=options)


def answer(job: Job, case: LinearCase, impl: str = IMPL, **options: Any) -> dict[str, Tensor]:
    """Return the results of the call, and their gradients for fixed coefficients."""
    options |= {"schedule": job.schedule, "memory_budget": job.budget}
    if job.function == "loss":
        return linear_answer(case, impl, job.needs, **options)
    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.options.get("bias")}
    leaves = {k: x.detach().requires_grad_(k in job.needs) for k, x in leaves.items() if x is not None}
    arguments = case.selected(*HEAD, *LAYOUT) | options | {"impl": impl, "bias": leaves["bias"]}
    if job.function == "sums":
        results = [exo_kernels.linear_sequence_logps(leaves["hidden"], leaves["weight"], case.labels, **arguments)]
    else:
        arguments["return_entropy"] = job.function == "entropy"
        results = exo_kernels.linear_token_logps(leaves["hidden"], leaves["weight"], case.labels, **arguments)
        results = list(results) if job.function == "entropy" else [results]
    if job.needs:
        weights = [torch.randn(x.shape, generator=seeded(i), dtype=x.dtype) for i, x in enumerate(results)]
        if job.edit == "dead":  # without any probability, log-probs are -inf and entropies 0
            weights[0].zero_()
        torch.autograd.backward(results, weights)
    grads = {f"d_{k}": leaves[k].grad for k in job.needs}
    return {f"result {i}": x.detach() for i, x in enumerate(results)} | grads


def run_rank(rank: int, folder: str) -> None:
    """Run all jobs in one of the two processes, and save the results to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=minute)
    calls: list[str] = []
    for name in ("all_reduce", "all_gather"):
        setattr(dist, name, counted(getattr(dist, name), name, calls))
    answers = {name: run_job(JOBS[name], rank, calls) for name in NAMES}
    answers |= {"dtensor": dtensor(rank), "refusals": refusals(rank)}
    torch.save(answers, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def counted(function: Any, name: str, calls: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return call


def run_job(job: Job, rank: int, calls: list[str]) -> Answer:
    case = shard(job.case(), job.cut, rank)
    group = dist.group.WORLD
    calls.clear()
    result: Answer = answer(job, case, process_group=group)
    result["calls"] = list(calls)
    result["plan"] = explain(job, case, group)
    return result


def explain(job: Job, case: LinearCase, group: Any) -> Any:
    case = case._replace(
        hidden=case.hidden.requires_grad_("hidden" in job.needs),
        weight=case.weight.requires_grad_("weight" in job.needs),
    )
    if group is None:  # then labels beyond the shard's columns would be refused
        case = case._replace(labels=case.labels.clamp(max=len(case.weight) - 1))
    loss = job.function == "loss"
    options = case.selected("bias", "ref_hidden", "ref_weight", "cu_seqlens", "shift")
    options |= case.selected("group_size", "reduction") if loss else {"loss": False}
    return exo_kernels.explain(
        case.hidden, case.weight, case.labels, process_group=group, schedule=job.schedule, memory_budget=job.budget,
        impl=IMPL, **options,
    )  # fmt: skip


def dtensor(rank: int) -> Answer:
    """Call the functions with head and bias sharded unevenly over a mesh of two; for gradients the caller gathers."""
    from torch.distributed.tensor import Partial, Shard, distribute_tensor, init_device_mesh

    case = JOBS["loss-group-padded"].case()
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(case.options["bias"], mesh, [Shard(0)]).requires_grad_()
    messages = []
    for options in ({}, {"process_group": mesh.get_group()}):
        try:
            exo_kernels.linear_token_logps(case.hidden, weight, case.labels, **options)
        except ValueError as error:
            messages.append(str(error))
    with torch.no_grad():
        scored = exo_kernels.fused_linear_exo_loss(
            case.hidden, weight, case.labels, case.ref_logps, **case.with_options(bias=bias).options
        )
    # data parallel: the first rank has the first group, the second the others; the mean is over all groups
    sizes, first = case.options["group_size"], int(case.options["group_size"][0])
    local, groups = (slice(first), sizes[:1]) if rank == 0 else (slice(first, None), sizes[1:])
    full = weight.full_tensor(grad_placements=[Partial()]), bias.full_tensor(grad_placements=[Partial()])
    options = case.with_options(bias=full[1], num_groups=len(sizes), group_size=groups).options
    options |= {"rewards": case.options["rewards"][local]} if "rewards" in case.options else {}
    exo_kernels.fused_linear_exo_loss(
        case.hidden[local], full[0], case.labels[local], case.ref_logps[local], **options
    ).backward()
    assert weight.grad.placements == weight.placements and len(weight.grad.to_local()) < VOCAB
    gradients = {"d_weight": weight.grad.full_tensor(), "d_bias": bias.grad.full_tensor()}
    return {"loss": scored, **gradients, "refusals": messages}


def refusals(rank: int) -> Answer:
    """Return the messages of wrong calls, which every rank must refuse so that none waits for the other."""
    case = shard(JOBS["loss-group-padded"].case(), CUTS["20+17"], rank)
    messages = {}
    labels = case.labels.clone()
    labels[2, 3] = VOCAB
    other = [dist.new_group([i]) for i in range(2)][1 - rank]  # a group without this rank
    for name, y, group, impl in (
        ("label", labels, dist.group.WORLD, "auto"),
        ("member", case.labels, other, "auto"),
        ("oracle", case.labels, dist.group.WORLD, "reference"),
    ):
        for schedule in ("group", "recompute"):
            hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
            options = {"process_group": group, "impl": impl, "schedule": schedule}
            try:
                exo_kernels.fused_linear_exo_loss(hidden, weight, y, case.ref_logps, **options)
            except ValueError as error:
                messages[f"{name} {schedule}"] = str(error)
    return messages


def compiled(rank: int, folder: str) -> None:
    """Save loss and gradients of eager and compiled code in one of the two processes; check the error of fullgraph."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    case = shard(JOBS["loss-group-padded"].case(), CUTS["20+17"], rank)

    def both(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"process_group": dist.group.WORLD, **case.options}
        loss = exo_kernels.fused_linear_exo_loss(hidden * 1, weight, case.labels, case.ref_logps, **options)
        logps = exo_kernels.linear_token_logps(hidden * 2, weight, case.labels, process_group=dist.group.WORLD)
        return loss * 3 + logps.sum()

    results = []
    for function in (both, torch.compile(both, backend="aot_eager")):
        leaves = [case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="process_group: ranks gather the sizes"):
        torch.compile(both, backend="aot_eager", fullgraph=True)(*leaves)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Answer]]:
    """Return the results of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=2)
    with torch.serialization.safe_globals([Plan]):
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@every_job
def test_two_ranks_equal_one_process(impl, device, answers, name):
    if device != "cpu":
        pytest.skip("gloo runs on the CPU")
    job, ranks = JOBS[name], [rank[name] for rank in answers]
    expected = answer(job, job.case())
    assert job.edit in ("nothing", "dead-labels", "nan", "dead") or expected.get("d_hidden", torch.ones(1)).any()
    for key, value in expected.items():
        first, second = (rank[key] for rank in ranks)
        if key in ("d_weight", "d_bias"):
            first = torch.cat([first, second])
        else:
            assert torch.equal(first.nan_to_num(7e77), second.nan_to_num(7e77)), f"{key}: ranks differ"
        scale = value[value.isfinite()].abs().amax().item() if value.isfinite().any() else 0.0
        torch.testing.assert_close(
            first, value, rtol=0, atol=job.tolerance * max(1.0, scale), equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
        )


@every_job
def test_number_of_collectives(impl, device, answers, name):
    """Check that both ranks call the same collectives, also if one has 1 column and the other 36."""
    if device != "cpu":
        pytest.skip("gloo runs on the CPU")
    job, (first, second) = JOBS[name], (rank[name] for rank in answers)
    assert first["calls"] == second["calls"] and first["plan"] == second["plan"]
    plan, model = first["plan"], job.changes.get("reference_model")
    sides = 2 if model == "hidden" else 1
    reduced = 2 * sides * plan.chunks
    if plan.schedule == "deferred":  # computes dH in the forward pass, even if it is not required
        reduced += plan.chunks > 0
    else:
        reduced += "hidden" in job.needs
    if model == "own":
        largest = shard(job.case(), job.cut, job.cut.index(max(job.cut)))
        reference_plan = explain(job._replace(needs=()), largest, None)
        reduced += 2 * reference_plan.chunks
    assert first["calls"].count("all_reduce") == reduced
    assert first["calls"].count("all_gather") == (2 if model == "own" else 1)


def test_jobs_have_several_chunks_and_oversized_groups(answers):
    """Check that jobs have several chunks and oversized groups, so that the tests above cover these."""
    plan = answers[0]["loss-group-padded"]["plan"]
    assert plan.chunks > 2 and plan.oversized_groups
    if not INTERPRETED:
        assert answers[0]["loss-group-one-chunk"]["plan"].chunks == 1
        assert answers[0]["loss-store-nothing"]["plan"].chunks == 0
    job = JOBS["loss-group-packed"]
    plans = [explain(job, shard(job.case(), CUTS["1+36"], rank), None) for rank in range(2)]
    assert plans[0].chunks != plans[1].chunks  # without a process group, the ranks choose different chunks


def test_a_dtensor_over_two_ranks_is_gathered(answers):
    job = JOBS["loss-group-padded"]
    expected = answer(job._replace(budget=2**29), job.case(), "chunked")
    for rank in answers:
        for key in ("loss", "d_weight", "d_bias"):
            torch.testing.assert_close(rank["dtensor"][key], expected[key], rtol=0, atol=1e-12)
        dtensor_error, group_error = rank["dtensor"]["refusals"]
        assert dtensor_error.startswith("weight: expected the whole head")
        assert "grad_placements=[Partial()]" in dtensor_error
        assert group_error.startswith("weight: expected with process_group, a plain tensor")


def test_all_ranks_raise_the_same_errors(answers):
    first, second = (rank["refusals"] for rank in answers)
    assert first == second and len(first) == 6
    for schedule in ("group", "recompute"):
        assert first[f"label {schedule}"].startswith(f"labels: expected values in [0, {VOCAB})")
        assert first[f"member {schedule}"].startswith("process_group: expected a torch.distributed.ProcessGroup")
        assert first[f"oracle {schedule}"].startswith("process_group: expected None with impl='reference'")


@pytest.mark.slow
def test_compiled_code_breaks_its_graph_and_equals_eager(tmp_path):
    """Check that compiled code gives the same bits; with fullgraph=True the error names the argument."""
    torch.multiprocessing.spawn(compiled, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        eager, result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(eager, result, strict=True))
