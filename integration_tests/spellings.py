"""One small causal language model, its code spelled in several ways: all compute the same from the same weights.

Each spelling is a real one: batch first or sequence first (Megatron's models), tokens as one list (OPT), hidden states
in several streams (Gemma-3n's AltUp), residuals, activations and arguments that are changed in place.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

WIDTH, HEADS, INNER, VOCABULARY = 64, 4, 128, 300


class SpelledConfig(PretrainedConfig):
    model_type = "spelled"

    def __init__(self, hidden_size: int = WIDTH, num_hidden_layers: int = 3, streams: int = 1, **kwargs: Any) -> None:
        self.hidden_size, self.num_hidden_layers, self.streams = hidden_size, num_hidden_layers, streams
        self.vocab_size = VOCABULARY
        super().__init__(**kwargs)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x` is `batch x seqlen x width`."""
        q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.mixed(q, k, v, bias))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Feedforward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.relu(self.up_proj(x)) * 2)


class Block(nn.Module):
    """Batch first; nothing is changed in place."""

    attention_class: type[Attention] = Attention
    feedforward_class: type[Feedforward] = Feedforward

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = self.attention_class(), self.feedforward_class()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attention(self.before(hidden_states), bias)
        return hidden_states + self.mlp(self.between(hidden_states))


class SpelledPreTrainedModel(PreTrainedModel):
    config_class = SpelledConfig
    base_model_prefix = "model"
    block: type[nn.Module] = Block

    def _init_weights(self, module: nn.Module) -> None:
        pass


