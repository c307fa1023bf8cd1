"""MuJoCo reads MUJOCO_GL when it is imported: where Meta-World is installed, draw in memory."""

import importlib.util
import os

if importlib.util.find_spec('metaworld') and not os.environ.get('DISPLAY'):
  os.environ.setdefault('MUJOCO_GL', 'osmesa')
