"""What of this machine and its packages helps or hinders: findings, each with the command that mends it.

Nothing heavy is imported here: torch and onnxruntime are asked in processes of their own, so that one that crashes or hangs is a finding too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.caches import cache_file
from diffusionblocks.runtime.installing import install

OK, NOTE, PROBLEM = "ok", "note", "problem"
PATIENCE = 120
"""Seconds a question in another process may take."""
LOW, LEAST = 2 << 30, 200 << 20
"""Free bytes of a disk, or of memory, below which it is noted, and below which it is a problem."""
RUNTIMES = "onnxruntime"
USES = {
    "convert": "converting and training",
    "timm": "timm's models",
    "transformers": "models of transformers",
    "diffusers": "models of diffusers",
    "data": "images, tables and saved datasets as data",
    "tensorboard": "logs for TensorBoard",
    "bench": "plots, and comparisons with other ways of running",
    "hub": "bundles on a Hugging Face Hub",
    "report": "report.html",
}
"""What an extra is for."""

_IDENTITY = (
    "CAgSADo3ChAKAXgSAXkiCElkZW50aXR5EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ=="  # a graph y = x
)
_ASK_RUNTIME = f"""
import base64, json, onnxruntime as ort
found = {{"version": getattr(ort, "__version__", ""), "providers": list(ort.get_available_providers())}}
options = ort.SessionOptions()
options.log_severity_level = 4
if "CUDAExecutionProvider" in found["providers"]:
    session = ort.InferenceSession(base64.b64decode("{_IDENTITY}"), options, providers=["CUDAExecutionProvider"])
    found["cuda"] = "CUDAExecutionProvider" in session.get_providers()
print(json.dumps(found))
"""
_ASK_TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found["devices"].append({"name": torch.cuda.get_device_name(i), "free": free, "total": total})
print(json.dumps(found))
"""
_ASK_VISION = "import torchvision, json; print(json.dumps(torchvision.__version__))"


@dataclass(frozen=True)
class Finding:
    """``status``: ``ok``, ``note`` (something that may be wanted is not there), ``problem`` (something fails); ``mend``: what to do, a command where there is one."""

    about: str
    status: str
    found: str
    mend: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _command, _runtime, _packages, _torch, _vision, _gpu)
    return [finding for part in (*parts, _memory, _disk) for finding in part()]


def _python() -> Iterator[Finding]:
    wanted = str(metadata.metadata("diffusionblocks")["Requires-Python"]).removeprefix(">=")
    enough = _numbers(platform.python_version()) >= _numbers(wanted)
    yield Finding(
        "python",
        OK if enough else PROBLEM,
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        None if enough else f"Install Python {wanted} or later.",
    )


def _command() -> Iterator[Finding]:
    """Whether ``dbconvert`` is this one: a tool for databases has that name, too."""
    yield Finding("diffusionblocks", OK, metadata.version("diffusionblocks"))
    if _installed("dbconvert"):
        yield Finding(
            "dbconvert",
            PROBLEM,
            "the package dbconvert, a tool for databases, is installed: its command has the same name",
            "pip uninstall -y dbconvert; pip install --force-reinstall --no-deps diffusionblocks",
        )
        return
    at, own = shutil.which("dbconvert"), Path(sysconfig.get_path("scripts"))
    if at is None:
        yield Finding(
            "dbconvert",
            NOTE,
            "the command is not on the PATH",
            f'export PATH="{own}:$PATH", or python -m diffusionblocks.converter',
        )
    elif not Path(at).parent.samefile(own):
        yield Finding(
            "dbconvert", NOTE, f"the command on the PATH is {at}, of another environment", f'export PATH="{own}:$PATH"'
        )
    else:
        yield Finding("dbconvert", OK, at)


