"""The compiled step of a dense transformer belongs to its call: others with the same weights do not disturb it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from treadle.ops.dense_step import Caches, DenseLayer, DenseStep
from treadle.ops.packed_linear import PackedMatrix, native, quantize

pytestmark = pytest.mark.skipif(native() is None, reason="no compiled product here")
WIDTH, VOCABULARY, LAYERS, HEADS = 32, 64, 3, 2
HEAD_WIDTH = WIDTH // HEADS


def step() -> DenseStep:
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> PackedMatrix:
        return PackedMatrix(quantize(torch.randn(rows, columns) * 0.2, "fp32"))

    layers = [
        DenseLayer(matrix(3 * WIDTH, WIDTH), matrix(WIDTH, WIDTH), matrix(2 * WIDTH, WIDTH), matrix(WIDTH, WIDTH), *(torch.ones(WIDTH),) * 2)
        for _ in range(LAYERS)
    ]
    return DenseStep(layers, matrix(VOCABULARY, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.ones(WIDTH),
                     heads=HEADS, groups=HEADS, head_width=HEAD_WIDTH, eps=1e-6, scale=HEAD_WIDTH**-0.5)  # fmt: skip


def written(made: DenseStep, slots: int) -> Tensor:
    """The greedy continuation of one token over caches and angles of its own size."""
    keys, values = (Caches([torch.zeros(1, HEADS, slots, HEAD_WIDTH) for _ in range(LAYERS)]) for _ in range(2))
    turns = torch.arange(slots)[:, None] / 100.0 ** (torch.arange(HEAD_WIDTH // 2) / 8)
    angles, token, found = (turns.cos(), turns.sin()), torch.tensor([slots % VOCABULARY]), []
    for place in range(slots):
        _, logits = made(angles, keys, values, token, torch.tensor([0]), torch.tensor([place]))
        assert logits is not None and logits.dtype == torch.float32
        found.append(logits)
        token = logits.argmax(-1)
    return torch.cat(found)


def test_threads_with_one_step_do_not_disturb_each_other() -> None:
    made, sizes = step(), [300, 8, 40]
    alone = {size: written(made, size) for size in sizes}
    with ThreadPoolExecutor(len(sizes)) as pool:
        found = [(size, pool.submit(written, made, size)) for size in [300, *[8, 40] * 12, 300]]
        assert all(torch.equal(future.result(), alone[size]) for size, future in found)
