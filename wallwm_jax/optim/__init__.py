"""Optimizers: Muon for matrices, AdamW for the rest, routed by parameter path."""

from wallwm_jax.optim.factory import make_muon_plan as make_muon_plan
from wallwm_jax.optim.factory import make_optimizer as make_optimizer
from wallwm_jax.optim.factory import newton_schulz as newton_schulz
from wallwm_jax.optim.matrices import Matrix as Matrix
from wallwm_jax.optim.plan import format_plan as format_plan
from wallwm_jax.optim.routing import format_table as format_table
from wallwm_jax.optim.routing import optimizer_of as optimizer_of
from wallwm_jax.optim.routing import route as route
from wallwm_jax.optim.schedules import make_schedule as make_schedule
