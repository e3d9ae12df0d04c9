"""Run a causal LM up to its head, for losses that take hidden states and the head's weight.

Config names do not define what a model does with its head's output: two families use `logits_scaling` with opposite
meanings. So the scale and the softcap are measured once on a few numbers, and the model's logits are compared with what
the losses compute. Heads that compute anything else are refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exo.distributed import fsdp

SMALL, LARGE = 2.0**-10, 2.0**20  # where a softcap is linear, and where it is saturated
FIT = 1e-5  # relative


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the context, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class LMHead:
    """The head of a causal LM, whose logits are softcap(logit_scale * (hidden weight^T + bias)).

        head = LMHead(model)
        hidden = head.hidden(input_ids=ids, attention_mask=mask)  # (N, T, D)
        loss = fused_linear_exo_loss(hidden, head.weight, labels, ref_logps, **head.options)

    Runs the model twice on two tokens, without gradients and without changing any random state. Raises ValueError for a
    model whose logits are something else.
    """

    def __init__(self, model: nn.Module) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if hasattr(head, "base_layer"):
            raise ValueError(
                f"model {type(model).__name__}: expected a head without an adapter; got one: merge it, or leave the "
                "head out of the adapter's target_modules"
            )
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"model {type(model).__name__}: expected a linear layer as its head; got {type(head).__name__}"
            )
        self.model, self.head = model, head
        self.logit_scale, self.softcap = self._measure()
        self._compare()

    @property
    def weight(self) -> Tensor:  # (V, D)
        return self.head.weight

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments bias, logit_scale and softcap of the functions on hidden states."""
        return {"bias": self.head.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def hidden(self, **inputs: Any) -> Tensor:  # (N, T, D)
        """Return the input of the head, given the arguments of the model's forward."""
        captured: list[Tensor] = []

        def capture(hidden: Tensor) -> Tensor:
            captured.append(hidden)
            return hidden[..., :1]  # the model processes these few "logits" at no cost

        with self._head_replaced(capture):
            self.model(**inputs)
        return captured[0]

    @contextmanager
    def _head_replaced(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the head's forward inside the context. Its hooks still run, because sharded parameters need them."""
        attributes = vars(self.head)  # an instance attribute takes precedence over the class's method
        previous = attributes.get("forward")  # such as that of offloading
        attributes["forward"] = forward
        try:
            yield
        finally:
            del attributes["forward"]
            if previous is not None:
                attributes["forward"] = previous

    @torch.no_grad()
    def _measure(self) -> tuple[float, float | None]:
        """Measure scale and softcap from the logits for chosen outputs of the head."""
        device = self.head.weight.device
        probe = torch.tensor([SMALL, LARGE, 1.0, -3.0, 20.0, -50.0, 0.0], dtype=torch.float32, device=device)
        with eval_mode(self.model), self._head_replaced(lambda hidden: probe.expand(*hidden.shape[:-1], -1)):
            two = torch.zeros(1, 2, dtype=torch.long, device=device)
            outputs = fsdp.run_unsharded_root(self.model, partial(self.model, input_ids=two))
        logits = outputs.logits[0, -1].float()
        scale, top = logits[0].item() / SMALL, logits[1].item()
        softcap = None if abs(top - scale * LARGE) <= FIT * abs(top) else top
        if softcap is not None and abs(scale - 1) < 1e-6:
            scale = 1.0  # tanh rounds
        expected = scale * probe if softcap is None else softcap * torch.tanh(scale * probe / softcap)
        if not (scale > 0 and (softcap is None or softcap > 0) and torch.allclose(logits, expected, FIT, FIT)):
            raise ValueError(
                f"model {type(self.model).__name__}: expected logits softcap(scale * head(hidden)); got a model that "
                f"computes {[round(x, 4) for x in logits.tolist()]} from {probe.tolist()}"
            )
        return scale, softcap

    @torch.no_grad()
    def _compare(self) -> None:
        """Raise ValueError unless the logits of random hidden states equal those that the losses compute.

        The head is in training mode, so a head with dropout is refused too.
        """
        forward, device = self.head.forward, self.head.weight.device
        hidden = torch.randn(self.head.in_features, generator=torch.Generator().manual_seed(0))
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)

        def logits() -> tuple[Tensor, Tensor]:
            weight, bias = self.head.weight, self.head.bias
            states = hidden.to(device, weight.dtype)
            states = states / (states @ weight.T).abs().amax().clamp(min=1e-30)  # saturates no softcap
            states = states.expand(1, 2, -1)
            with self._head_replaced(lambda replaced: forward(states.to(replaced.dtype))):
                outputs = self.model(input_ids=ids).logits
            return outputs, nn.functional.linear(states, weight, bias)

        devices = [device] if device.type == "cuda" else []
        with eval_mode(self.model), torch.random.fork_rng(devices=devices):
            self.head.train()
            actual, linear = fsdp.run_unsharded_root(self.model, logits)
        expected = self.logit_scale * linear.double()
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        eps = max(torch.finfo(dtype).eps for dtype in (actual.dtype, linear.dtype))
        error = float((actual.double() - expected).abs().amax()) if actual.shape == expected.shape else float("inf")
        if not error <= max(FIT, 8 * eps) * float(expected.abs().amax()):
            raise ValueError(
                f"model {type(self.model).__name__}: expected logits softcap(scale * (hidden weight^T + bias)); got "
                f"others, which differ by {error:.2g}: its head ({type(self.head).__name__}) or the code after it "
                "computes something else; use a model with a plain linear head"
            )
