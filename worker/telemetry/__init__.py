"""How a worker is watched: metrics, spans, heartbeat, readiness and the port for them."""
