"""Small models whose blocks cannot be run one after the other, each for a reason of its own."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

WIDTH = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 20)
        self.down = nn.Linear(20, WIDTH)

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
        hidden = hidden_states if extra is None else hidden_states + extra
        return hidden_states + self.down(self.up(hidden).tanh())


class Plain(nn.Module):
    """Nothing passes but the hidden states: the one here that can be taken apart."""

    block: type[Block] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, WIDTH)
        self.layers = nn.ModuleList([self.block() for _ in range(3)])

    def forward(self, input_ids: Tensor, use_cache: bool = False, attention_mask: Tensor | None = None) -> Any:
        return self.run(self.embedding(input_ids))

    def run(self, hidden: Tensor) -> Any:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class ReturnsState(Plain):
    """Each block returns something that the model hands to the next."""

    class block(Block):
        def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Any:
            return super().forward(hidden_states, extra), hidden_states.mean(1, keepdim=True)

    def run(self, hidden: Tensor) -> Tensor:
        state = None
        for layer in self.layers:
            hidden, state = layer(hidden, state)
        return hidden


class LeavesStateBehind(Plain):
    """A later block reads what an earlier one wrote; right for the latest window and wrong for all others."""

    class block(Block):
        board: ClassVar[list[Tensor]] = []

        def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
            if len(self.board) == 1:
                extra = self.board[0]
            else:
                self.board.append(hidden_states.flip(1))
            return super().forward(hidden_states, extra)

    def run(self, hidden: Tensor) -> Tensor:
        self.layers[0].board.clear()
        return super().run(hidden)


class OverwritesState(LeavesStateBehind):
    """The same without a reset: the first block always overwrites, so that one window alone looks right."""

    class block(Block):
        board: ClassVar[list[Tensor]] = []
        first = False

        def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
            if self.first:
                self.board[:] = [hidden_states.flip(1)]
                return super().forward(hidden_states)
            return super().forward(hidden_states, self.board[0])

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].first = True

    def run(self, hidden: Tensor) -> Tensor:
        return Plain.run(self, hidden)


class RemembersItself(Plain):
    """A block reads what it left behind itself: right as long as every window goes through it once."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.before: Tensor | None = None

        def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Tensor:
            if self.before is not None and torch.equal(self.before, hidden_states):
                extra = hidden_states.flip(1)
            self.before = hidden_states.clone()
            return super().forward(hidden_states, extra)


class AddsBetweenBlocks(Plain):
    def run(self, hidden: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden) + number
        return hidden


class RunsBlocksTwice(Plain):
    def run(self, hidden: Tensor) -> Tensor:
        return super().run(super().run(hidden))


class RunsBackwards(Plain):
    def run(self, hidden: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            hidden = layer(hidden)
        return hidden


class ReturnsDictionary(Plain):
    class block(Block):
        def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> Any:
            return {"hidden": super().forward(hidden_states, extra)}

    def run(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)["hidden"]
        return hidden


class OtherArgumentName(Plain):
    class block(Block):
        def forward(self, *, states: Tensor) -> Any:
            return super().forward(states)

    def run(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(states=hidden)
        return hidden


class SkipsABlock(Plain):
    """Layer drop, early exit: a block that does not run for every input."""

    def run(self, hidden: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number != 1 or hidden.shape[0] > 1:
                hidden = layer(hidden)
        return hidden


STATEFUL = (
    ReturnsState,
    LeavesStateBehind,
    OverwritesState,
    AddsBetweenBlocks,
    RunsBlocksTwice,
    ReturnsDictionary,
    OtherArgumentName,
    SkipsABlock,
)


def make(kind: type[Plain]) -> Plain:
    torch.manual_seed(0)
    return kind().eval()