def _runtime() -> Iterator[Finding]:
    """onnxruntime: which distributions provide it, what it can run on, and whether CUDA's libraries really load."""
    named = sorted({str(d.metadata["Name"]) for d in metadata.distributions() if _is_runtime(d)})
    if not named:
        yield Finding("onnxruntime", PROBLEM, "not installed: no bundle runs", f"{install('cpu')}, or [gpu]")
        return
    if len(named) > 1:
        wanted = "gpu" if any("gpu" in name for name in named) else "cpu"
        yield Finding(
            "onnxruntime",
            PROBLEM,
            f"{' and '.join(named)} overwrite each other's files",
            f"pip uninstall -y {' '.join(named)}; {install(wanted)}",
        )
    said = _asked(_ASK_RUNTIME)
    if isinstance(said, str):
        yield Finding(
            "onnxruntime",
            PROBLEM,
            f"cannot be imported: {said}",
            f"pip uninstall -y {' '.join(named)}; {install('cpu')}",
        )
        return
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in said["providers"])
    yield Finding("onnxruntime", OK, f"{named[0]} {said['version']}; runs on {providers}")
    if said.get("cuda") is False:
        yield Finding(
            "onnxruntime on CUDA",
            PROBLEM,
            "falls back to the CPU: CUDA's or cuDNN's libraries do not load",
            'pip install "onnxruntime-gpu[cuda,cudnn]", and a driver of that version of CUDA (nvidia-smi says which)',
        )


def _packages() -> Iterator[Finding]:
    """What the package asks for, by the extra that asks for it."""
    missing: dict[str, list[str]] = {}
    for name, least, extra in _requirements():
        if extra in ("dev", "demo", "docs", "cpu", "gpu") or name in ("torch", RUNTIMES):
            continue
        version = _installed(name)
        if version is None and extra:
            missing.setdefault(extra, []).append(name)
        elif version is None or _numbers(version) < _numbers(least):
            found = "not installed" if version is None else f"{version} is older than {least}"
            yield Finding(name, PROBLEM, found, f'pip install "{name}>={least}"')
        else:
            yield Finding(name, OK, version)
    for extra, names in missing.items():
        use = f"; for {USES[extra]}" if extra in USES else ""
        yield Finding(", ".join(names), NOTE, f"not installed{use}", install(extra))


def _torch() -> Iterator[Finding]:
    if _installed("torch") is None:
        yield Finding("torch", NOTE, "not installed; for converting and training", install("convert"))
        return
    least = next((least for name, least, _ in _requirements() if name == "torch"), "0")
    said = _asked(_ASK_TORCH)
    if isinstance(said, str):
        yield Finding("torch", PROBLEM, f"cannot be imported: {said}", "pip install --force-reinstall torch")
    elif _numbers(said["version"]) < _numbers(least):
        yield Finding("torch", PROBLEM, f"{said['version']} is older than {least}", f'pip install "torch>={least}"')
    else:
        built = f"for CUDA {said['cuda']}" if said["cuda"] else "for CPUs"
        seen = [f"{d['name']}, {format_bytes(d['free'])} of {format_bytes(d['total'])} free" for d in said["devices"]]
        yield Finding("torch", OK, "; ".join([f"{said['version']}, built {built}", *seen]))
        if said["cuda"] and not seen:
            yield Finding(
                "torch on CUDA",
                NOTE,
                f"built for CUDA {said['cuda']} and sees no GPU",
                "Nothing to mend without a GPU; else install a driver of that version of CUDA (nvidia-smi says which).",
            )
        elif not said["cuda"] and _gpus():
            yield Finding(
                "torch on CUDA",
                NOTE,
                "built for CPUs beside a GPU",
                "pip install --force-reinstall torch, a build for CUDA",
            )


def _vision() -> Iterator[Finding]:
    """torchvision, without which timm and some of transformers cannot be imported, and whose compiled operators fit one build of torch."""
    version = _installed("torchvision")
    if version is None:
        if _installed("timm"):
            yield Finding("torchvision", PROBLEM, "not installed, and timm needs it", "pip install torchvision")
        return
    said = _asked(_ASK_VISION) if _installed("torch") else "torch is not installed"
    if isinstance(said, str) and said != version:
        yield Finding(
            "torchvision",
            NOTE if "torchvision::" in said else PROBLEM,
            f"{version} does not fit torch {_installed('torch')}: "
            + (
                "models are built without its compiled operators, which detection alone needs"
                if "torchvision::" in said
                else f"models of timm, torchvision and some of transformers cannot be built: {said}"
            ),
            "pip install --force-reinstall torch torchvision, both from one place",
        )
    else:
        yield Finding("torchvision", OK, version)


