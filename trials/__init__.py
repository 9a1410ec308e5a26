"""What drives whole stacks: the demonstration, the fault campaign, and the failover measurement."""
