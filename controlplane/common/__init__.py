"""What the control plane and hostd share besides the generated protos.

Errors, identities, TLS, configuration files and logging. Nothing here knows
of migrations, hosts or libvirt.
"""
