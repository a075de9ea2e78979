"""The parts of a training step beside the network: optimizer, schedule, precision, loss, meters."""
