"""The LM head of a causal LM: hidden states without logits, for losses that take the head's weight.

Names do not tell what a model does with its head's output: two families use `logits_scaling` with opposite meanings. So
the scale and the softcap are measured once on a few numbers, and the head's forward is compared with what the losses
compute. Heads that compute anything else are refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exo.distributed import fsdp

SMALL, LARGE = 2.0**-10, 2.0**20  # below any curvature of a softcap; beyond its end
FIT = 1e-5  # relative


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside the context. Every module gets its previous mode back, because modes may differ."""
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
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return hidden[..., :1]  # the model processes these few "logits" at no cost

        with self._instead(catch):
            self.model(**inputs)
        return caught[0]

    @contextmanager
    def _instead(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the head's forward inside the context. Its hooks still run (sharded parameters need them); a forward
        that something else replaced, such as offloading, is restored afterwards.
        """
        own = vars(self.head)  # an instance attribute takes precedence over the class's method
        before = own.get("forward")
        own["forward"] = forward
        try:
            yield
        finally:
            del own["forward"]
            if before is not None:
                own["forward"] = before

    @torch.no_grad()
    def _measure(self) -> tuple[float, float | None]:
        """Measure scale and softcap from the logits for chosen outputs of the head."""
        device = self.head.weight.device
        probe = torch.tensor([SMALL, LARGE, 1.0, -3.0, 20.0, -50.0, 0.0], dtype=torch.float32, device=device)
        with eval_mode(self.model), self._instead(lambda hidden: probe.expand(*hidden.shape[:-1], -1)):
            two = torch.zeros(1, 2, dtype=torch.long, device=device)
            made = fsdp.run_unsharded_root(self.model, partial(self.model, input_ids=two)).logits[0, -1].float()
        scale, top = made[0].item() / SMALL, made[1].item()
        softcap = None if abs(top - scale * LARGE) <= FIT * abs(top) else top
        if softcap is not None and abs(scale - 1) < 1e-6:
            scale = 1.0  # tanh rounds
        expected = scale * probe if softcap is None else softcap * torch.tanh(scale * probe / softcap)
        if not (scale > 0 and (softcap is None or softcap > 0) and torch.allclose(made, expected, FIT, FIT)):
            raise ValueError(
                f"model {type(self.model).__name__}: expected logits softcap(scale * head(hidden)); got a model that "
                f"makes {[round(x, 4) for x in made.tolist()]} of {probe.tolist()}"
            )
        return scale, softcap

    @torch.no_grad()
    def _compare(self) -> None:
        """Raise ValueError unless the logits of random hidden states equal those that the losses compute.

        The head is in training mode, so a head with dropout is refused too.
        """
        own, device = self.head.forward, self.head.weight.device
        hidden = torch.randn(self.head.in_features, generator=torch.Generator().manual_seed(0))
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)

        def logits() -> tuple[Tensor, Tensor]:
            weight, bias = self.head.weight, self.head.bias
            states = hidden.to(device, weight.dtype)
            states = (states / (states @ weight.T).abs().amax().clamp(min=1e-30)).expand(
                1, 2, -1
            )  # no softcap saturates
            with self._instead(lambda given: own(states.to(given.dtype))):
                made = self.model(input_ids=ids).logits
            plain = nn.functional.linear(states, weight, bias)
            return made, plain

        devices = [device] if device.type == "cuda" else []
        with eval_mode(self.model), torch.random.fork_rng(devices=devices):
            self.head.train()
            made, plain = fsdp.run_unsharded_root(self.model, logits)
        expected = self.logit_scale * plain.double()
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        eps = max(torch.finfo(dtype).eps for dtype in (made.dtype, plain.dtype))
        off = float((made.double() - expected).abs().amax()) if made.shape == expected.shape else float("inf")
        if not off <= max(FIT, 8 * eps) * float(expected.abs().amax()):
            raise ValueError(
                f"model {type(self.model).__name__}: expected logits softcap(scale * (hidden weight^T + bias)); got "
                f"others, which differ by {off:.2g}: its head ({type(self.head).__name__}) or what follows it computes "
                "something else; use a model with a plain linear head"
            )
