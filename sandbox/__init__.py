"""A local exchange that answers as the real one does, and goes wrong on demand; see `sandbox.server`."""
