"""MuJoCo reads MUJOCO_GL when it is imported: without a display, draw in memory."""

import os

if not os.environ.get('DISPLAY'):
  os.environ.setdefault('MUJOCO_GL', 'osmesa')
