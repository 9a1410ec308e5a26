"""From a pending cancel to a known outcome: claim, send, ask again, settle."""
