"""Several processes, and the devices that they run on."""
