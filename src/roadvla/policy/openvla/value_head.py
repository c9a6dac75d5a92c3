"""The critic on OpenVLA: RL4VLA's value head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from roadvla.errors import UserError

_WIDTHS = (512, 128)


class ValueHead(nn.Module):
    """RL4VLA's critic: three layers on the state that predicts the first action token ("a0").

    It starts with weights from N(0, 0.02²) and zero biases, which is what RL4VLA's runs start with
    in effect (reading R23). Always float32.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.head_l1 = nn.Linear(hidden, _WIDTHS[0])
        self.head_l2 = nn.Linear(*_WIDTHS)
        self.head_l3 = nn.Linear(_WIDTHS[1], 1, bias=False)

    def forward(self, state: Float[Tensor, "B H"]) -> Float[Tensor, " B"]:
        """Value of each state, in units of return."""
        x = F.gelu(self.head_l1(state.float()))
        return self.head_l3(F.gelu(self.head_l2(x))).squeeze(-1)

    def load(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Take stored weights.

        Args:
            weights: By name, without a prefix.
            source: Named in errors.

        Raises:
            UserError: If names or shapes are others.
        """
        self.check_fit(weights, source)
        self.load_state_dict({name: weight.float() for name, weight in weights.items()})

    def check_fit(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Compare stored weights' names and shapes with this head's.

        Raises:
            UserError: If one is another.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | weights.keys()):
            if name not in own or name not in weights or own[name].shape != weights[name].shape:
                wanted = tuple(own[name].shape) if name in own else "nothing"
                found = tuple(weights[name].shape) if name in weights else "nothing"
                raise UserError(
                    f"the value head of {source} does not fit: {name} is {found}, expected "
                    f"{wanted}; only RL4VLA's head on the first action token's state is supported"
                )

    def reset(self, seed: int = 0) -> None:
        """Draw the initial weights."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("bias"):
                    weight.zero_()
                else:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
