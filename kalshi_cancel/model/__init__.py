"""Values without I/O: requests, orders, scopes, results and their schemas."""
