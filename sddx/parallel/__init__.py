"""One piece of work in several processes of this machine, one a device."""
