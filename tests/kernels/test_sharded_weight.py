"""Sharded heads: a DTensor is gathered once, and other sharded parameters are refused with the cause."""

import re

import pytest
import torch
import torch.distributed as dist
from linear_cases import LinearCase, linear_answer, make_linear_case
from torch import Tensor, nn

import exo_kernels

tensor = pytest.importorskip("torch.distributed.tensor")
FUNCTIONS = {
    "loss": exo_kernels.fused_linear_exo_loss,
    "tokens": exo_kernels.linear_token_logps,
    "sums": exo_kernels.linear_sequence_logps,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(scope="module")
def mesh():
    """Return a mesh of one process; test_vocab_parallel.py uses two."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield tensor.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def case() -> LinearCase:
    return make_linear_case(4, 5, 8, 37, torch.float64)


def call(name: str, case: LinearCase, **changes) -> Tensor:
    """Call a function on the case, with some arguments replaced."""
    arguments = {"hidden": case.hidden, "weight": case.weight, "labels": case.labels, **case.options}
    if name == "loss" and "ref_hidden" not in changes:
        arguments["ref_logps"] = case.ref_logps
    return FUNCTIONS[name](**(arguments | changes))


def refusal(name: str, case: LinearCase, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        call(name, case, **changes)
    message = str(caught.value)
    assert re.fullmatch(r"\w+: expected [^\n]+; got [^\n]+", message), message
    return message


@pytest.mark.parametrize("schedule", ["auto", "deferred", "group", "store", "recompute"])
@pytest.mark.parametrize("placement", [tensor.Shard(0), tensor.Shard(1), tensor.Replicate()], ids=repr)
def test_a_dtensor_is_gathered_once(mesh, case, schedule, placement, monkeypatch):
    """Check that loss and gradients equal those of a plain weight, and that gradients are placed as the weight is."""
    gathered = []
    full_tensor = tensor.DTensor.full_tensor
    monkeypatch.setattr(tensor.DTensor, "full_tensor", lambda x, **o: gathered.append(1) or full_tensor(x, **o))
    rows = placement if placement != tensor.Shard(1) else tensor.Shard(0)  # a bias has only one dimension to shard
    weight = tensor.distribute_tensor(case.weight, mesh, [placement]).requires_grad_()
    bias = tensor.distribute_tensor(case.options["bias"], mesh, [rows]).requires_grad_()
    hidden = case.hidden.detach().requires_grad_()
    loss = call("loss", case, hidden=hidden, weight=weight, bias=bias, schedule=schedule)
    loss.backward()
    assert len(gathered) == 2  # the weight and the bias
    expected = linear_answer(case, "auto", schedule=schedule)
    assert torch.equal(loss.detach(), expected["loss"]) and torch.equal(hidden.grad, expected["d_hidden"])
    for name, leaf in (("d_weight", weight), ("d_bias", bias)):
        assert isinstance(leaf.grad, tensor.DTensor) and leaf.grad.placements == leaf.placements
        assert torch.equal(full_tensor(leaf.grad), expected[name])


@every_function
def test_every_function_takes_a_dtensor(mesh, case, name):
    weight = tensor.distribute_tensor(case.weight, mesh, [tensor.Shard(0)])
    assert torch.equal(call(name, case, weight=weight), call(name, case))


def test_a_reference_head_may_be_a_dtensor(mesh):
    case = make_linear_case(4, 5, 8, 37, torch.float64, reference_model="own")
    weight = tensor.distribute_tensor(case.options["ref_weight"], mesh, [tensor.Shard(0)])
    options = {"ref_hidden": case.options["ref_hidden"]}
    assert torch.equal(call("loss", case, **options, ref_weight=weight), call("loss", case, **options))


def test_fsdp_weight_inside_and_outside_forward(mesh, case):
    """Check that the weight is a plain tensor inside forward, a DTensor outside, and the gradient is the same."""
    from torch.distributed.fsdp import fully_shard

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Parameter(case.weight.clone())

        def forward(self, inside: bool) -> Tensor:
            assert not isinstance(self.head, tensor.DTensor)
            return call("loss", case, weight=self.head) if inside else self.head.sum() * 0

    model = fully_shard(Model(), mesh=mesh)
    model(True).backward()
    expected = linear_answer(case, "auto")["d_weight"]
    assert torch.equal(model.head.grad.full_tensor(), expected)
    model.head.grad = None
    assert isinstance(model.head, tensor.DTensor)
    call("loss", case, weight=model.head).backward()
    assert torch.equal(model.head.grad.full_tensor(), expected)


@every_function
def test_hidden_states_as_dtensors_are_refused(mesh, case, name):
    spread = tensor.distribute_tensor(case.hidden, mesh, [tensor.Shard(0)])
    assert refusal(name, case, hidden=spread).startswith("hidden: expected a plain tensor")
    if name == "loss":
        assert refusal(name, case, ref_hidden=spread).startswith("ref_hidden: expected a plain tensor")


@every_function
@pytest.mark.parametrize("argument", ["weight", "bias"])
def test_a_dtensor_beside_a_process_group_is_refused(mesh, case, name, argument):
    """Check that they exclude each other: both describe how rows are sharded and could disagree."""
    full = case.weight if argument == "weight" else case.options["bias"]
    part = tensor.distribute_tensor(full, mesh, [tensor.Shard(0)])
    message = refusal(name, case, process_group=dist.group.WORLD, **{argument: part})
    assert message.startswith(f"{argument}: expected with process_group, a plain tensor") and "to_local()" in message


@every_function
@pytest.mark.parametrize("argument", ["weight", "bias"])
def test_reference_impl_refuses_dtensors(mesh, case, name, argument):
    full = case.weight if argument == "weight" else case.options["bias"]
    part = tensor.distribute_tensor(full, mesh, [tensor.Shard(0)])
    message = refusal(name, case, impl="reference", **{argument: part})
    assert message.startswith(f"{argument}: expected a plain tensor")


SHARDED = {
    "zero-3": torch.empty(0),  # a parameter that DeepSpeed has sharded
    "fsdp-no-rows": torch.empty(0, 8),
    "fsdp-flat": torch.zeros(100),  # FSDP1 with use_orig_params
}


@every_function
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", SHARDED)
def test_empty_or_flat_weight_is_refused_with_the_cause(case, name, kind, impl):
    message = refusal(name, case, weight=SHARDED[kind].double(), impl=impl)
    assert message.startswith("weight: expected the whole head")
    assert "ZeRO-3" in message and "FSDP" in message and "summon_full_params" in message


def test_empty_bias_and_reference_head_are_refused(mesh, case):
    assert refusal("loss", case, bias=torch.empty(0).double()).startswith("bias: expected the whole head")
    separate = make_linear_case(4, 5, 8, 37, torch.float64, reference_model="own")
    options = {"ref_hidden": separate.options["ref_hidden"], "ref_weight": torch.empty(0).double()}
    assert refusal("loss", separate, **options).startswith("ref_weight: expected the whole head")
    empty = torch.empty(0, 8).double()
    assert "ZeRO-3" in refusal("loss", case, weight=empty, bias=None, process_group=dist.group.WORLD)


@pytest.mark.parametrize("group", [-100, "tp", object()], ids=["not-a-member", "name", "object"])
def test_invalid_process_group_is_refused(case, group):
    """Check values that are no process group; new_group returns an integer to processes that are not members."""
    assert refusal("tokens", case, process_group=group).startswith("process_group: expected a torch.distributed")
