"""Bad input to the functions on hidden states raises one line: the argument, what was expected, what was given.

test_bad_input.py and test_bad_options.py test the arguments that the functions on logits also have (labels, layouts,
rewards, betas), test_sharded_weight.py sharded weights, and this file all other arguments.
"""

import re

import pytest
import torch

import exo_kernels
from exo_kernels import EXOLoss, LinearEXOLoss
from exo_kernels.validation import describe

N, T, D, V = 4, 3, 5, 7
LOSSES = ["fused_linear_exo_loss", "fused_linear_dpo_loss"]
FUNCTIONS = ["linear_token_logps", "linear_sequence_logps", *LOSSES]
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_loss = pytest.mark.parametrize("function", LOSSES)


def good(function: str) -> dict:
    arguments = {"hidden": torch.zeros(N, T, D), "weight": torch.zeros(V, D)}
    arguments["labels"] = torch.ones(N, T, dtype=torch.long)
    return arguments | ({"ref_logps": torch.zeros(N)} if function in LOSSES else {})


def assert_refused(argument: str, function: str, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        getattr(exo_kernels, function)(**(good(function) | changes))
    message = str(caught.value)
    assert re.fullmatch(argument + r": expected [^\n]+; got [^\n]+", message), message
    assert len(message) < 400
    return message


@every_function
def test_valid_arguments_are_accepted(function):
    assert getattr(exo_kernels, function)(**good(function)).isfinite().all()


@every_function
@pytest.mark.parametrize(
    "bad",
    [
        None, [[0.0]], torch.zeros(N, T, D, dtype=torch.long), torch.zeros(D), torch.zeros(N, T, 0),
        torch.zeros(1, N, T, D),
    ],
    ids=["none", "a-list", "integers", "one-dimension", "no-width", "four-dimensions"],
)  # fmt: skip
def test_hidden(function, bad):
    assert_refused("hidden", function, hidden=bad)


@every_function
@pytest.mark.parametrize(
    "bad",
    [
        None, [[0.0]], torch.zeros(V, D, dtype=torch.long), torch.zeros(D, V), torch.zeros(V), torch.zeros(1, V, D),
        torch.zeros(0, D), torch.zeros(V, D, device="meta"), torch.zeros(V, D).to(torch.float8_e4m3fn),
    ],
    ids=["none", "a-list", "integers", "transposed", "flat", "three-dimensions", "empty", "elsewhere", "float8"],
)  # fmt: skip
def test_weight(function, bad):
    assert_refused("weight", function, weight=bad)


@every_function
@pytest.mark.parametrize("bad", [0.0, torch.zeros(V + 1), torch.zeros(V, 1), torch.zeros(V, dtype=torch.long)], ids=str)
def test_bias(function, bad):
    assert_refused("bias", function, bias=bad)


@every_function
@pytest.mark.parametrize("name", ["logit_scale", "softcap", "temperature"])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), "1", True, torch.tensor(1.0)], ids=str)
def test_numbers_of_the_logit_transform(function, name, bad):
    assert_refused(name, function, **{name: bad})


@every_function
def test_options(function):
    assert "'512MiB'" in assert_refused("memory_budget", function, memory_budget="lots")
    assert "'deferred'" in assert_refused(
        "schedule", function, schedule="fast", weight=torch.zeros(V, D, requires_grad=True)
    )
    assert_refused("impl", function, impl="cuda")
    assert_refused("labels", function, labels=torch.full((N, T), V))
    assert_refused("process_group", function, process_group="world")


@every_function
@pytest.mark.parametrize(
    "bad", [0, -1, 2**63, 10**400, 10**5000, "9" * 400 + "GiB", "1e3", "-1", "0", "٣", "nan", True], ids=describe
)
def test_memory_budget(function, bad):
    assert_refused("memory_budget", function, memory_budget=bad)


def test_memory_budget_larger_than_any_machine():
    assert exo_kernels.linear_token_logps(**good("linear_token_logps"), memory_budget=2**63 - 1).isfinite().all()
    assert exo_kernels.linear_token_logps(**good("linear_token_logps"), memory_budget="9999999999GiB").isfinite().all()


REFUSED_BY_EXPLAIN = {
    "group_size": [3, 0, 10**400, torch.tensor([1, 2]), torch.tensor([4, 0]), 2.0],
    "labels": [torch.full((N, T), V), torch.ones(N, T), torch.ones(N, T - 1, dtype=torch.long)],
    "reduction": ["average", None],
    "schedule": ["fast"],
    "ref_weight": [torch.zeros(V, D)],
    "ref_bias": [torch.zeros(V)],
    "ref_hidden": [torch.zeros(N, T - 1, D), torch.zeros(N, T, D, dtype=torch.long), torch.zeros(N, T, D).to("meta")],
    "return_entropy": [True, "yes"],
    "memory_budget": [10**400, "lots"],
    "ignore_index": [2**63],
    "softcap": [0.0, 1e300],
    "loss": [None],
}


