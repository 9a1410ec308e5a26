"""What both packages say of themselves: log lines, the table of their events, and spans."""
