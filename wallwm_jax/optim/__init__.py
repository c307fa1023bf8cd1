"""Optimizers: Muon for matrices, AdamW for the rest, routed by parameter path."""

from wallwm_jax.optim.factory import make_optimizer as make_optimizer
from wallwm_jax.optim.routing import format_table as format_table
from wallwm_jax.optim.routing import route as route
from wallwm_jax.optim.schedules import make_schedule as make_schedule