@pytest.mark.parametrize("argument", REFUSED_BY_EXPLAIN)
def test_explain_refuses_what_the_call_refuses(argument):
    arguments = {name: value for name, value in good("explain").items() if name != "ref_logps"}
    arguments["hidden"].requires_grad_()
    assert exo_kernels.explain(**arguments).schedule == "deferred"
    for bad in REFUSED_BY_EXPLAIN[argument]:
        with pytest.raises(ValueError, match=rf"^{argument}: expected [^\n]+; got [^\n]+$"):
            exo_kernels.explain(**(arguments | {argument: bad}))


def test_explain_with_a_separate_reference_head():
    arguments = {name: value for name, value in good("explain").items() if name != "ref_logps"}
    wrong = {"ref_hidden": torch.zeros(N, T, D), "ref_weight": torch.zeros(V, D + 1)}
    with pytest.raises(ValueError, match="^ref_weight: expected shape"):
        exo_kernels.explain(**arguments, **wrong)
    with pytest.raises(ValueError, match="^ref_hidden: expected None with loss=False"):
        exo_kernels.explain(**arguments, ref_hidden=torch.zeros(N, T, D), loss=False)
    with pytest.raises(ValueError, match="^hidden: expected a tensor with values"):
        exo_kernels.explain(**{name: value.to("meta") for name, value in arguments.items()})


@every_loss
def test_schedules_of_losses(function):
    weight = torch.zeros(V, D, requires_grad=True)
    message = assert_refused("schedule", function, weight=weight, schedule="group", reduction="none")
    assert "reduction 'mean' or 'sum'" in message


@pytest.mark.parametrize("function", ["linear_token_logps", "linear_sequence_logps"])
def test_schedules_of_log_probs(function):
    assert_refused("schedule", function, weight=torch.zeros(V, D, requires_grad=True), schedule="group")


@every_loss
def test_the_reference_model(function):
    hidden = torch.zeros(N, T, D)
    assert assert_refused("ref_logps", function, ref_logps=None).endswith("got neither")
    assert assert_refused("ref_logps", function, ref_hidden=hidden).endswith("got both")
    assert_refused("ref_weight", function, ref_weight=torch.zeros(V, D))
    assert_refused("ref_bias", function, ref_bias=torch.zeros(V))
    no_logps = {"ref_logps": None}
    assert_refused("ref_hidden", function, ref_hidden=hidden[:, :2], **no_logps)
    assert_refused("ref_hidden", function, ref_hidden=hidden[..., :2], **no_logps)
    assert_refused("ref_hidden", function, ref_hidden=hidden.to("meta"), **no_logps)
    assert_refused("ref_hidden", function, ref_hidden=hidden.long(), **no_logps)
    narrow = {"ref_hidden": hidden[..., :2], "ref_weight": torch.zeros(V, 2)}  # the reference may be a smaller model
    assert getattr(exo_kernels, function)(**(good(function) | no_logps | narrow)).isfinite()
    assert_refused("ref_weight", function, ref_hidden=hidden, ref_weight=torch.zeros(V, D + 1), **no_logps)


def test_modules_refuse_unknown_options():
    with pytest.raises(ValueError, match=r"^beta: expected an option: group_size, .*; got an unknown one$"):
        EXOLoss(beta=0.1)
    with pytest.raises(ValueError, match=r"^objective: expected one of 'exo', 'dpo'; got 'ppo'"):
        LinearEXOLoss(objective="ppo")


@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_modules_equal_the_functions(objective):
    """Check that options of the call override those of the constructor, and that the state dict is empty."""
    arguments = good("fused_linear_exo_loss")
    hidden, weight, labels, ref = (torch.randn_like(x) if x.is_floating_point() else x for x in arguments.values())
    rewards = torch.randn(N)
    module = LinearEXOLoss(objective=objective, group_size=4, beta_pi=0.7, softcap=2.0)
    function = getattr(exo_kernels, f"fused_linear_{objective}_loss")
    result = module(hidden, weight, labels, ref, rewards=rewards, group_size=2)
    expected = function(hidden, weight, labels, ref, rewards=rewards, group_size=2, beta_pi=0.7, softcap=2.0)
    assert torch.equal(result, expected)
    logits = hidden @ weight.T
    result = EXOLoss(objective=objective, reduction="none")(logits, labels, ref)
    assert torch.equal(result, getattr(exo_kernels, f"fused_{objective}_loss")(logits, labels, ref, reduction="none"))
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module) == f"LinearEXOLoss(objective='{objective}', group_size=4, beta_pi=0.7, softcap=2.0)"
