"""Processors with few registers compute otherwise than those with many: what is compiled for either
is run here, whichever the machine has."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numba import njit

from kestrel.ops import compiled, lanes, unmasked

LANES = lanes.LANES


def rounded(numbers: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, cut off."""
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("bits", [False, True], ids=["float32", "bfloat16"])
def test_products_depend_on_registers_or_on_rows_beside(monkeypatch, bits):
    chance = np.random.default_rng(0)
    plain = chance.standard_normal((5, 48, LANES), np.float32)
    weights = rounded(plain) if bits else plain
    exact = widened(weights) if bits else plain
    x = chance.standard_normal((14, 48), np.float32)
    start = chance.standard_normal((14, 5 * LANES), np.float32)
    expected = start + np.einsum("nk,bkl->nbl", x.astype(float), exact).reshape(14, -1)
    for wide in (False, True):
        monkeypatch.setattr(compiled, "WIDE", wide)
        product = njit(**compiled.OPTIONS)(compiled._add_product.py_func)
        alone = start.copy()
        for n in range(14):
            product(x[n : n + 1], weights, alone[n : n + 1])
        np.testing.assert_allclose(alone, expected, atol=1e-5, rtol=1e-5)
        for rows in (2, 3, 4, 5, 6, 7, 13, 14):
            out = start[:rows].copy()
            product(x[:rows], weights, out)
            assert np.array_equal(out, alone[:rows]), f"{rows} rows, {wide=}"


@pytest.mark.parametrize("bits", [False, True], ids=["float32", "bfloat16"])
def test_sums_depend_on_registers(monkeypatch, bits):
    found = []
    for wide in (False, True):
        monkeypatch.setattr(compiled, "WIDE", wide)
        sums = njit(**compiled.OPTIONS)(compiled._sums.py_func)
        chance = np.random.default_rng(1)
        for dim, count in itertools.product((32, 40, 64), (1, 16, 39)):
            shares = chance.random((4, count), np.float32)
            plain = chance.standard_normal((count, 2, dim), np.float32)
            values = rounded(plain) if bits else plain
            exact = widened(values) if bits else plain
            by_head = np.repeat(exact.astype(float), 2, axis=1)
            out = np.full(4 * dim, np.nan, np.float32)
            sums(shares, values.ravel(), 2, dim, out)
            expected = np.einsum("hs,shd->hd", shares, by_head).ravel()
            np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5)
            found.append(out)
    few, many = np.concatenate(found).reshape(2, -1)
    assert np.array_equal(few, many)


@pytest.mark.parametrize("bits", [False, True], ids=["float32", "bfloat16"])
def test_attention_depends_on_registers_or_on_queries_beside(monkeypatch, bits):
    for queries, columns, sums in (
        (4, 2 * LANES, unmasked._four),
        (6, LANES, unmasked._six),
    ):
        monkeypatch.setattr(unmasked, "QUERIES", queries)
        monkeypatch.setattr(unmasked, "COLUMNS", columns)
        monkeypatch.setattr(unmasked, "_sums", sums)
        attend = njit(**compiled.OPTIONS)(unmasked._attend)
        chance = np.random.default_rng(2)
        for count, length in ((13, 13), (4, 37), (1, 16)):
            q = chance.standard_normal((count, 4, 32), np.float32)
            k, v = chance.standard_normal((2, length, 2, 32), np.float32)
            if bits:
                q, k, v = (rounded(numbers) for numbers in (q, k, v))
            exact = [(widened(n) if bits else n).astype(float) for n in (q, k, v)]
            asked, keys, values = exact[0], *(np.repeat(n, 2, axis=1) for n in exact[1:])
            scores = np.einsum("thd,shd->hts", asked, keys) / np.sqrt(32)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            expected = np.einsum("hts,shd->thd", shares, values)
            out = np.zeros_like(q)
            attend(q, k, v, out)
            off = 0.01 if bits else 3e-6
            numbers = widened(out) if bits else out
            np.testing.assert_allclose(numbers, expected, atol=off, rtol=off)
            for n in range(count):
                one = np.zeros_like(q[:1])
                attend(q[n : n + 1], k, v, one)
                assert np.array_equal(one[0], out[n]), "a query depends on those beside it"
