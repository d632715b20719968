"""Attention, sampling and captured work give something else on one device than on another."""

from __future__ import annotations

import math
import random

import pytest
import torch
from devices import DEVICES

from kestrel.ops.attention import attend
from kestrel.ops.graphs import Captured, Pool
from kestrel.ops.sampling import by_rank, sample

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_attention_differs_from_its_formula(device, kv_heads, masked):
    chance = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 5, 16, generator=chance)
    k, v = torch.randn(2, 2, kv_heads, 9, 16, generator=chance)
    mask = torch.rand(2, 1, 5, 9, generator=chance) < 0.6
    mask[..., 0] = True
    keys, values = (t.double().repeat_interleave(4 // kv_heads, dim=1) for t in (k, v))
    scores = q.double() @ keys.transpose(-1, -2) / 4
    if masked:
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ values).float()
    shown = mask.to(device) if masked else None
    got = attend(q.to(device), k.to(device), v.to(device), shown)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_the_nucleus_keeps_too_few_or_too_many(device):
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]], device=device).expand(6, 4)
    top_p = torch.tensor([[0.0], [0.0001], [0.5], [0.51], [0.75], [1.0]], device=device)
    kept = by_rank(probs, top_p)
    expected = [[1], [1], [1], [1, 3], [1, 3], [0, 1, 2, 3]]
    assert [row.nonzero().flatten().tolist() for row in kept] == expected


@torch.inference_mode()
def test_a_row_is_drawn_otherwise_among_others(device):
    logits = torch.randn(32, 200, generator=torch.Generator().manual_seed(2)) * 3
    logits[:, 150:] = -torch.inf
    temperatures, top_ps = [0.0, 1e-5, 0.5, 1e9] * 8, [0.3, 0.9, 1.0, 0.6] * 8
    draws = [random.Random(n).random() for n in range(32)]
    together = sample(logits.to(device), temperatures, top_ps, draws).tolist()
    settings = zip(temperatures, top_ps, draws, strict=True)
    alone = [
        sample(row[None].to(device), [t], [p], [d]).item()
        for row, (t, p, d) in zip(logits, settings, strict=True)
    ]
    assert together == alone
    assert together[::4] == logits[::4].argmax(-1).tolist() and max(together) < 150


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5])
@pytest.mark.parametrize("draw", [1 - 2**-26, math.nextafter(1.0, 0.0)])
@torch.inference_mode()
def test_the_largest_draw_takes_a_candidate_that_is_barred(device, draw, top_p):
    logits = torch.zeros(3, 7, device=device)
    logits[0, 5:] = logits[1, 6] = logits[2, 1:] = -torch.inf
    logits[1, 2] = 9.0  # alone in the smaller nuclei
    got = sample(logits, [1.0] * 3, [top_p] * 3, [draw] * 3).tolist()
    assert all(math.isfinite(row[n]) for row, n in zip(logits.tolist(), got, strict=True))
    assert got[1] == (5 if top_p == 1.0 else 2)


@torch.inference_mode()
def test_captured_work_reads_what_it_read_at_first(device):
    x = torch.zeros(4, device=device)
    pool = Pool()
    double, square = (Captured(run, device, pool) for run in (lambda: x * 2, lambda: x * x))
    for value in (3.0, 5.0):
        x.fill_(value)
        assert double().tolist() == [2 * value] * 4
        assert square().tolist() == [value * value] * 4