def _gpu() -> Iterator[Finding]:
    gpus = _gpus()
    for line in gpus:
        yield Finding("GPU", OK, line)
    if gpus and not any("gpu" in str(d.metadata["Name"]) for d in metadata.distributions() if _is_runtime(d)):
        yield Finding(
            "onnxruntime on CUDA",
            NOTE,
            "there is a GPU, and an onnxruntime for CPUs",
            f"pip uninstall -y onnxruntime; {install('gpu')}",
        )
    if not gpus:
        yield Finding("GPU", NOTE, "none seen by nvidia-smi; everything runs on the CPU")


def _memory() -> Iterator[Finding]:
    free, why = free_memory()
    if free is None:
        yield Finding("memory", NOTE, "this system does not say how much is free")
        return
    mend = (
        "Close other programs, or raise the limit; run with --memory-budget, train with --accumulate."
        if free < LOW
        else None
    )
    yield Finding("memory", _level(free), f"{format_bytes(free)} free{why}", mend)


def free_memory() -> tuple[int | None, str]:
    """Bytes that can still be taken, by the system, the control group and the process's own limit; and which of the latter two says so."""
    found: list[tuple[int, str]] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [(int(line.split()[1]) * 1024, "") for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            room = int((root / limit).read_text()) - int((root / used).read_text())
            found.append((max(room, 0), ", by the limit of this control group"))
        except (OSError, ValueError):
            continue
    try:
        import resource

        limit_as = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit_as != resource.RLIM_INFINITY:
            found.append((limit_as, ", by ulimit -v"))
    except (ImportError, OSError):
        pass
    return min(found) if found else (None, "")


def _disk() -> Iterator[Finding]:
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "cache": cache_file().parent}
    mends = {
        "here": "Free some space, or write elsewhere (--out).",
        "temporary files": "Free some space, or set TMPDIR.",
    }
    for about, place in places.items():
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free
        status, found = _level(free), f"{format_bytes(free)} free in {place}"
        if not os.access(there, os.W_OK):
            status, found = NOTE if about == "cache" else PROBLEM, f"{place} cannot be written to"
        mend = mends.get(about, "Free some space, or set XDG_CACHE_HOME.") if status != OK else None
        yield Finding(f"disk, {about}", status, found, mend)


def _level(free: int) -> str:
    return PROBLEM if free < LEAST else NOTE if free < LOW else OK


def _gpus() -> list[str]:
    """Lines of nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = ["--query-gpu=name,memory.free,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        made = subprocess.run([program, *asked], capture_output=True, text=True, timeout=20, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in made.splitlines() if line.count(",") == 3]
        return [
            f"{name}, {format_bytes(int(free) << 20)} of {format_bytes(int(total) << 20)} free, driver {driver}"
            for name, free, total, driver in rows
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _asked(program: str) -> Any:
    """What a program of its own prints as JSON, or a line of why it does not."""
    try:
        made = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PATIENCE} seconds"
    lines = made.stdout.strip().splitlines()
    if made.returncode == 0 and lines:
        return json.loads(lines[-1])
    errors = made.stderr.strip().splitlines()
    return errors[-1][:200] if errors else f"it ended with {made.returncode}"


def _is_runtime(distribution: metadata.Distribution) -> bool:
    return str(distribution.metadata["Name"] or "").lower().replace("_", "-").startswith(RUNTIMES)


def _requirements() -> list[tuple[str, str, str]]:
    """(name, least version, extra) of what the package asks for; the extra is '' for what it cannot do without."""
    found = []
    for text in metadata.requires("diffusionblocks") or ():
        parts = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(?:>=\s*([0-9.]+))?", text)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", text)
        if parts is not None:
            found.append((parts[1], parts[2] or "0", extra[1] if extra else ""))
    return list({(name, extra): (name, least, extra) for name, least, extra in found}.values())


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers a version begins with."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])
