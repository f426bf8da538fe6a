"""Checking a bundle: files, hashes, names, shapes, then numbers in both modes. Needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.arrays import Unreadable, load_arrays
from diffusionblocks.runtime.bundle import Bundle, open_bundle
from diffusionblocks.runtime.cached import with_positions
from diffusionblocks.runtime.errors import BundleError, CheckFailed, FileError
from diffusionblocks.runtime.files import checked_path

TOLERANCE = 1e-4
TOLERANCES = {"float32": TOLERANCE, "float16": 2e-2}
"""By what a bundle computes in."""
Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Check:
    """One check: passed or not, with the measured relative difference and its tolerance where it compares numbers."""

    name: str
    ok: bool
    detail: str
    difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one bundle."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def raise_for_failures(self) -> None:
        """Raise one error that lists every failed check.

        Raises:
            CheckFailed: at least one check failed.
        """
        failed = [f"{c.name}: {c.detail}" for c in self.checks if not c.ok]
        if failed:
            raise CheckFailed(
                f"{len(failed)} of {len(self.checks)} checks failed:\n  " + "\n  ".join(failed),
                hint="Do not use this bundle: export it again from the model.",
            )


def compare(
    name: str, got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], tolerance: float = TOLERANCE
) -> Check:
    """Compare shapes, then values: the largest difference relative to the largest expected magnitude, and rows' arg-max.

    Minus infinity, the logarithm of what cannot be, must stand at the same places.
    """
    if got.shape != expected.shape:
        return Check(name, False, f"shape {got.shape}, expected {expected.shape}")
    a, b = got.astype(np.float64), expected.astype(np.float64)
    never = np.isneginf(b)
    if (np.isneginf(a) != never).any():
        return Check(name, False, "minus infinity at other places")
    a[never] = b[never] = b[~never].min(initial=0.0)
    if not np.isfinite(a).all():
        return Check(name, False, "NaN or infinity in the output")
    scale = max(float(np.abs(b).max(initial=0.0)), 1e-12)
    difference = float(np.abs(a - b).max(initial=0.0)) / scale
    same = a.ndim < 2 or _same_predictions(a, b, tolerance * scale)
    ok = difference <= tolerance and same
    detail = f"relative difference {difference:.1e} (tolerance {tolerance:.0e})" + (
        "" if same else ", other predictions"
    )
    return Check(name, ok, detail, difference, tolerance)


def _same_predictions(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], gap: float) -> bool:
    """Whether the rows' arg-max agree; a row of ``b`` whose two largest values are closer than ``gap`` may go either way."""
    if a.shape[-1] < 2:
        return True
    top = np.sort(b, axis=-1)[..., -2:]
    return bool(((a.argmax(-1) == b.argmax(-1)) | (top[..., 1] - top[..., 0] <= gap)).all())


def verify_bundle(path: str | Path) -> VerifyReport:
    """Hash every file anew, open every graph, and compare both modes with what torch computed at export.

    Raises:
        BundleError: a file is missing, truncated or altered, or the manifest is damaged.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    for name in manifest.files:
        checked_path(folder, name, manifest.files, again=True)
    checks = [Check("files", True, f"{len(manifest.files)} files, sizes and SHA-256 as recorded")]
    if manifest.probe is None or manifest.probe not in manifest.files:
        raise BundleError("The bundle holds no probe to compare with.", hint="Export it again.")
    try:
        probe = load_arrays(folder / manifest.probe)
    except Unreadable as error:
        raise FileError(f"{manifest.probe} cannot be read: {error}", hint="Export the bundle again.") from error
    inputs = {name.removeprefix("input."): a for name, a in probe.items() if name.startswith("input.")}
    return VerifyReport((*checks, *compare_with(folder, inputs, probe), *compare_cached(folder, inputs, probe)))


def compare_with(folder: Path, inputs: Arrays, expected: Arrays) -> list[Check]:
    """Run a bundle on ``inputs`` and compare with ``expected`` (keys ``exact.NAME`` and ``denoise.prediction``)."""
    checks = []
    with open_bundle(folder) as bundle:
        manifest = bundle.manifest
        tolerance = TOLERANCES[manifest.dtype]
        if manifest.exact:
            got = bundle.run_all(dict(inputs))
            for name, want in expected.items():
                if name.startswith("exact."):
                    output = name.removeprefix("exact.")
                    missing = Check(name, False, "the bundle has no such output")
                    checks.append(compare(name, got[output], want, tolerance) if output in got else missing)
        if manifest.trained and "denoise.prediction" in expected:
            prediction = _prediction(bundle, inputs, expected)
            checks.append(compare("denoise", prediction, expected["denoise.prediction"], tolerance))
    return checks


def compare_cached(folder: Path, inputs: Arrays, expected: Arrays) -> list[Check]:
    """Run a language model's bundle on ``inputs`` piece by piece, by its graphs for new positions, and compare with ``expected``; no checks where it has none."""
    checks: list[Check] = []
    with open_bundle(folder) as bundle:
        manifest = bundle.manifest
        if manifest.stem.cached is None:
            return checks
        assert manifest.target is not None
        rows, length = len(next(iter(inputs.values()))), manifest.target.positions[0]
        moving = with_positions(manifest.inputs, length)
        exact = f"exact.{manifest.head.outputs[0]}"
        modes = {"exact": exact if manifest.exact else "", "denoise": "denoise.prediction" if manifest.trained else ""}
        for mode, name in modes.items():
            if name not in expected:
                continue
            with bundle.continuing(rows, mode) as text:
                assert text is not None  # there is no budget
                edges = [0, *range(length // 2, min(length // 2 + 3, length)), length]
                pieces = [
                    text({n: v[:, a:b] if n in moving else v for n, v in inputs.items()}) for a, b in pairwise(edges)
                ]
            want, tolerance = expected[name].astype(np.float32), TOLERANCES[manifest.dtype]
            checks.append(compare(f"{mode}, position by position", np.concatenate(pieces, 1), want, tolerance))
    return checks


def _prediction(bundle: Bundle, inputs: Arrays, expected: Arrays) -> np.ndarray[Any, Any]:
    target = bundle.manifest.target
    if target is None or target.denoiser is None:
        return bundle.run(dict(inputs), "denoise")
    own = target.denoiser
    conditions = {name: a for name, a in inputs.items() if name not in (own.input, own.time)}
    return bundle.sample(conditions, count=None if conditions else len(expected["denoise.prediction"]), mode="denoise")
