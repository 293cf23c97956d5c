"""A CUDA device for machines without one: tensors that say they are on it and compute on the CPU.

`start` comes before torch is imported, so that what uses it is a process of its own. Then torch.cuda answers as with
one GPU, `.to("cuda")` moves, and an operator raises where a GPU's would: tensors of two devices, int64 products, shapes
that cuBLAS refuses, operators without a CUDA implementation. It computes by the CPU's operators, attention by plain
ones; of time, races, memory that is too little and a GPU's own rounding it says nothing.
"""

import ctypes
import importlib.util
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent


def build(command: list[str], folder: Path) -> Path:
    """device.cpp as a library. command: a C++ compiler's."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    library = folder / "device.so"
    libraries = torch_folder / "lib"
    subprocess.run(
        [
            *command, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{torch_folder / 'include'}",
            str(HERE / "device.cpp"), "-o", str(library), f"-L{libraries}", "-lc10", "-ltorch_cpu",
            f"-Wl,-rpath,{libraries}",
        ],
        check=True,
    )  # fmt: skip
    return library


def start(library: Path) -> None:
    """From here to the end of the process there is such a device, of compute capability 9.0."""
    assert "torch" not in sys.modules, "torch has looked for devices already"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    from simulated_cuda.tensors import Device

    _answer()
    Device().__enter__()


def _answer() -> None:
    """torch.cuda, and what of a tensor asks for CUDA before it comes to an operator."""
    import torch

    from simulated_cuda.tensors import MEMORY, put_in_place

    class Inference(torch.no_grad):
        """torch's keeps versions of tensors in a way that those here cannot follow."""

        def __new__(cls, mode: Any = True) -> Any:
            return super().__new__(cls, mode if callable(mode) else None)

        def __init__(self, mode: Any = True) -> None:
            super().__init__()
            self.mode = mode

        def __enter__(self) -> None:
            super().__enter__()
            torch.set_grad_enabled(not self.mode and self.prev)

    def reset() -> None:
        MEMORY.most = MEMORY.held

    total = 80 * 2**30
    about = SimpleNamespace(name="simulated", major=9, minor=0, total_memory=total, multi_processor_count=132)
    for name, answer in {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "init": None,
        "_lazy_init": None, "set_device": None, "synchronize": None, "empty_cache": None, "ipc_collect": None,
        "get_device_capability": (9, 0), "get_device_name": about.name, "get_device_properties": about,
        "is_bf16_supported": True, "is_current_stream_capturing": False, "manual_seed": None, "manual_seed_all": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "_sleep": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()  # what is drawn there is drawn on the CPU
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    torch.cuda.memory_allocated = lambda *args: MEMORY.held
    torch.cuda.max_memory_allocated = lambda *args: MEMORY.most
    torch.cuda.reset_peak_memory_stats = lambda *args: reset()
    torch.cuda.mem_get_info = lambda *args: (total - MEMORY.held, total)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = torch.cuda.default_stream = Stream
    torch.cuda.stream = nullcontext
    torch.inference_mode = Inference
    torch.__future__.set_swap_module_params_on_conversion(True)  # setting `.data` would leave `inner` behind
    torch.version.cuda = "12.9"
    torch.Tensor.pin_memory = lambda tensor, *args: tensor
    torch.Tensor.record_stream = lambda tensor, *args: None
    torch.Tensor.data = property(torch.Tensor.detach, put_in_place)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes a tensor of the CPU and moves it


class Stream:
    """Of a device that has always done what it was told; an event too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def record_event(self, *args: Any) -> "Stream":
        return self

    def elapsed_time(self, end: "Stream") -> float:
        return 1e3 * (end.time - self.time)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...
    def wait_stream(self, other: "Stream") -> None: ...
    def wait_event(self, event: "Stream") -> None: ...
    def wait(self, stream: "Stream | None" = None) -> None: ...
