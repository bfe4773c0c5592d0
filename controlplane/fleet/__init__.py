"""The fleet as the control plane reaches it: calls, reports and their consequences."""
