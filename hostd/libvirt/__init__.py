"""Everything that talks to libvirt, and what is known about its XML."""
