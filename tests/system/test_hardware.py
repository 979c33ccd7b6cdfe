"""The machine's devices, by the files that their drivers leave."""

from pathlib import Path

import pytest

from deploy.hardware import Hardware, detect


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, ()),
        (
            {
                "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t NVIDIA H100\nIRQ: 1",
                "proc/driver/nvidia/gpus/0000:02:00.0/information": "Model: \t NVIDIA H100\nIRQ: 2",
                "dev/nvidia0": "",
            },
            (("cuda", "NVIDIA H100"), ("cuda", "NVIDIA H100")),
        ),
        (
            {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""},
            (("cuda", "NVIDIA GPU"), ("cuda", "NVIDIA GPU")),
        ),
        (
            {
                "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 8\nsimd_count 0",
                "sys/class/kfd/kfd/topology/nodes/1/properties": "cpu_cores_count 0\nsimd_count 4",
            },
            (("rocm", "AMD GPU"),),
        ),
        ({"dev/neuron0": "", "dev/neuron10": ""}, (("neuron", "Neuron device"),) * 2),
        ({"sys/class/accel/accel0/device/vendor": "0x1da3\n"}, (("hpu", "Gaudi"),)),
        ({"sys/class/accel/accel0/device/vendor": "0x1ae0\n"}, (("tpu", "TPU"),)),
        ({"sys/bus/pci/drivers/vfio-pci/0000:00:04.0/vendor": "0x1ae0\n"}, (("tpu", "TPU"),)),
        ({"sys/class/accel/accel0/device/vendor": "0x8086\n"}, ()),
    ],
)
def test_accelerators_are_seen_by_their_drivers_files(
    tmp_path: Path, files: dict[str, str], wanted: tuple[tuple[str, str], ...]
) -> None:
    write(tmp_path, files)
    assert detect(tmp_path).accelerators == wanted


def test_an_intel_gpu_is_seen_by_its_driver(tmp_path: Path) -> None:
    for index, driver in enumerate(("xe", "ast")):
        device = tmp_path / f"sys/class/drm/renderD{128 + index}/device"
        write(device, {"vendor": "0x8086\n"})
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "drivers" / driver)
    assert detect(tmp_path).accelerators == (("xpu", "Intel GPU"),)


def test_devices_are_counted_for_people_and_a_machine_has_a_name(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name\t: Fast 9000\n"})
    assert detect(tmp_path).cpu == "Fast 9000"
    two = Hardware("a processor", 2, 1 << 30, (("cuda", "a cuda"),) * 2)
    assert two.kinds == ("cuda", "cpu")
    assert two.named(("cuda",)) == ["cuda: 2 x a cuda"]
    assert two.named(("cpu",)) == ["cpu (2 cores)"]
    assert (
        two.fingerprint() == "a processor, 2 cores, 1 GiB, accelerators: cuda a cuda, cuda a cuda"
    )
    assert Hardware("a processor", 2, 1 << 30).fingerprint().endswith("accelerators: none")