class Body(SpelledPreTrainedModel):
    def __init__(self, config: SpelledConfig, block: type[nn.Module] = Block) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([block() for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **_: Any
    ) -> Any:
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None, :]
            seen = seen | torch.eye(length, dtype=torch.bool, device=input_ids.device)
        bias = torch.zeros(seen.shape, device=input_ids.device).masked_fill(~seen, -1e4)
        return BaseModelOutput(last_hidden_state=self.norm(self.run(self.embed_tokens(input_ids), bias)))

    def run(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Take `batch x seqlen x width` through the blocks."""
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden


class Spelled(SpelledPreTrainedModel, GenerationMixin):
    """The causal language model; subclasses spell blocks and body in another way."""

    body: type[Body] = Body
    _tied_weights_keys = None

    def __init__(self, config: SpelledConfig) -> None:
        super().__init__(config)
        self.model = self.body(config, self.block)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **_: Any
    ) -> Any:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask).last_hidden_state))


# --- in place


class InPlaceAttention(Attention):
    """All three share an input until it is changed under the last of them; a bias of its own is changed, too."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q /= (WIDTH // HEADS) ** 0.5
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
        scores = q @ k.transpose(-1, -2)
        scores += bias
        x.copy_((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # the storage of the inputs of q, k, v
        return self.o_proj(x)


class InPlaceFeedforward(Feedforward):
    def forward(self, x: Tensor) -> Tensor:
        inner = self.up_proj(x).relu_()
        inner[..., : INNER // 2] *= 2
        inner[..., INNER // 2 :].mul_(2)
        return self.down_proj(inner)


class InPlaceBlock(Block):
    attention_class, feedforward_class = InPlaceAttention, InPlaceFeedforward

    def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
        hidden_states += self.attention(self.before(hidden_states), bias)
        hidden_states += self.mlp(self.between(hidden_states))
        return hidden_states


class InPlace(Spelled):
    block = InPlaceBlock

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **_: Any
    ) -> Any:
        output = super().forward(input_ids, attention_mask)
        output.logits *= 1
        return output


class InPlaceArgument(Spelled):
    """Each block is given a bias of its own, wants it scaled, and scales it where it lies."""

    class block(Block):
        def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
            bias.mul_(4)
            return super().forward(hidden_states, bias)

    class body(Body):
        def run(self, hidden: Tensor, bias: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden, bias / 4)
            return hidden


class InPlaceBetween(Spelled):
    """The model changes hidden states in place after the blocks; these return nothing and have changed theirs."""

    class block(InPlaceBlock):
        def forward(self, hidden_states: Tensor, bias: Tensor) -> None:  # type: ignore[override]
            super().forward(hidden_states, bias)

    class body(Body):
        def run(self, hidden: Tensor, bias: Tensor) -> Tensor:
            for layer in self.layers:
                layer(hidden, bias)
            hidden *= 1
            return hidden


# --- the order of dimensions


class SequenceFirstAttention(Attention):
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).transpose(0, 1) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.mixed(q, k, v, bias).transpose(0, 1).contiguous())


class SequenceFirst(Spelled):
    """`seqlen x batch x width`."""

    class block(Block):
        attention_class = SequenceFirstAttention

    class body(Body):
        def run(self, hidden: Tensor, bias: Tensor) -> Tensor:
            return super().run(hidden.transpose(0, 1).contiguous(), bias).transpose(0, 1)


class OneList(Spelled):
    """`(batch * seqlen) x width`."""

    class block(Block):
        def forward(self, hidden_states: Tensor, bias: Tensor, shape: tuple[int, int]) -> Tensor:  # type: ignore[override]
            normalized = self.before(hidden_states)
            layers = (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
            q, k, v = (self.batched(layer(normalized), shape) for layer in layers)
            mixed = self.listed(self.attention.mixed(q, k, v, bias))
            hidden_states = hidden_states + self.attention.o_proj(mixed)
            return hidden_states + self.mlp(self.between(hidden_states))

        def batched(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
            return x.view(*shape, -1)

        def listed(self, x: Tensor) -> Tensor:
            return x.flatten(0, 1)

    class body(Body):
        def run(self, hidden: Tensor, bias: Tensor) -> Tensor:
            shape, layers = (hidden.shape[0], hidden.shape[1]), self.layers
            hidden = layers[0].listed(hidden)
            for layer in layers:
                hidden = layer(hidden, bias, shape)
            return layers[0].batched(hidden, shape)


class OneListSequenceFirst(OneList):
    """`(seqlen * batch) x width`."""

    class block(OneList.block):
        def batched(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
            return x.view(shape[1], shape[0], -1).transpose(0, 1)

        def listed(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1).flatten(0, 1)


class Packed(OneList):
    """`1 x (batch * seqlen) x width`."""

    class block(OneList.block):
        def listed(self, x: Tensor) -> Tensor:
            return x.flatten(0, 1)[None]


class SequenceFirstInside(Spelled):
    """Batch first between the blocks, and inside of them one list of tokens, those of the same place together."""

    class block(Block):
        attention_class = SequenceFirstAttention

        def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
            hidden = hidden_states.transpose(0, 1)
            hidden = hidden + self.attention(self.before(hidden), bias)
            rows = self.between(hidden).flatten(0, 1)
            return (hidden + self.mlp(rows).view(hidden.shape)).transpose(0, 1)


class SequenceFirstInPlace(SequenceFirst):
    class block(SequenceFirst.block):
        feedforward_class = InPlaceFeedforward

        def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
            hidden_states += self.attention(self.before(hidden_states), bias)
            hidden_states += self.mlp(self.between(hidden_states))
            return hidden_states


# --- one more dimension


class StreamsBlock(Block):
    """Two streams of hidden states: one is for attention, the linears of the other one read both."""

    axis = 2

    def forward(self, hidden_states: Tensor, bias: Tensor) -> Tensor:
        """`hidden_states` has one stream after the other along `axis`."""
        one, other = hidden_states.unbind(self.axis)
        one = one + self.attention(self.before(one + other), bias)
        both = torch.stack([one, other], self.axis)
        return both + self.mlp(self.between(both))


class Streams(Spelled):
    """`batch x seqlen x streams x width`."""

    block = StreamsBlock

    class body(Body):
        axis = 2

        def run(self, hidden: Tensor, bias: Tensor) -> Tensor:
            hidden = torch.stack([hidden, hidden.flip(-1)], self.axis)
            return super().run(hidden, bias).sum(self.axis)


class StreamsFirst(Streams):
    """`streams x batch x seqlen x width`, as AltUp has them."""

    class block(StreamsBlock):
        axis = 0

    class body(Streams.body):
        axis = 0


class StreamsBetween(Streams):
    """`batch x streams x seqlen x width`."""

    class block(StreamsBlock):
        axis = 1

    class body(Streams.body):
        axis = 1


PLAIN_SPELLINGS = (
    InPlace,
    InPlaceArgument,
    InPlaceBetween,
    SequenceFirst,
    SequenceFirstInPlace,
    SequenceFirstInside,
    OneList,
    OneListSequenceFirst,
    Packed,
)
"""Of `Spelled`."""

STREAM_SPELLINGS = (StreamsFirst, StreamsBetween)
"""Of `Streams`."""


def spell(kind: type[Spelled], *, seed: int = 0) -> Any:
    """Return the model in a spelling, in evaluation mode; every one has the same weights."""
    model = kind(SpelledConfig())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            else:
                parameter.copy_(parameter * 0 + 1 + 0.1 * noise)
    return model.eval()
