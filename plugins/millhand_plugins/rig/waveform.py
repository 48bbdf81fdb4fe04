"""From one vibration snapshot to what the waveform classifier looks at: the samples themselves, on a bent scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from millhand.errors import ConfigError
from millhand.pipeline.features import GRAVITY_M_S2, FeatureSet, kurtosis, rms, velocity_rms_mm_s
from millhand_plugins.rig.extractor import snapshot
from millhand_plugins.rig.vibration import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from millhand.pipeline.windows import Window

WAVEFORM_SAMPLES = 2048
"""Length of the tensor `waveform`: the newest 0.2 s."""
KNEE_G = 0.1
"""Where the scale bends: about the noise of a quiet machine."""
RATE_TOLERANCE = 0.01


class WaveformExtractor:
    """float32 [2, WAVEFORM_SAMPLES] of the newest snapshot: asinh(acceleration / KNEE_G), radial and axial.

    The inverse hyperbolic sine is linear for hum and noise and logarithmic for impacts: a transmitter's +-32 g become
    +-6.5, so that eight bits hold both. Nothing is scaled by what the snapshot holds: how strongly a machine vibrates
    is the first thing to know about it. Neither the speed nor the bearing's geometry is needed.

    None while the machine idles or ramps, or where a channel is missing, too short or unusable. Raises ConfigError for
    another sample rate than the rig's, which would move every frequency.
    """

    name = "rig-waveform"

    def extract(self, window: Window) -> FeatureSet | None:
        found = snapshot(window)
        if found is None or found.samples_g.shape[1] < WAVEFORM_SAMPLES:
            return None
        if abs(found.rate_hz / SAMPLE_RATE_HZ - 1) > RATE_TOLERANCE:
            raise ConfigError(
                f"asset '{window.asset}': its waveforms are sampled at {found.rate_hz:g} Hz, not {SAMPLE_RATE_HZ:g} Hz",
                hint=f"sample at {SAMPLE_RATE_HZ:g} Hz, or use the model rig-fault, which takes any rate",
            )
        samples_g = found.samples_g[:, -WAVEFORM_SAMPLES:]
        radial, axial = velocity_rms_mm_s(samples_g * GRAVITY_M_S2, found.rate_hz).tolist()
        evidence = {
            "velocity_rms_mm_s": radial,
            "velocity_axial_rms_mm_s": axial,
            "acceleration_rms_g": float(rms(samples_g[0])),
            "acceleration_kurtosis": float(kurtosis(samples_g[0])),
        }
        return FeatureSet({"waveform": bend(samples_g)}, evidence)


def bend(samples_g: NDArray[np.floating]) -> NDArray[np.float32]:
    """The classifier's scale of acceleration in g, of any shape."""
    return np.asarray(np.arcsinh(samples_g / KNEE_G), dtype=np.float32)
