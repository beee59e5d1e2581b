"""The reading of AMD's assembly, by lines as LLVM writes them."""

import pytest

from openpi_opt.kernels.instructions import instructions

WIDE = "\tglobal_load_dwordx4 v[2:5], v[0:1], off\n\tds_read_b128 v[6:9], v10\n"


def test_widths_products_and_waits_are_counted():
    text = (
        WIDE + "\tbuffer_load_dwordx2 v[0:1], v2, s[0:3], 0 offen\n"
        "\tds_read2st64_b64 v[0:3], v4 offset1:8\n\ts_waitcnt vmcnt(0)\n"
        "\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]\n"
        "\tds_read_b64_tr_b16 v[0:1], v2\n; global_load_dword in a comment\n"
    )
    found = instructions(text)
    assert found.loads == {16: 1, 8: 1}
    assert found.lds_reads == {16: 2, 8: 1}
    assert found.mfma == {"f32_16x16x16_bf16": 1}
    assert (found.waits, found.narrow) == (1, {})
    assert "loads 1 of 16 B, 1 of 8 B; LDS 2 of 16 B" in found.text()


@pytest.mark.parametrize(
    ("line", "count", "narrow"),
    [
        ("ds_read_u16_d16_hi v1, v2", 40, {"ds_read_u16": 40}),
        ("ds_read_b32 v1, v2", 8, {}),
        ("global_load_ushort v1, v[2:3], off", 3, {"global_load_ushort": 3}),
        ("buffer_load_dword v1, v2, s[0:3], 0 offen", 1, {"buffer_load_dword": 1}),
        ("ds_read2_b32 v[0:1], v2 offset1:1", 9, {}),
    ],
)
def test_narrow_loads_are_named(line, count, narrow):
    found = instructions(WIDE + f"\t{line}\n" * count)
    assert found.narrow == narrow
    assert ("NARROW" in found.text()) == bool(narrow)


def test_a_few_single_words_beside_wide_loads_are_no_fault():
    assert instructions(WIDE * 4 + "\tglobal_load_dword v1, v[2:3], off\n").narrow == {}
