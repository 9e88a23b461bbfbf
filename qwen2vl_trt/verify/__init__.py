"""``verify``: what holds on this machine, within some minutes: engines, kernels, rates, speed, requests a second."""
