"""Meshes, sharding rules, activation constraints: where arrays live, apart from what they mean."""
