"""Everything around the networks: options, data, training state, reports."""
