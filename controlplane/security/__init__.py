"""Who may do what: the fleet's certificates, roles, join tokens and the audit log."""
