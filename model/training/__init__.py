"""From a network to its training: loss, penalties, teacher, policy, checks."""
