"""A policy behind a websocket: the wire, the sessions and the server."""
