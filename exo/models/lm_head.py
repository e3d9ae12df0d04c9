"""The head of a causal LM apart from its body: hidden states without logits, for losses that make their own.

What a model does with its head's output (a scale, a softcap, both, nothing) is not looked up by name, because names
differ and lie: two families mean opposite things by `logits_scaling`. It is measured, once, on a few numbers, and the
head's own forward is compared with what the losses will compute. Heads that compute anything else are refused.
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
    """Dropout off for the while; each module gets its own mode back, since they may differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class LMHead:
    """Where a causal LM's logits come from: softcap(logit_scale * (hidden weight^T + bias)).

        head = CausalHead(model)
        hidden = head.hidden(input_ids=ids, attention_mask=mask)  # (N, T, D)
        loss = fused_linear_exo_loss(hidden, head.weight, labels, ref_logps, **head.options)

    Runs the model twice on two tokens, without gradients and without moving any random state. ValueError for a model
    whose logits are something else.
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
        """Keyword arguments of the functions on hidden states."""
        return {"bias": self.head.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def hidden(self, **inputs: Any) -> Tensor:  # (N, T, D)
        """What the model would put into its head, given the arguments of its forward."""
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return hidden[..., :1]  # what the model does with its logits costs nothing on so few

        with self._instead(catch):
            self.model(**inputs)
        return caught[0]

    @contextmanager
    def _instead(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The head computes `forward`. Its hooks run as ever, those of sharded parameters among them; what has replaced
        its forward itself, as offloading does, stands aside.
        """
        own = vars(self.head)  # an instance's attribute comes before its class's method
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
        """Scale and softcap, from what the model makes of chosen numbers in the place of its head's."""
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
        """ValueError unless the model's logits of random hidden states are those that the losses compute of them.

        The head is in training mode, so that one with a dropout of its own is refused too.
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
