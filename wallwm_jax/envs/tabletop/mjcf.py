"""The MuJoCo model of the tabletop: a gripper on a Cartesian + yaw stage, four free cubes, a table
plane.

World frame: x right, y away from the front camera, z up, origin in the middle of the table top; m,
kg, s, rad. The gripper's reference point is the grasp centre between the two finger pads; at yaw 0
the fingers close along y.

Contacts are kept to what manipulation needs, because every candidate pair costs time in MJX: four
small spheres per finger against the cubes (box against box is slower there and jumps between
contact normals), cubes against the table, and one sphere inside each cube against the others'
(cubes push each other apart but are not meant to be stacked). Of the sphere-cube pairs the nearest
eight count.
"""

from __future__ import annotations

import functools

import mujoco

CUBE_HALF = 0.022
CUBE_COLOURS = ('red', 'green', 'blue', 'yellow')
NUM_CUBES = len(CUBE_COLOURS)
ZONE_COLOURS = ('green', 'purple', 'white')
NUM_ZONES = len(ZONE_COLOURS)
ZONE_HALF = 0.048

FINGER_TRAVEL = 0.043  # of each finger, so the gripper opens to 8.6 cm
FINGER_HALF = (0.011, 0.006, 0.026)  # x, y (closing axis), z half sizes of a finger
PAD_SPREAD = 0.006  # of the four contact spheres of a finger from the grasp centre, along x and z
FINGER_CENTRE_Z = 0.014  # of the finger box above the grasp centre
PALM_HALF = (0.016, 0.058, 0.012)
PALM_CENTRE_Z = 0.052
STEM_HALF = (0.010, 0.010, 0.090)
STEM_CENTRE_Z = 0.154

STAGE_LOW = (-0.21, -0.21, 0.016)  # reach of the grasp centre
STAGE_HIGH = (0.21, 0.21, 0.26)
YAW_LIMIT = 1.2
PARKING = (3.0, 3.0)  # absent cubes wait here, half a metre apart

NUM_STAGE = 6  # x, y, z, yaw, finger, finger: the first six joints, and the six actuators
TIMESTEP = 0.02


def _cube_xml(index: int) -> str:
  return f"""
    <body name="cube{index}" pos="{PARKING[0] + 0.5 * index} {PARKING[1]} {CUBE_HALF}">
      <freejoint name="cube{index}"/>
      <geom name="cube{index}" class="cube"/>
      <geom name="core{index}" class="core"/>
    </body>"""


def _finger_xml(name: str, sign: int) -> str:
  spheres = ''.join(
    f'<geom class="pad" pos="{x} 0 {z - FINGER_CENTRE_Z}"/>'
    for x in (-PAD_SPREAD, PAD_SPREAD)
    for z in (-PAD_SPREAD, PAD_SPREAD)
  )
  return f"""
      <body name="{name}" pos="0 {sign * FINGER_HALF[1]} {FINGER_CENTRE_Z}">
        <joint name="{name}" class="finger" axis="0 {sign} 0"/>
        <inertial pos="0 0 0" mass="0.05" diaginertia="0.00002 0.00002 0.00002"/>{spheres}
      </body>"""


def build_xml() -> str:
  """MJCF source text."""
  cubes = ''.join(_cube_xml(i) for i in range(NUM_CUBES))
  return f"""
<mujoco model="tabletop">
  <option timestep="{TIMESTEP}" integrator="Euler" jacobian="sparse" solver="Newton" iterations="8"
  ls_iterations="10" tolerance="1e-5" cone="pyramidal"/> <custom>
    <numeric name="max_geom_pairs" data="8"/>
  </custom>
  <default>
    <geom friction="1.0 0.02 0.0001" solref="0.04 1" solimp="0.8 0.98 0.003" condim="3" contype="0"
    conaffinity="0"/> <default class="cube">
      <geom type="box" size="{CUBE_HALF} {CUBE_HALF} {CUBE_HALF}" mass="0.06" contype="2"
      conaffinity="5"
        condim="3" friction="0.4 0.02 0.0001"/>
    </default>
    <default class="core"><geom type="sphere" size="{CUBE_HALF * 1.1}" mass="0" contype="8"
    conaffinity="8" condim="1"/></default> <default class="finger"><joint type="slide" damping="12"
    armature="0.02"/></default> <default class="pad"><geom type="sphere" size="{FINGER_HALF[1]}"
    contype="1" conaffinity="0" friction="1.2 0.02 0.0001"/></default>
  </default>
  <worldbody>
    <geom name="table" type="plane" size="1 1 0.1" contype="4" conaffinity="0" friction="0.4 0.02
    0.0001"/> <body name="stage" gravcomp="1">
      <inertial pos="0 0 0.1" mass="0.9" diaginertia="0.002 0.002 0.002"/>
      <joint name="x" type="slide" axis="1 0 0" damping="80"/>
      <joint name="y" type="slide" axis="0 1 0" damping="80"/>
      <joint name="z" type="slide" axis="0 0 1" damping="80"/>
      <joint name="yaw" type="hinge" axis="0 0 1" damping="0.8"
      armature="0.008"/>{_finger_xml('left', 1)}{_finger_xml('right', -1)}
    </body>{cubes}
  </worldbody>
  <actuator>
    <position joint="x" kp="1600"/>
    <position joint="y" kp="1600"/>
    <position joint="z" kp="1600"/>
    <position joint="yaw" kp="16"/>
    <position joint="left" kp="400"/>
    <position joint="right" kp="400"/>
  </actuator>
</mujoco>"""


@functools.cache
def load_model() -> mujoco.MjModel:
  """The compiled MuJoCo model."""
  return mujoco.MjModel.from_xml_string(build_xml())
