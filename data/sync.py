"""Temporal synchronisation: by how many frames the robot stream lags behind each camera.

Cameras and controllers have clocks of their own. What moves in the picture (`visual`) is compared
with how fast the measured end effectors move (`robot`) over a window of integer lags; commands are
not used, they lead what they cause by several frames. A lag L means that state row t + L was
measured when frame t was taken.

A lag belongs to a rig (clocks and cameras), not to an episode: `motion` reduces each episode to a
few hundred numbers, `estimate` pools those of a rig, and `align` checks that an episode agrees with
its rig before it shifts its streams and trims what has no partner. Nothing is padded.

The pooled score is the log likelihood ratio of a linear relation between two Gaussian signals,
-1/2 log(1 - r^2) per frame, with r the normalised cross-correlation: it weighs a camera by how
much it has to say, and adds up over cameras, channels and episodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from wallwm_jax.data.schema import ARM_WIDTH, CaptionSpan, EpisodeRecord, EventSpan, Quarantined
from wallwm_jax.geometry.poses import geodesic_angle, rot6d_to_matrix
from wallwm_jax.types import ConfigError, DataError
