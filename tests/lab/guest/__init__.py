"""The lab's guest: a Linux that boots in seconds, checks its own data and says so."""
