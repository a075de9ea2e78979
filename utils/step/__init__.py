"""What a step of training is made of, but for the network: optimizer, schedule, precision, loss, meters."""
