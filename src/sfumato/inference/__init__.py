"""The same network, run another way: packed weights, row streaming, offload."""
