"""Flow matching in plain jnp: schedules, noising and targets, losses, samplers. No Flax, no I/O."""
