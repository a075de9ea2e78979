"""The training of a network: loss, penalties, teacher, policy, checks."""
