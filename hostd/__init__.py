"""Drover's daemon on each hypervisor: libvirt, domain XML, disks."""
