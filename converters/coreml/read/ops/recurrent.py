"""Recurrent layers. x is [sequence, batch, input], states are [batch, hidden]."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from converters.coreml.read.ops.registry import UnsupportedForm, op

# With their default constants: hard_sigmoid those of Keras, scaled_tanh 1 and 1.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "linear": lambda x: x,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "scaled_tanh": torch.tanh,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name.lower() not in _ACTIVATIONS:
        raise UnsupportedForm(f"activation {name!r}")
    return _ACTIVATIONS[name.lower()]


def _order(direction: str, length: int) -> Iterable[int]:
    if direction not in ("forward", "reverse"):
        raise UnsupportedForm(f"direction {direction!r}")
    return range(length) if direction == "forward" else range(length - 1, -1, -1)


def _rows(initial: Tensor, x: Tensor) -> Tensor:
    """The initial states of the batch; more are allowed and not used, as coremltools' packed sequences have them."""
    return initial[: x.shape[1]]


def _sequence(states: list[Tensor], last: Tensor, whole: bool) -> Tensor:
    """All states in the order in which they were computed, or the last one; [sequence, batch, hidden]."""
    if not whole:
        return last[None]
    return torch.stack(states) if states else last.new_zeros(0, *last.shape)


@op("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """h = activation(W_ih x + W_hh h + b); all states or the last one, and the last one."""
    act, hidden, states = _activation(activation), _rows(initial_h, x), []
    inputs = _project(x, weight_ih, bias)
    for step in _order(direction, x.shape[0]):
        hidden = act(inputs[step] + hidden @ weight_hh.T)
        states.append(hidden)
    return _sequence(states, hidden, output_sequence), hidden.clone()


@op("gru")
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit; weights are those of the reset gate r, the new state o and the update gate z.

    The reset gate multiplies the state, or what the weights make of it (`reset_after`, as in PyTorch).
    """
    gate, act = _activation(recurrent_activation), _activation(activation)
    inputs = _project(x, weight_ih, input_bias)
    w_r, w_o, w_z = weight_hh.chunk(3)
    zero = torch.zeros(weight_hh.shape[0], dtype=weight_hh.dtype)
    b_r, b_o, b_z = (zero if bias is None else bias).chunk(3)
    hidden, states = _rows(initial_h, x), []
    for step in _order(direction, x.shape[0]):
        x_r, x_o, x_z = inputs[step].chunk(3, -1)
        r = gate(x_r + hidden @ w_r.T + b_r)
        z = gate(x_z + hidden @ w_z.T + b_z)
        new = r * (hidden @ w_o.T + b_o) if reset_after else (r * hidden) @ w_o.T + b_o
        hidden = (1 - z) * act(x_o + new) + z * hidden
        states.append(hidden)
    return _sequence(states, hidden, output_sequence), hidden.clone()


@op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory; weights are those of the input, forget, output and cell gates.

    `clip` bounds the cell state. Both directions: the hidden axis holds forward, then reverse.
    """
    initial_h, initial_c = _rows(initial_h, x), _rows(initial_c, x)
    acts = (_activation(recurrent_activation), _activation(cell_activation), _activation(activation))
    if direction != "bidirectional":
        return _one_way(
            x,
            initial_h,
            initial_c,
            weight_ih,
            weight_hh,
            bias,
            peephole,
            direction,
            output_sequence,
            acts,
            clip,
        )
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("no weights for the backward direction")
    h, c = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    forward = _one_way(
        x, h[0], c[0], weight_ih, weight_hh, bias, peephole, "forward", output_sequence, acts, clip
    )
    back = _one_way(
        x,
        h[1],
        c[1],
        weight_ih_back,
        weight_hh_back,
        bias_back,
        peephole_back,
        "reverse",
        output_sequence,
        acts,
        clip,
    )
    if output_sequence:
        back = (back[0].flip(0), *back[1:])  # both directions at the positions of x
    first, second, third = (torch.cat(pair, -1) for pair in zip(forward, back, strict=True))
    return first, second, third


def _one_way(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    direction: str,
    output_sequence: bool,
    acts: tuple[Callable[[Tensor], Tensor], ...],
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gate, cell_act, out_act = acts
    hidden_size = weight_hh.shape[1]
    peep = torch.zeros(3 * hidden_size, dtype=x.dtype) if peephole is None else peephole
    p_i, p_f, p_o = peep.chunk(3)
    inputs, states = _project(x, weight_ih, bias), []
    for step in _order(direction, x.shape[0]):
        i, f, o, g = (inputs[step] + h @ weight_hh.T).chunk(4, -1)
        i, f, g = gate(i + p_i * c), gate(f + p_f * c), cell_act(g)
        c = f * c + i * g
        if clip is not None:
            c = c.clamp(-clip, clip)
        h = gate(o + p_o * c) * out_act(c)
        states.append(h)
    return _sequence(states, h, output_sequence), h.clone(), c.clone()


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the inputs add to the gates, [sequence, batch, gates * hidden]."""
    projected = torch.matmul(x, weight.T)
    return projected if bias is None else projected + bias
