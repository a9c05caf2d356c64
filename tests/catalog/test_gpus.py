"""Every card can be found and says where its numbers come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kavier_twin.catalog.errors import CatalogError
from kavier_twin.catalog.gpu import Gpu, find_gpu, gpus, read_gpu
from kavier_twin.catalog.gpu import _words as words


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("h100_sxm", "h100_sxm"),
        ("H100 SXM 80GB", "h100_sxm"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200_sxm"),
        ("NVIDIA B200", "b200_sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm_80gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie_80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100_pcie_40gb"),
        ("NVIDIA A100-SXM4-40GB", "a100_sxm_40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000_workstation"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000_server"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA L40S", "l40s"),
        ("nvidia l4", "l4"),
        ("A10", "a10"),
        ("NVIDIA B300 SXM6 AC", "b300_sxm"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L20", "l20"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA GeForce RTX 5090", "rtx_5090"),
        ("NVIDIA RTX A6000", "rtx_a6000"),
        ("AMD Instinct MI325X", "mi325x"),
        ("AMD Instinct MI355X", "mi355x"),
        ("NVIDIA H20", "h20_sxm"),
        ("Intel Gaudi 3", "gaudi3"),
    ],
)
def test_the_names_people_and_drivers_use(name: str, key: str) -> None:
    assert find_gpu(name) is gpus()[key]


def test_no_name_stands_for_two_cards() -> None:
    seen: dict[frozenset[str], str] = {}
    for key, gpu in gpus().items():
        for name in (key, gpu.name, *gpu.aliases):
            assert seen.setdefault(words(name), key) == key, name


def test_an_unknown_card_is_answered_with_the_known_ones() -> None:
    with pytest.raises(CatalogError, match=r"'A10G'.*h100_sxm.*YAML") as error:
        find_gpu("A10G")
    assert "\n" not in str(error.value)


def sheet(**changes: object) -> str:
    return yaml.safe_dump(gpus()["h100_sxm"].model_dump(mode="json") | changes)


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(sheet(name="Mine", memory_bandwidth_bytes_per_second=1e12))
    assert find_gpu(str(path)).memory_bandwidth_bytes_per_second == 1e12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "sources: name where .*idle_watts"),
        ({"idle_watts": 900.0}, "idle_watts: must be less"),
        ({"usable_memory_bytes": 2**40}, "usable_memory_bytes: cannot be more"),
        ({"memory_bandwidth_bytes_per_second": -1.0}, "memory_bandwidth_bytes_per_second"),
        ({"bandwidth": 1.0}, "bandwidth: unknown; remove it"),
        ({"compute_share": 1.01}, "compute_share"),
    ],
)
def test_a_wrong_sheet_is_refused_by_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CatalogError, match=f"mine.yaml: .*{message}"):
        read_gpu(sheet(**changes), "mine.yaml")


def test_tflops_are_dense() -> None:
    """NVIDIA prints the figures with sparsity, twice as high; 8 bits are twice 16 where the card has both."""
    assert gpus()["h100_sxm"].dense_tflops.bf16 == pytest.approx(1979 / 2)
    for key, gpu in gpus().items():
        assert gpu.dense_tflops.fp16 == gpu.dense_tflops.bf16, key
        if gpu.dense_tflops.fp8 and key != "gaudi3":  # whose matrix engines have one rate for both
            assert gpu.dense_tflops.fp8 == pytest.approx(2 * gpu.dense_tflops.bf16, rel=0.02), key


def test_a_type_that_the_card_lacks_runs_in_16_bits() -> None:
    a100: Gpu = gpus()["a100_sxm_80gb"]
    assert a100.flops_per_second("fp8") == a100.flops_per_second("bf16") == 312e12
