"""cuda_backward_model.py: counts by hand, bounds that must hold, and the page that shows what it says."""

from __future__ import annotations

from itertools import product

import cuda_backward_model as model
import cuda_codegen_gate as gate
import pytest

BACKWARD = {
    (name, row.head_dim_qk): row for name in ("backward", "backward_query", "backward_key", "single_tile_backward")
    for row in model.plain_rows(name) if row.head_dim_qk == row.head_dim_v
}  # fmt: skip


def test_counts_of_a_backward_step_by_hand() -> None:
    """16 keys of a warp and 64 rows, head_dim 64: a lane has 32 scores."""
    counts = model.work(BACKWARD["backward_key", 64])
    assert counts["HMMA"] == 2 * (8 * 4) + 2 * (4 * 8)  # S^T, dP^T; dV, dK
    assert (counts["EX2"], counts["FFMA"], counts["FADD"], counts["FMUL"], counts["F2FP"]) == (32, 32, 32, 32, 32)
    assert counts["LDS"] == 16  # lse and delta of eight times two rows
    assert model.groups_of_warps(BACKWARD["backward_key", 64]) == 4


def test_a_backward_in_one_pass_has_five_products_and_two_passes_have_seven() -> None:
    for head_dim, products in product((32, 64, 96, 128), (("backward", 5), ("backward_query", 3), ("backward_key", 4))):
        row = BACKWARD[products[0], head_dim]
        multiply_adds = model.work(row)["HMMA"] * model.groups_of_warps(row) * model.HMMA_MULTIPLY_ADDS
        assert multiply_adds == products[1] * row.block_m * row.block_n * head_dim


@pytest.mark.parametrize("gpu", model.GPUS)
@pytest.mark.parametrize("way", model.WAYS)
def test_no_way_through_the_backward_is_faster_than_its_products(way: str, gpu: str) -> None:
    properties = model.GPUS[gpu]
    for head_dim, seqlen, causal in product((64, 128, 256), (128, 1000, 4096), (False, True)):
        times = model.way(way, head_dim, properties, 64, seqlen, causal)
        if times:
            flops = 10 * 64 * seqlen**2 * head_dim * (0.5 if causal else 1)
            peak = 2 * properties.tensor * properties.sms * properties.megahertz * 1e6
            assert sum(time.microseconds for time in times) > 1e6 * flops / peak


def test_ways_of_the_backward_in_the_order_that_the_counts_give() -> None:
    gpu = model.GPUS["H200"]

    def total(way: str, seqlen: int) -> float:
        return sum(time.microseconds for time in model.way(way, 64, gpu, 64 * 2048 // seqlen, seqlen, False))

    assert total("single tile", 128) < min(total("one pass", 128), total("two passes", 128))
    assert total("one pass", 2048) < total("two passes", 2048)
    assert total("single tile", 2048) == 0  # it has no kernel for that


def test_the_page_shows_what_the_model_says() -> None:
    assert "\n".join(model.page_tables()["ways"]) in model.model.PAGE.read_text(), "python tests/cuda_backward_model.py --write"


@pytest.mark.skipif(gate.why_not() is not None, reason=str(gate.why_not()))
def test_the_machine_code_has_the_products_of_the_model() -> None:
    row = BACKWARD["backward_key", 64]
    (line,) = gate.check(row.image, ())
    exact = ("HMMA", "LDSM", "EX2", "FFMA", "FADD", "FMUL", "F2FP")
    assert [str(one) for one in model.deviations(row, line.code.loops[0], tolerance=0) if one.family in exact] == []
